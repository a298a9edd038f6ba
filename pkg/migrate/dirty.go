package migrate

import (
	"math/bits"
	"sync/atomic"
)

// dirt remembers which blocks of a disk were written since they were last read
// to be sent. It may be used from any number of goroutines.
//
// A block is marked before it is written and once more after that. The first
// mark lets the sender see that the block is about to change; the second is what
// no change can slip through: a write that began before the sender cleared the
// mark and reached the disk after the sender had read it is marked again. The
// mark is cleared before the block is read.
type dirt struct {
	geo   geometry
	dirty atomicBitmap
	// recent are the blocks written in the present period and in the last one;
	// now says which is which.
	recent [2]atomicBitmap
	now    atomic.Uint32

	count   atomic.Int64 // blocks that are dirty
	written atomic.Int64 // bytes that clients wrote
}

func newDirt(geo geometry) *dirt { return newDirtOver(geo, newAtomicBitmap(geo.blocks)) }

// newDirtOver keeps which blocks are dirty in a bitmap of the caller's.
func newDirtOver(geo geometry, dirty atomicBitmap) *dirt {
	return &dirt{
		geo:    geo,
		dirty:  dirty,
		recent: [2]atomicBitmap{newAtomicBitmap(geo.blocks), newAtomicBitmap(geo.blocks)},
	}
}

// mark makes every block that [off, off+length) touches dirty.
func (d *dirt) mark(off, length int64) {
	s, ok := d.geo.touching(off, length)
	if !ok {
		return // it is refused by the disk
	}
	d.count.Add(d.dirty.setRange(s.from, s.to))
	d.recent[d.now.Load()&1].setRange(s.from, s.to)
}

// markAll makes every block dirty.
func (d *dirt) markAll() { d.count.Add(d.dirty.setRange(0, d.geo.blocks)) }

func (d *dirt) get(block int64) bool { return d.dirty.get(block) }

// clear comes before the block is read.
func (d *dirt) clear(block int64) {
	if d.dirty.clear(block) {
		d.count.Add(-1)
	}
}

// bytes is how much is dirty, in bytes; the last block counts whole.
func (d *dirt) bytes() int64 { return d.count.Load() * d.geo.blockSize }

// age ends a period.
func (d *dirt) age() {
	next := d.now.Load() + 1
	d.recent[next&1].clearAll()
	d.now.Store(next)
}

// heat is how recently a block was written: 0 not in this period or the last, 1
// in the last, 2 in this one.
func (d *dirt) heat(block int64) int {
	now := d.now.Load()
	switch {
	case d.recent[now&1].get(block):
		return 2
	case d.recent[(now+1)&1].get(block):
		return 1
	}
	return 0
}

// atomicBitmap is a bit a block, for any number of goroutines.
type atomicBitmap []atomic.Uint64

func newAtomicBitmap(n int64) atomicBitmap { return make(atomicBitmap, (n+63)/64) }

func (m atomicBitmap) get(i int64) bool { return m[i>>6].Load()&(1<<(i&63)) != 0 }

// setRange sets [from, to) and returns how many bits of it were not set.
func (m atomicBitmap) setRange(from, to int64) (fresh int64) {
	for from < to {
		mask, next := wordMask(from, to)
		w := &m[from>>6]
		if w.Load()&mask != mask {
			fresh += int64(bits.OnesCount64(mask &^ w.Or(mask)))
		}
		from = next
	}
	return fresh
}

// clear returns whether the bit was set.
func (m atomicBitmap) clear(i int64) bool {
	w, bit := &m[i>>6], uint64(1)<<(i&63)
	return w.Load()&bit != 0 && w.And(^bit)&bit != 0
}

func (m atomicBitmap) clearAll() {
	for i := range m {
		if m[i].Load() != 0 {
			m[i].Store(0)
		}
	}
}

// each calls f for every bit that is set, ascending.
func (m atomicBitmap) each(f func(i int64)) {
	for w := range m {
		for v := m[w].Load(); v != 0; v &= v - 1 {
			f(int64(w)<<6 + int64(bits.TrailingZeros64(v)))
		}
	}
}
