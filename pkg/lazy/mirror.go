package lazy

import (
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/silo-nbd/silo-nbd/pkg/storage/bootfile"
)

// What a process has written lives on in the page cache when the process is killed,
// and is gone after a power cut. The bits and masks that say so must live exactly as
// long: else a process that is started again lays the source's bytes, or its own
// log, over newer writes that clients were answered for. So every bit and mask is
// stored twice, in memory of the process and in memory that lives as long as the
// boot. A bit is in the mirror before it is seen, and so before anything is answered
// that rests on it.
//
// The mirror belongs to one state of one map: to its file, and to the number of its
// last save, which is in its header and which every change of the map but the log
// raises while there is a mirror. A map that was put back from a backup, a copy of it, and a mirror that a process without
// one has left behind do not go together, and the mirror is not believed.

// mirrorVersion is that of the layout below.
const mirrorVersion = 1

// Words of the first page of a mirror.
const (
	mirrorLow    = iota // the number of the map's last save is at least this one
	mirrorHigh          // and at most this one: it is being saved
	mirrorFailed        // not 0: a sync of the disk or the map has failed
	mirrorBlocks        // of the device
	mirrorBlockSize
	mirrorDev // of the map's file
	mirrorInode
	mirrorSlots // so many slots for masks have been in use
	mirrorWords
)

// maxMirrored is how large the bits of a mirror may be, in bytes. They take memory,
// all of it at once.
const maxMirrored = 64 << 20

// slotChunk is how much space for masks is taken at once, in bytes.
const slotChunk = 64 << 10

// memory is memory that lives as long as the boot. See bootfile.File.
type memory interface {
	Kept() bool
	Bytes() []byte
	Reserve(off, length int64) error
	Validate()
	Invalidate()
	Forget() error
	Close() error
}

// mirror is the second place of a device's state. All methods of a nil mirror do
// nothing.
type mirror struct {
	mem  memory
	log  *slog.Logger
	head []atomic.Uint64

	fetched, written bitmap

	masks     int64           // where the slots begin in the memory, in bytes
	maskWords int64           // of a slot, behind the word that says whose it is
	slots     []atomic.Uint64 // of all slots; only those below reserved may be touched

	broken atomic.Bool // it does not count any more

	mu sync.Mutex
	// Guarded by mu:
	free     []int64 // slots that were in use
	used     int64   // slots that have been in use
	reserved int64   // bytes of the slots for which space was taken
}

// openMemory opens the memory of the mirror of a device, or says why there is none.
func (o Options) openMemory(name string, size int64) (memory, error) {
	if o.boot != nil {
		return o.boot(size)
	}
	f, err := bootfile.Open(o.RunDir, name, mirrorVersion, size)
	if err != nil {
		return nil, err
	}
	return f, nil
}

func mirrorName(device UUID) string { return device.String() + ".dest" }

// openMirror opens the mirror of the device that a map is for. kept reports whether
// it is that of a process before, and belongs to this state of the map; failed that
// this process has seen a sync fail. What does not belong is replaced by an empty
// mirror, which counts from Validate on.
func (d *Device) openMirror(m *Map, o Options) (r *mirror, kept, failed bool, err error) {
	l := m.layout
	if bits := 2 * l.pages * pageSize; bits > maxMirrored {
		return nil, false, false, fmt.Errorf("its bits would take %d MiB of memory, and at most %d are taken: choose larger blocks", bits>>20, maxMirrored>>20)
	}
	masks := min(maskLimit(o.MaskMemory, l.maskWords()), d.state.blocks)
	size := (1+2*l.pages)*pageSize + bitPages(masks*int64(1+l.maskWords())*64)*pageSize
	for range 2 {
		mem, err := o.openMemory(mirrorName(m.header().id.Device), size)
		if err != nil {
			return nil, false, failed, err
		}
		if r, err = newMirror(mem, l, d.log); err != nil {
			return nil, false, failed, errors.Join(err, mem.Close())
		}
		if !mem.Kept() {
			r.begin(m)
			return r, false, failed, nil
		}
		failed = r.head[mirrorFailed].Load() != 0
		if !failed && m.header().flags&flagFailed == 0 && r.belongs(m) {
			if err = r.takeSlots(); err == nil {
				return r, true, false, nil
			}
		}
		d.log.Warn("what an earlier process of this boot has left does not belong to this state of the map, and is not believed: what was written and not flushed may be lost, as after a power cut",
			"map", m.path, "failed", failed)
		if failed { // the map has to know it before the mirror is gone
			if err := m.update(func(h *header) { h.flags |= flagFailed }); err != nil {
				return nil, false, failed, errors.Join(err, mem.Close())
			}
		}
		if err := errors.Join(mem.Forget(), mem.Close()); err != nil {
			return nil, false, failed, err
		}
	}
	return nil, false, failed, errors.New("what an earlier process has left cannot be removed")
}

