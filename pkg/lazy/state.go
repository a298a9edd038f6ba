package lazy

import (
	"encoding/binary"
	"math"
	"math/bits"
	"sync/atomic"
)

// sectorSize is the unit, in bytes, in which writes to missing blocks are
// remembered.
const sectorSize = 512

// state says of each block what is here. It is the whole memory of a device:
// what a map on disk has to hold are its three parts.
//
// Bits may be read by anybody. They are set and cleared only by the holder of
// the claim of their blocks, and only when the disk is that far.
type state struct {
	blocks  int64
	fetched bitmap
	written bitmap
	partial maskTable

	local  atomic.Int64 // blocks that are fetched or written
	writes atomic.Int64 // blocks that are written

	changes *changes // what is not yet in the map on disk; nil without a map
	mirror  *mirror  // has all of it, too, as long as the boot lasts; nil: none
}

func newState(blocks int64) *state {
	s := &state{blocks: blocks, fetched: newBitmap(blocks), written: newBitmap(blocks)}
	s.partial.limit = math.MaxInt64
	return s
}

// bitmap is a bit a block. Its words are atomic, since blocks of different
// claims share a word.
type bitmap []atomic.Uint64

func newBitmap(n int64) bitmap { return make(bitmap, (n+63)/64) }

func (m bitmap) get(block int64) bool {
	return m[block>>6].Load()&(1<<(block&63)) != 0
}

// appendPage appends the bytes of the page of a map that begins with word first.
// What lies beyond the device is zero.
func (m bitmap) appendPage(b []byte, first int64) []byte {
	last := min(first+pageSize/8, int64(len(m)))
	for w := first; w < last; w++ {
		b = binary.LittleEndian.AppendUint64(b, m[w].Load())
	}
	return append(b, zeroes[:pageSize-8*(last-first)]...)
}

// wordMask is the bits of word w that lie in [lo, hi).
func wordMask(w, lo, hi int64) uint64 {
	mask := ^uint64(0)
	if first := w << 6; lo > first {
		mask <<= lo - first
	}
	if end := (w + 1) << 6; hi < end {
		mask &= ^uint64(0) >> (end - hi)
	}
	return mask
}

// isLocal says whether the block is here.
func (s *state) isLocal(block int64) bool {
	w, bit := block>>6, uint64(1)<<(block&63)
	return (s.fetched[w].Load()|s.written[w].Load())&bit != 0
}

// nextMissing is the first block of [lo, hi) that is not here, or hi.
func (s *state) nextMissing(lo, hi int64) int64 {
	for w := lo >> 6; w<<6 < hi; w++ {
		if m := wordMask(w, lo, hi) &^ (s.fetched[w].Load() | s.written[w].Load()); m != 0 {
			return w<<6 + int64(bits.TrailingZeros64(m))
		}
	}
	return hi
}

// nextLocal is the first block of [lo, hi) that is here, or hi.
func (s *state) nextLocal(lo, hi int64) int64 {
	for w := lo >> 6; w<<6 < hi; w++ {
		if m := wordMask(w, lo, hi) & (s.fetched[w].Load() | s.written[w].Load()); m != 0 {
			return w<<6 + int64(bits.TrailingZeros64(m))
		}
	}
	return hi
}

// nextUnwritten is the first block of [lo, hi) that is not written, or hi.
func (s *state) nextUnwritten(lo, hi int64) int64 {
	for w := lo >> 6; w<<6 < hi; w++ {
		if m := wordMask(w, lo, hi) &^ s.written[w].Load(); m != 0 {
			return w<<6 + int64(bits.TrailingZeros64(m))
		}
	}
	return hi
}

// nextWritten is the first block of [lo, hi) that is written, or hi.
func (s *state) nextWritten(lo, hi int64) int64 {
	for w := lo >> 6; w<<6 < hi; w++ {
		if m := wordMask(w, lo, hi) & s.written[w].Load(); m != 0 {
			return w<<6 + int64(bits.TrailingZeros64(m))
		}
	}
	return hi
}

