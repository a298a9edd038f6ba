package lazy

import (
	"math"
	"sync"
	"sync/atomic"
)

// DefaultMaskMemory is how much memory the masks of a device take at most, in bytes,
// if its Options do not say.
const DefaultMaskMemory = 64 << 20

// maskTable holds the masks of the blocks that are partly written. It costs
// what is in it and nothing for the rest of the disk.
//
// It holds at most limit masks, or a few more. A block that would need one more is
// fetched before it is written to. The same goes for a block whose mask was postponed
// at a start: a map may hold more masks than a device takes into memory.
type maskTable struct {
	n       atomic.Int64 // masks held: with none of them, nobody takes a lock
	limit   int64        // fixed before the first use
	changes *changes     // told of masks that grow; nil without a map
	mirror  *mirror      // has them, too; nil: none
	shards  [16]maskShard

	// postponed says of which missing blocks the mask is in the map only. It is made
	// before the first use, or never, and bits are only cleared from then on.
	postponed bitmap
	waiting   atomic.Int64 // bits of postponed
}

type maskShard struct {
	mu sync.Mutex
	// Guarded by mu:
	masks   map[int64]*sectorMask
	changed []int64 // blocks whose mask has grown since it was last taken to the map
}

// sectorMask is the mask of one block. Guarded by the mutex of its shard.
type sectorMask struct {
	bits    mask
	slot    int64 // in the mirror, or noSlot
	changed bool  // the block is in changed
}

// maskLimit is how many masks of so many words fit into memory bytes. 0 is the
// default, and less than 0 no limit.
func maskLimit(memory int64, words int) int64 {
	switch {
	case memory < 0:
		return math.MaxInt64
	case memory == 0:
		memory = DefaultMaskMemory
	}
	return max(1, memory/maskCost(words))
}

// maskCost is about what a mask costs, in bytes: its entry in the table, and its
// words there and in the mirror.
func maskCost(words int) int64 { return 96 + 16*int64(words) }

func (t *maskTable) shard(block int64) *maskShard {
	return &t.shards[block%int64(len(t.shards))]
}

// none reports whether no block has a mask.
func (t *maskTable) none() bool { return t.n.Load() == 0 && t.waiting.Load() == 0 }

// isPostponed reports whether the block has a mask that is not in memory.
func (t *maskTable) isPostponed(block int64) bool {
	return t.waiting.Load() != 0 && t.postponed.get(block)
}

// postpone leaves the mask of the block in the map, if it is one too many. It
// reports whether that is so.
func (t *maskTable) postpone(block, blocks int64) bool {
	if t.n.Load() < t.limit || t.hasMask(block) {
		return false
	}
	if t.postponed == nil {
		t.postponed = newBitmap(blocks)
	}
	if old := t.postponed[block>>6].Or(1 << (block & 63)); old&(1<<(block&63)) == 0 {
		t.waiting.Add(1)
	}
	return true
}

// recall says that the mask of the block is in memory, or not needed any more.
func (t *maskTable) recall(block int64) {
	if t.isPostponed(block) {
		t.postponed[block>>6].And(^uint64(1 << (block & 63)))
		t.waiting.Add(-1)
	}
}

// takes reports whether a part of the block, which is missing, can be written
// without it: it has a mask, or there is room for one.
func (t *maskTable) takes(block int64) bool {
	if t.isPostponed(block) {
		return false
	}
	return t.n.Load() < t.limit || t.hasMask(block)
}

func (t *maskTable) hasMask(block int64) bool {
	s := t.shard(block)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.masks[block] != nil
}

// get returns the block's mask, or nil. Only the holder of the block's claim may
// look into it, since nobody else can tell when it changes.
func (t *maskTable) get(block int64) mask {
	if t.n.Load() == 0 {
		return nil
	}
	s := t.shard(block)
	s.mu.Lock()
	defer s.mu.Unlock()
	if m := s.masks[block]; m != nil {
		return m.bits
	}
	return nil
}

// has says whether sectors [lo, hi) of the block were all written here, as far as
// that is in memory.
func (t *maskTable) has(block, lo, hi int64) bool {
	if t.n.Load() == 0 {
		return false
	}
	s := t.shard(block)
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.masks[block]
	return m != nil && m.bits.has(lo, hi)
}