// newMirror lays a mirror out over memory.
func newMirror(mem memory, l layout, log *slog.Logger) (*mirror, error) {
	fixed := (1 + 2*l.pages) * pageSize
	if err := mem.Reserve(0, fixed); err != nil {
		return nil, err
	}
	words := bootfile.Words(mem.Bytes())
	region := l.pages * pageSize / 8
	return &mirror{
		mem: mem, log: log, head: words[:mirrorWords],
		fetched: words[pageSize/8:][:region], written: words[pageSize/8+region:][:region],
		masks: fixed, maskWords: int64(l.maskWords()), slots: words[fixed/8:],
	}, nil
}

// begin makes a new mirror that of a map.
func (r *mirror) begin(m *Map) {
	h := m.header()
	dev, inode := m.inode()
	for i, v := range map[int]uint64{
		mirrorLow: h.save, mirrorHigh: h.save, mirrorDev: dev, mirrorInode: inode,
		mirrorBlocks: uint64(m.layout.blocks), mirrorBlockSize: uint64(h.id.BlockSize),
	} {
		r.head[i].Store(v)
	}
}

// belongs reports whether the mirror was kept beside this state of the map.
func (r *mirror) belongs(m *Map) bool {
	h := m.header()
	dev, inode := m.inode()
	return r.head[mirrorLow].Load() <= h.save && h.save <= r.head[mirrorHigh].Load() &&
		r.head[mirrorDev].Load() == dev && r.head[mirrorInode].Load() == inode &&
		r.head[mirrorBlocks].Load() == uint64(m.layout.blocks) && r.head[mirrorBlockSize].Load() == uint64(h.id.BlockSize) &&
		r.fetched.inside(m.layout.blocks) && r.written.inside(m.layout.blocks)
}

// inode is which file the map is, as far as it is one.
func (m *Map) inode() (dev, inode uint64) {
	if f, ok := m.file.(interface{ inode() (dev, inode uint64) }); ok {
		return f.inode()
	}
	return 0, 0
}

// expect notes that the map is about to have a save of this number, reached that it
// has.
func (r *mirror) expect(save uint64) {
	if r != nil {
		r.head[mirrorHigh].Store(save)
	}
}

func (r *mirror) reached(save uint64) {
	if r != nil {
		r.head[mirrorLow].Store(save)
	}
}

// failed notes that a sync has failed.
func (r *mirror) failed() {
	if r != nil {
		r.head[mirrorFailed].Store(1)
	}
}

// setFetched and setWritten come before the bits of word w are set in the state.
func (r *mirror) setFetched(w int64, mask uint64) {
	if r != nil && r.fetched[w].Load()&mask != mask {
		r.fetched[w].Or(mask)
	}
}

func (r *mirror) setWritten(w int64, mask uint64) {
	if r != nil && r.written[w].Load()&mask != mask {
		r.written[w].Or(mask)
	}
}

// clearFetched comes when the bits of word w were cleared in the state.
func (r *mirror) clearFetched(w int64, mask uint64) {
	if r != nil {
		r.fetched[w].And(^mask)
	}
}

// slot is the words of a slot: the first is the number of the block, plus one, or 0
// while the slot is free.
func (r *mirror) slot(n int64) []atomic.Uint64 {
	return r.slots[n*(1+r.maskWords):][:1+r.maskWords]
}

// noSlot is the slot of a mask that has none.
const noSlot = -1

// putMask comes before sectors [lo, hi) of the block are added to its mask, which
// is old by now and lies in slot n, or in none. It returns where it lies.
func (r *mirror) putMask(n, block int64, old mask, lo, hi int64) int64 {
	if r == nil || r.broken.Load() {
		return n
	}
	fresh := n == noSlot
	if fresh {
		var err error
		if n, err = r.takeSlot(); err != nil {
			r.fail(err)
			return noSlot
		}
		for w, v := range old {
			r.slot(n)[1+w].Store(v)
		}
		for w := int64(len(old)); w < r.maskWords; w++ { // the last block may be short
			r.slot(n)[1+w].Store(0)
		}
	}
	s := r.slot(n)
	for w := lo >> 6; w<<6 < hi; w++ {
		s[1+w].Or(wordMask(w, lo, hi))
	}
	if fresh {
		s[0].Store(uint64(block) + 1) // last: a slot that has an owner is whole
	}
	return n
}

// takeSlot finds a free slot, and takes space for it.
func (r *mirror) takeSlot() (int64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if k := len(r.free); k > 0 {
		n := r.free[k-1]
		r.free = r.free[:k-1]
		return n, nil
	}
	size := 8 * (1 + r.maskWords)
	if (r.used+1)*size > int64(len(r.slots))*8 {
		return noSlot, errors.New("there are more blocks that were written in part than it has room for")
	}
	if err := r.reserveLocked((r.used + 1) * size); err != nil {
		return noSlot, err
	}
	r.used++
	r.head[mirrorSlots].Store(uint64(r.used))
	return r.used - 1, nil
}

