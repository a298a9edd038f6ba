package lazy

import (
	"context"
	"fmt"
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// Stats is how far a device is.
type Stats struct {
	Size, BlockSize int64 // bytes

	Blocks  int64 // all of them: Fetched + Written + Missing
	Fetched int64 // blocks that came from the source
	Written int64 // blocks that were written here: wholly, or after they had come
	Missing int64 // blocks that are not here
	Partial int64 // blocks of which part was written here and may yet have to be merged

	BytesLocal int64 // bytes of the blocks that are here

	Waiting    int       // calls that wait
	OldestWait time.Time // since when the longest has waited; zero if none does
	WaitOff    int64     // its offset, in bytes

	DemandReads Latency // of what waited for missing blocks and waits no more
	Flushes     Latency // of flushes, the device's own too

	Asked int64 // runs of blocks the sources were asked for with NeedAt

	Attached      bool      // a source is attached
	AttachedSince time.Time // when it was attached, or left; of a new device, when it was made
	LastArrival   time.Time // when something came from a source; zero if nothing has
	Live          bool      // client I/O is let in
	Complete      bool      // the source is not needed any more
}

// Stats says how far the device is. The numbers are of about the same moment.
func (d *Device) Stats() Stats {
	written := d.state.writes.Load() // before local, which is never less
	local := d.state.local.Load()
	st := Stats{
		Size:       d.size,
		BlockSize:  d.blockSize,
		Blocks:     d.state.blocks,
		Fetched:    max(0, local-written),
		Written:    written,
		Missing:    d.state.blocks - local,
		Partial:    d.state.partial.n.Load(),
		BytesLocal: local * d.blockSize,
		Live:       d.isLive.Load(),
		Complete:   d.complete.Load(),
	}
	if last := d.state.blocks - 1; last >= 0 && d.state.isLocal(last) {
		off, end := d.extent(last)
		st.BytesLocal -= d.blockSize - (end - off)
	}
	st.DemandReads, st.Flushes = d.demand.latency(), d.flush.took.latency()
	w := &d.waits
	w.mu.Lock()
	defer w.mu.Unlock()
	st.Waiting = w.waiting
	if w.head != nil {
		st.OldestWait, st.WaitOff = w.head.since, w.head.off
	}
	st.Asked = w.asked
	st.Attached, st.AttachedSince, st.LastArrival = w.cur != nil, w.curSince, w.lastHeard()
	return st
}

// EachLocal calls yield for every run of blocks that are here, ascending, in
// bytes, until it returns false.
func (d *Device) EachLocal(yield func(off, length int64) bool) {
	d.each(d.state.nextLocal, d.state.nextMissing, yield)
}

// EachUnmodified calls yield for every run of blocks that came from the source and were
// not written here since, as EachLocal does. A client may write them meanwhile. Of a
// Revocable device it is not known of which blocks a part was written.
func (d *Device) EachUnmodified(yield func(off, length int64) bool) {
	d.each(d.state.nextUnmodified, d.state.nextModified, yield)
}

// Unmodified reports whether the block at off is one of EachUnmodified.
func (d *Device) Unmodified(off int64) bool {
	block := off / d.blockSize
	return d.state.nextUnmodified(block, block+1) == block
}

// EachMissing calls yield for every run of blocks that are not here, ascending,
// in bytes, until it returns false. Blocks that are partly written here are
// missing.
func (d *Device) EachMissing(yield func(off, length int64) bool) {
	d.each(d.state.nextMissing, d.state.nextLocal, yield)
}

func (d *Device) each(begin, end func(lo, hi int64) int64, yield func(off, length int64) bool) {
	n := d.state.blocks
	for lo := begin(0, n); lo < n; {
		hi := end(lo+1, n) // at least lo, whatever happened since
		off, _ := d.extent(lo)
		_, stop := d.extent(hi - 1)
		if !yield(off, stop-off) {
			return
		}
		lo = begin(hi, n)
	}
}

// The contexts that BlockStatus knows, and their flags.
const (
	ContextAllocation = "base:allocation" // NBD's own
	ContextState      = "silo:state"

	flagData    = 0     // base:allocation: data, or not known to be anything else
	flagHole    = 1 | 2 // base:allocation: a hole, which reads as zeroes
	flagMissing = 0     // silo:state
	flagFetched = 1     // silo:state
	flagWritten = 2     // silo:state
)

// MetaContexts are the names that BlockStatus knows.
func (d *Device) MetaContexts() []string { return []string{ContextAllocation, ContextState} }

// BlockStatus describes [off, off+length) in the named context: it calls yield
// with the length, in bytes, and the flags of each run, ascending, neighbours
// merged, until yield returns false. A missing block is never a hole. It does
// not wait.
func (d *Device) BlockStatus(_ context.Context, name string, off, length int64, yield func(length int64, flags uint32) bool) error {
	if err := storage.CheckRange(off, length, uint64(d.size)); err != nil {
		return err
	}
	extent := d.stateAt
	switch name {
	case ContextState:
	case ContextAllocation:
		extent = d.allocationAt
	default:
		return fmt.Errorf("lazy: no context %q: want %s or %s", name, ContextAllocation, ContextState)
	}
	if !d.ops.enter() {
		return ErrClosed
	}
	defer d.ops.leave()
	end := off + length
	var run int64 // of flags, not yet yielded
	var flags uint32
	for off < end {
		stop, f, err := extent(off, end)
		if err != nil {
			return err
		}
		if f != flags && run > 0 {
			if !yield(run, flags) {
				return nil
			}
			run = 0
		}
		flags = f
		run += stop - off
		off = stop
	}
	if run > 0 {
		yield(run, flags)
	}
	return nil
}

// stateAt is the state of the block at off, and where the block, or [off, end),
// ends.
func (d *Device) stateAt(off, end int64) (stop int64, flags uint32, err error) {
	block := off / d.blockSize
	switch {
	case d.state.written.get(block):
		flags = flagWritten
	case d.state.fetched.get(block):
		flags = flagFetched
	default:
		flags = flagMissing
	}
	_, stop = d.extent(block)
	return min(stop, end), flags, nil
}

// allocationAt says what is at off, and where that, or [off, end), ends.
func (d *Device) allocationAt(off, end int64) (stop int64, flags uint32, err error) {
	lo, hi := d.span(off, end)
	if missing := d.state.nextMissing(lo, hi); missing > lo {
		_, stop = d.extent(missing - 1)
	} else {
		_, stop = d.extent(d.state.nextLocal(lo+1, hi) - 1)
		return min(stop, end), flagData, nil
	}
	stop = min(stop, end)
	e, ok := d.disk.(storage.Extenter)
	if !ok || d.revocable && !d.sealed.Load() { // a block may be taken back while we look
		return stop, flagData, nil
	}
	limit, hole, err := e.ExtentAt(off)
	if err != nil {
		return 0, 0, fmt.Errorf("lazy: extents at %d: %w", off, err)
	}
	if limit <= off { // it does not know
		return stop, flagData, nil
	}
	if hole {
		flags = flagHole
	}
	return min(stop, limit), flags, nil
}
