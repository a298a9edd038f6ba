package lazy

import (
	"math/bits"
	"sync"
	"sync/atomic"
)

// The regions of bits, in the order in which they lie in a map.
const (
	regionFetched = iota
	regionWritten
)

// pageBits is the blocks that a page of bits in a map stands for.
const pageBits = pageSize * 8

// changes remembers which pages of bits have changed since they were last taken
// to the map, so that saving costs what has changed and not what the disk has.
//
// A bit and its mark are one step for whoever takes the marks. Else a client
// could see a block as fetched, write to it and flush, all before the block's
// page is marked: the flush would leave the bit behind, and after a power cut
// the source's old bytes would come back.
type changes struct {
	mu    sync.RWMutex // held for reading while a bit and its mark are set, for writing while marks are taken
	marks bitmap       // a bit a page of bits: those of fetched, then those of written
	pages int64        // of one region

	dirty atomic.Bool   // there may be something to take
	kick  chan struct{} // capacity 1: dirty has become true
}

func newChanges(blocks int64) *changes {
	pages := bitPages(blocks)
	return &changes{marks: newBitmap(2 * pages), pages: pages, kick: make(chan struct{}, 1)}
}

// begin comes before the bits of a region are set, end after it.
func (c *changes) begin() {
	if c != nil {
		c.mu.RLock()
	}
}

// end marks the pages of the blocks [lo, hi).
func (c *changes) end(region, lo, hi int64) {
	if c == nil {
		return
	}
	defer c.mu.RUnlock()
	for page := lo / pageBits; page*pageBits < hi; page++ {
		n := region*c.pages + page
		if !c.marks.get(n) {
			c.marks[n>>6].Or(1 << (n & 63))
		}
	}
	c.touch()
}

// touch says that there is something to take.
func (c *changes) touch() {
	if !c.dirty.Load() && c.dirty.CompareAndSwap(false, true) {
		wake(c.kick)
	}
}

// take adds the marks to m and clears them. Who saw a bit before has it marked.
func (c *changes) take(m []uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dirty.Store(false)
	for w := range c.marks {
		if c.marks[w].Load() != 0 {
			m[w] |= c.marks[w].Swap(0)
		}
	}
}

// putBack marks the pages in m again.
func (c *changes) putBack(m []uint64) {
	for w, v := range m {
		if v != 0 {
			c.marks[w].Or(v)
			c.touch()
		}
	}
}

// snapshot is what of the state a commit makes durable: the pages and masks that
// have changed, as they stood before the disk was flushed.
type snapshot struct {
	marks  []uint64 // a bit a page that is in the snapshot
	bits   []byte   // the contents of these pages, ascending
	blocks []int64  // whose masks are in the snapshot
	words  []uint64 // of these masks, maskWords each
}

func (n *snapshot) empty() bool { return len(n.bits) == 0 && len(n.blocks) == 0 }

// fill takes what has changed of s.
func (n *snapshot) fill(s *state, maskWords int) {
	c := s.changes
	if n.marks == nil {
		n.marks = make([]uint64, len(c.marks))
	}
	clear(n.marks)
	n.bits, n.blocks, n.words = n.bits[:0], n.blocks[:0], n.words[:0]
	c.take(n.marks)
	s.partial.takeChanged(func(block int64, m mask) {
		if m == nil {
			// It has become local since. What the mask stood for is in the
			// block's bit now, which may be marked for the next commit only.
			for region := range int64(2) {
				page := region*c.pages + block/pageBits
				n.marks[page>>6] |= 1 << (page & 63)
			}
			return
		}
		n.blocks = append(n.blocks, block)
		n.words = append(n.words, m...)
		for range maskWords - len(m) { // the last block may be short
			n.words = append(n.words, 0)
		}
	})
	// The pages come last: a block that was local above is local in them.
	n.each(func(page int64) {
		m, first := s.fetched, page*pageSize/8
		if page >= c.pages {
			m, first = s.written, (page-c.pages)*pageSize/8
		}
		n.bits = m.appendPage(n.bits, first)
	})
}

// each calls yield for the number of every page in the snapshot, ascending.
func (n *snapshot) each(yield func(page int64)) {
	for w, v := range n.marks {
		for ; v != 0; v &= v - 1 {
			yield(int64(w)<<6 + int64(bits.TrailingZeros64(v)))
		}
	}
}

// putBack has all of the snapshot taken again by the next one.
func (n *snapshot) putBack(s *state) {
	s.changes.putBack(n.marks)
	for _, block := range n.blocks {
		s.partial.putBack(block)
	}
}