// add publishes sectors [lo, hi) of the block, which has count sectors, as
// written, and says whether all of them are now.
func (t *maskTable) add(block, lo, hi, count int64) (full bool) {
	s := t.shard(block)
	s.mu.Lock()
	defer s.mu.Unlock()
	m := t.maskLocked(s, block, count)
	if m.bits.has(lo, hi) {
		return m.bits.has(0, count)
	}
	m.slot = t.mirror.putMask(m.slot, block, m.bits, lo, hi) // before anybody sees it
	t.grewLocked(s, m, block)
	for w := lo >> 6; w<<6 < hi; w++ {
		m.bits[w] |= wordMask(w, lo, hi)
	}
	return m.bits.has(0, count)
}

// maskLocked returns the mask of a block that has count sectors, and makes it if
// there is none. The shard's lock is held.
func (t *maskTable) maskLocked(s *maskShard, block, count int64) *sectorMask {
	m := s.masks[block]
	if m == nil {
		m = &sectorMask{bits: make(mask, (count+63)/64), slot: noSlot}
		if s.masks == nil {
			s.masks = make(map[int64]*sectorMask)
		}
		s.masks[block] = m
		t.n.Add(1)
	}
	return m
}

// grewLocked has a mask that grows taken to the map. The shard's lock is held.
func (t *maskTable) grewLocked(s *maskShard, m *sectorMask, block int64) {
	if t.changes != nil && !m.changed {
		m.changed = true
		s.changed = append(s.changed, block)
		t.changes.touch()
	}
}

// join adds the mask that a block has in slot n of the mirror, and says whether all
// of its count sectors are written now.
func (t *maskTable) join(block int64, words mask, count, n int64) (full bool) {
	s := t.shard(block)
	s.mu.Lock()
	defer s.mu.Unlock()
	m := t.maskLocked(s, block, count)
	m.slot = n
	for w := range m.bits {
		if words[w]&^m.bits[w] != 0 {
			t.grewLocked(s, m, block)
			m.bits[w] |= words[w] & wordMask(int64(w), 0, count)
		}
	}
	t.recall(block) // the mirror has all of a mask
	return m.bits.has(0, count)
}

// load adds what the map has of the mask of a block that has count sectors.
func (t *maskTable) load(block int64, words mask, count int64) {
	s := t.shard(block)
	s.mu.Lock()
	defer s.mu.Unlock()
	m := t.maskLocked(s, block, count)
	for w := range m.bits {
		m.bits[w] |= words[w] & wordMask(int64(w), 0, count)
	}
	t.recall(block)
}

// drop forgets the mask of every block in [lo, hi). The blocks are published
// first, so that no reader finds neither.
func (t *maskTable) drop(lo, hi int64) {
	if t.none() {
		return
	}
	for block := lo; block < hi; block++ {
		s := t.shard(block)
		s.mu.Lock()
		if m, ok := s.masks[block]; ok {
			delete(s.masks, block)
			t.n.Add(-1)
			t.mirror.freeMask(m.slot)
		}
		t.recall(block)
		s.mu.Unlock()
	}
}

// takeChanged calls yield for every mask that has grown since the last call,
// with its bits as they are now; nil if the block is local by now. yield runs
// with the lock of the mask held.
func (t *maskTable) takeChanged(yield func(block int64, bits mask)) {
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.Lock()
		changed := s.changed
		s.changed = nil
		s.mu.Unlock()
		for _, block := range changed {
			s.mu.Lock()
			if m := s.masks[block]; m != nil {
				m.changed = false
				yield(block, m.bits)
			} else {
				yield(block, nil)
			}
			s.mu.Unlock()
		}
	}
}

// putBack has the block's mask taken again by the next takeChanged.
func (t *maskTable) putBack(block int64) {
	s := t.shard(block)
	s.mu.Lock()
	defer s.mu.Unlock()
	if m := s.masks[block]; m != nil { // else it is local: its page was marked
		t.grewLocked(s, m, block)
	}
}