// reserveLocked takes space for so many bytes of the slots.
func (r *mirror) reserveLocked(need int64) error {
	if need <= r.reserved {
		return nil
	}
	up := min((need+slotChunk-1)&^(slotChunk-1), int64(len(r.slots))*8)
	if err := r.mem.Reserve(r.masks+r.reserved, up-r.reserved); err != nil {
		return err
	}
	r.reserved = up
	return nil
}

// takeSlots takes the slots that a process before has used.
func (r *mirror) takeSlots() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	used := r.head[mirrorSlots].Load()
	size := 8 * (1 + r.maskWords)
	if used > uint64(int64(len(r.slots))*8/size) {
		return fmt.Errorf("%d slots of %d bytes", used, size)
	}
	r.used = int64(used)
	return r.reserveLocked(r.used * size)
}

// freeMask gives a slot back: the block is local by now.
func (r *mirror) freeMask(n int64) {
	if r == nil || n == noSlot {
		return
	}
	r.slot(n)[0].Store(0)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.free = append(r.free, n)
}

// validate has the mirror count from now on.
func (r *mirror) validate() {
	if r != nil && !r.broken.Load() {
		r.mem.Validate()
	}
}

// fail gives the mirror up.
func (r *mirror) fail(err error) {
	if r.broken.Swap(true) {
		return
	}
	r.mem.Invalidate()
	r.log.Warn(noMirror, "error", err)
}

// noMirror is what a device without a mirror means to its user.
const noMirror = "what is written and not flushed would not outlive a kill of this process (kill -9, no memory), as after a power cut: there is no place that lives as long as the boot"

// forget gives the mirror up, which is not needed any more.
func (r *mirror) forget() {
	if r == nil || r.broken.Swap(true) {
		return
	}
	if err := r.mem.Forget(); err != nil {
		r.log.Warn("a file that is not needed any more was not removed; it goes with the next boot", "error", err)
	}
}

// close gives the memory back. Nothing may use the mirror any more.
func (r *mirror) close() error {
	if r == nil {
		return nil
	}
	return r.mem.Close()
}

// join adds what the mirror of a process before has to the state that was read from
// the map.
func (r *mirror) join(s *state, sectors func(block int64) int64, settled func(block int64) bool) {
	for w := range s.fetched {
		eachRun(r.fetched[w].Load()&^s.fetched[w].Load(), int64(w)<<6, s.setFetched)
		eachRun(r.written[w].Load()&^s.written[w].Load(), int64(w)<<6, s.setWritten)
	}
	for n := range r.used {
		slot := r.slot(n)
		tag := slot[0].Load()
		if tag == 0 || tag > uint64(s.blocks) || settled(int64(tag-1)) {
			r.freeMask(n)
			continue
		}
		block := int64(tag - 1)
		words := make(mask, r.maskWords)
		for w := range words {
			words[w] = slot[1+w].Load()
		}
		if s.partial.join(block, words, sectors(block), n) {
			s.setWritten(block, block+1)
			s.partial.drop(block, block+1)
		}
	}
}

// eachRun calls f for every run of bits that are set in v, which begins at first.
func eachRun(v uint64, first int64, f func(lo, hi int64)) {
	for v != 0 {
		lo := int64(bits.TrailingZeros64(v))
		hi := lo + int64(bits.TrailingZeros64(^(v >> lo)))
		v &^= wordMask(0, lo, hi)
		f(first+lo, first+hi)
	}
}

// inside reports whether no bit is set for a block that the device has not.
func (m bitmap) inside(blocks int64) bool {
	for w := blocks >> 6; w < int64(len(m)); w++ {
		if m[w].Load()&^wordMask(w, 0, max(blocks, w<<6)) != 0 {
			return false
		}
	}
	return true
}

// takeMirror opens the mirror of a device whose map is read, if one is wanted. kept
// reports whether it is that of a process before and counts; failed that a sync has
// failed in that process, as the mirror or the map knows. A device without a mirror
// works, and says what that means.
func (d *Device) takeMirror(m *Map, o Options) (kept, failed bool) {
	failed = m.header().flags&flagFailed != 0
	if o.boot == nil && o.RunDir == "" || m.State() == MapComplete {
		return false, failed
	}
	r, kept, saw, err := d.openMirror(m, o)
	failed = failed || saw
	if err != nil {
		d.log.Warn(noMirror, "error", err)
		return false, failed
	}
	m.mirror, d.state.mirror, d.state.partial.mirror = r, r, r
	return kept, failed
}

// joinMirror takes what the mirror of a process before has.
func (d *Device) joinMirror(revocable bool) {
	settled := d.state.isLocal
	if revocable {
		settled = d.state.written.get
	}
	d.state.mirror.join(d.state, func(block int64) int64 {
		off, end := d.extent(block)
		_, _, count := d.sectors(block, off, end)
		return count
	}, settled)
}

// forgetMirror removes what a device that is complete may have left.
func forgetMirror(m *Map, o Options, log *slog.Logger) {
	if o.RunDir == "" {
		return
	}
	if err := bootfile.Remove(o.RunDir, mirrorName(m.header().id.Device)); err != nil {
		log.Warn("a file that is not needed any more was not removed; it goes with the next boot", "error", err)
	}
}
