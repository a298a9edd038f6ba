package lazy

import (
	"sync"
	"sync/atomic"
)

// maskTable holds the masks of the blocks that are partly written. It costs
// what is in it and nothing for the rest of the disk.
type maskTable struct {
	n       atomic.Int64 // masks held: with none of them, nobody takes a lock
	changes *changes     // told of masks that grow; nil without a map
	shards  [16]maskShard
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
	changed bool // the block is in changed
}

func (t *maskTable) shard(block int64) *maskShard {
	return &t.shards[block%int64(len(t.shards))]
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

// has says whether sectors [lo, hi) of the block were all written here.
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
	m := s.masks[block]
	if m == nil {
		m = &sectorMask{bits: make(mask, (count+63)/64)}
		if s.masks == nil {
			s.masks = make(map[int64]*sectorMask)
		}
		s.masks[block] = m
		t.n.Add(1)
	}
	if t.changes != nil && !m.changed && !m.bits.has(lo, hi) {
		m.changed = true
		s.changed = append(s.changed, block)
		t.changes.touch()
	}
	for w := lo >> 6; w<<6 < hi; w++ {
		m.bits[w] |= wordMask(w, lo, hi)
	}
	return m.bits.has(0, count)
}

// drop forgets the mask of every block in [lo, hi). The blocks are published
// first, so that no reader finds neither.
func (t *maskTable) drop(lo, hi int64) {
	if t.n.Load() == 0 {
		return
	}
	for block := lo; block < hi; block++ {
		s := t.shard(block)
		s.mu.Lock()
		if _, ok := s.masks[block]; ok {
			delete(s.masks, block)
			t.n.Add(-1)
		}
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
	if m := s.masks[block]; m != nil && !m.changed { // else it is local: its page was marked
		m.changed = true
		s.changed = append(s.changed, block)
		t.changes.touch()
	}
}
