package lazy

import "math/bits"

const (
	pageWords  = 64             // of a page of a runset
	pageBlocks = pageWords * 64 // blocks that a page stands for
)

// runset is a set of blocks that are put in one by one or in runs and taken out
// as runs, going round the device so that none is left behind. It costs a bit a
// block where there is something, and a pointer for every 4096 blocks.
type runset struct {
	blocks int64
	pages  []*[pageWords]uint64 // nil where nothing is
	n      int64                // blocks in the set
	cursor int64                // where take goes on looking
}

func (r *runset) add(lo, hi int64) {
	if lo >= hi {
		return
	}
	if r.pages == nil {
		r.pages = make([]*[pageWords]uint64, (r.blocks+pageBlocks-1)/pageBlocks)
	}
	for w := lo >> 6; w<<6 < hi; w++ {
		page := r.pages[w/pageWords]
		if page == nil {
			page = new([pageWords]uint64)
			r.pages[w/pageWords] = page
		}
		mask := wordMask(w, lo, hi)
		r.n += int64(bits.OnesCount64(mask &^ page[w%pageWords]))
		page[w%pageWords] |= mask
	}
}

func (r *runset) remove(lo, hi int64) {
	for w := lo >> 6; w<<6 < hi && r.n > 0; w++ {
		page := r.pages[w/pageWords]
		if page == nil {
			w |= pageWords - 1 // on to the next page
			continue
		}
		mask := wordMask(w, lo, hi)
		r.n -= int64(bits.OnesCount64(mask & page[w%pageWords]))
		page[w%pageWords] &^= mask
	}
	if r.n == 0 {
		r.pages = nil
	}
}

// take removes a run of blocks from the set and returns it.
func (r *runset) take() (lo, hi int64, ok bool) {
	if r.n == 0 {
		return 0, 0, false
	}
	lo = r.next(r.cursor, true)
	if lo == r.blocks {
		lo = r.next(0, true)
	}
	hi = r.next(lo, false)
	r.cursor = hi
	r.remove(lo, hi)
	return lo, hi, true
}

// next is the first block from lo on that is in the set, or that is not in it.
func (r *runset) next(lo int64, in bool) int64 {
	for w := lo >> 6; w<<6 < r.blocks; w++ {
		page := r.pages[w/pageWords]
		if page == nil {
			if !in {
				return max(lo, w<<6)
			}
			w |= pageWords - 1
			continue
		}
		word := page[w%pageWords]
		if !in {
			word = ^word
		}
		if word &= wordMask(w, lo, r.blocks); word != 0 {
			return w<<6 + int64(bits.TrailingZeros64(word))
		}
	}
	return r.blocks
}