// setFetched publishes [lo, hi) as fetched.
func (s *state) setFetched(lo, hi int64) {
	s.changes.begin()
	defer s.changes.end(regionFetched, lo, hi)
	for w := lo >> 6; w<<6 < hi; w++ {
		mask := wordMask(w, lo, hi)
		s.mirror.setFetched(w, mask) // first: a client that sees the block relies on it
		// Read before the block is published: from then on overwrite may set the bit, and
		// the block would be counted as one that had been local before.
		written := s.written[w].Load()
		old := s.fetched[w].Or(mask)
		s.local.Add(int64(bits.OnesCount64(mask &^ (old | written))))
	}
}

// setWritten publishes [lo, hi) as written.
func (s *state) setWritten(lo, hi int64) {
	s.changes.begin()
	defer s.changes.end(regionWritten, lo, hi)
	for w := lo >> 6; w<<6 < hi; w++ {
		mask := wordMask(w, lo, hi)
		s.mirror.setWritten(w, mask)
		old := s.written[w].Or(mask)
		s.local.Add(int64(bits.OnesCount64(mask &^ (old | s.fetched[w].Load()))))
		s.writes.Add(int64(bits.OnesCount64(mask &^ old)))
	}
}

// overwrite publishes the blocks of [lo, hi) that are fetched as written, too: they are
// not as the source has them any more. It comes before the write itself, so that a
// block which is not written is as it was fetched.
func (s *state) overwrite(lo, hi int64) {
	for w := lo >> 6; w<<6 < hi; w++ {
		mask := wordMask(w, lo, hi) & s.fetched[w].Load() &^ s.written[w].Load()
		if mask == 0 {
			continue
		}
		s.changes.begin()
		s.mirror.setWritten(w, mask)
		old := s.written[w].Or(mask)
		s.writes.Add(int64(bits.OnesCount64(mask &^ old)))
		s.changes.end(regionWritten, w<<6, w<<6+1)
	}
}

// nextUnmodified is the first block of [lo, hi) that is as it was fetched, or hi.
func (s *state) nextUnmodified(lo, hi int64) int64 {
	for w := lo >> 6; w<<6 < hi; w++ {
		if m := wordMask(w, lo, hi) & s.fetched[w].Load() &^ s.written[w].Load(); m != 0 {
			return w<<6 + int64(bits.TrailingZeros64(m))
		}
	}
	return hi
}

// nextModified is the first block of [lo, hi) that is missing or was written, or hi.
func (s *state) nextModified(lo, hi int64) int64 {
	for w := lo >> 6; w<<6 < hi; w++ {
		if m := wordMask(w, lo, hi) &^ (s.fetched[w].Load() &^ s.written[w].Load()); m != 0 {
			return w<<6 + int64(bits.TrailingZeros64(m))
		}
	}
	return hi
}

// clearFetched takes back that [lo, hi) was fetched. What was written stays. In
// the map on disk it is cleared by saver.forget.
func (s *state) clearFetched(lo, hi int64) {
	for w := lo >> 6; w<<6 < hi; w++ {
		mask := wordMask(w, lo, hi)
		old := s.fetched[w].And(^mask)
		s.mirror.clearFetched(w, mask)
		s.local.Add(-int64(bits.OnesCount64(mask & old &^ s.written[w].Load())))
	}
}

// mask is the sectors of one block that were written here, a bit a sector.
type mask []uint64

// has says whether all of sectors [lo, hi) are in the mask.
func (m mask) has(lo, hi int64) bool {
	for w := lo >> 6; w<<6 < hi; w++ {
		if wordMask(w, lo, hi)&^m[w] != 0 {
			return false
		}
	}
	return true
}

// nextClear is the first sector of [lo, hi) that is not in the mask, or hi.
func (m mask) nextClear(lo, hi int64) int64 {
	for w := lo >> 6; w<<6 < hi; w++ {
		if b := wordMask(w, lo, hi) &^ m[w]; b != 0 {
			return w<<6 + int64(bits.TrailingZeros64(b))
		}
	}
	return hi
}

// nextSet is the first sector of [lo, hi) that is in the mask, or hi.
func (m mask) nextSet(lo, hi int64) int64 {
	for w := lo >> 6; w<<6 < hi; w++ {
		if b := wordMask(w, lo, hi) & m[w]; b != 0 {
			return w<<6 + int64(bits.TrailingZeros64(b))
		}
	}
	return hi
}
