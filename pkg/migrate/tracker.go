package migrate

import (
	"context"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// ErrHandedOff says that the disk belongs to the destination now. It is
// ESHUTDOWN to an NBD client.
var ErrHandedOff = fmt.Errorf("migrate: the disk was handed off to the destination, which serves it now: %w", syscall.ESHUTDOWN)

// Device is the UUID of a destination's device.
type Device = [16]byte

// Tracker is the disk of a live source: the virtual machine reads and writes it
// here while it moves. It is a backend for package nbdexport, and all its
// methods may be called from any number of goroutines.
//
// Nothing is remembered until a Source begins to move the disk. Until then a
// read costs one atomic load more than the bare disk, and a write its two
// counts: those in flight are known at any time, since the handoff waits for
// them.
type Tracker struct {
	store storage.StorageProvider
	zero  storage.Zeroer   // nil: zeroes are written
	trim  storage.Trimmer  // nil: it is not told
	ext   storage.Extenter // nil: it knows no holes
	size  int64

	onWait func(ctx context.Context) (over func()) // TrackerOptions.Waiting; may be nil

	gate   atomic.Int32         // gateServing and so on; changed under mu
	writes atomic.Int64         // in flight
	dirt   atomic.Pointer[dirt] // nil: nothing is remembered

	drained chan struct{} // capacity 1: no write may be in flight
	changes *Changes      // outlives the process; nil: there is none

	mu sync.Mutex
	// Guarded by mu:
	opened chan struct{} // closed when the present hold ends; nil: none
	owner  Device        // to whom the disk was handed off

	record peerRecord // for which destination it is known what has changed since it was sent there
}

const (
	gateServing   = iota
	gateHeld      // new writes wait
	gateHandedOff // no I/O
)

// TrackerOptions say what is known of the disk; the zero value is one that is
// ours.
type TrackerOptions struct {
	// HandedOff says that the disk was handed off, by an earlier process: every
	// request is refused.
	HandedOff bool
	// Owner is the destination's device that it was handed off to.
	Owner Device
	// Changes outlives the process: where it was kept, what changes is remembered from
	// the beginning. It is the caller's to close, when nobody writes the disk any more.
	// nil: what was copied is of no use to a source that is started again.
	Changes *Changes
	// Waiting is told of calls that wait for the end of a handoff: see lazy.Options.
	Waiting func(ctx context.Context) (over func())
}

// NewTracker returns a Tracker for store, which stays the caller's to close.
// From then on nobody writes store but through the Tracker.
func NewTracker(store storage.StorageProvider, o TrackerOptions) (*Tracker, error) {
	if store.Size() > math.MaxInt64 {
		return nil, fmt.Errorf("migrate: disk of %d bytes: want less than 8 EiB", store.Size())
	}
	t := &Tracker{store: store, size: int64(store.Size()), owner: o.Owner, onWait: o.Waiting, drained: make(chan struct{}, 1)}
	t.zero, _ = store.(storage.Zeroer)
	t.trim, _ = store.(storage.Trimmer)
	t.ext, _ = store.(storage.Extenter)
	if o.HandedOff {
		t.gate.Store(gateHandedOff)
	} else if t.changes = o.Changes; t.changes != nil {
		if t.changes.kept {
			t.dirt.Store(t.changes.dirt())
			t.record.last = t.changes.peer()
		}
		t.record.keep = t.changes.put
	}
	return t, nil
}

// goesOn reports whether an earlier process has left which blocks have changed.
func (t *Tracker) goesOn() bool { return t.changes != nil && t.changes.kept }

// HandedOff says that the disk belongs to the destination.
func (t *Tracker) HandedOff() bool { return t.gate.Load() == gateHandedOff }

// Size is the number of bytes of the disk. The error is always nil.
func (t *Tracker) Size() (int64, error) { return t.size, nil }

// ReadAt reads the disk, also while writes are held.
func (t *Tracker) ReadAt(p []byte, off int64) (int, error) {
	if t.HandedOff() {
		return 0, ErrHandedOff
	}
	return t.store.ReadAt(p, off)
}

// WriteAt is WriteAtContext with nothing to cancel it.
func (t *Tracker) WriteAt(p []byte, off int64) (int, error) {
	return t.WriteAtContext(context.Background(), p, off)
}

// WriteAtContext writes all of p at off. During a handoff it waits: it goes on
// if that comes to nothing, and fails with ErrHandedOff if not.
func (t *Tracker) WriteAtContext(ctx context.Context, p []byte, off int64) (n int, err error) {
	err = t.change(ctx, off, int64(len(p)), func() error {
		n, err = t.store.WriteAt(p, off)
		return err
	})
	return n, err
}

// ZeroAtContext makes [off, off+length) read as zeroes; with punch the space may
// be given back. It waits as WriteAtContext does.
func (t *Tracker) ZeroAtContext(ctx context.Context, off, length int64, punch bool) error {
	return t.change(ctx, off, length, func() error {
		if t.zero == nil {
			return t.writeZeroes(ctx, off, length)
		}
		if err := storage.CheckRange(off, length, uint64(t.size)); err != nil {
			return err
		}
		return eachChunk(ctx, off, length, func(off, length int64) error { return t.zero.ZeroAt(off, length, punch) })
	})
}

// zeroChunk is how much is zeroed or trimmed, in bytes, between two looks at whether
// the client is still there.
const zeroChunk = 32 << 20

// eachChunk calls do for the pieces of a range until it fails or ctx ends. A range
// that is not on the disk is do's to refuse.
func eachChunk(ctx context.Context, off, length int64, do func(off, length int64) error) error {
	for length > zeroChunk {
		if err := do(off, zeroChunk); err != nil {
			return err
		}
		off, length = off+zeroChunk, length-zeroChunk
		if ctx.Err() != nil {
			return fmt.Errorf("migrate: given up: %w", context.Cause(ctx))
		}
	}
	return do(off, length)
}

func (t *Tracker) writeZeroes(ctx context.Context, off, length int64) error {
	if err := storage.CheckRange(off, length, uint64(t.size)); err != nil {
		return err
	}
	b := make([]byte, min(length, maxPacket))
	for length > 0 {
		if ctx.Err() != nil {
			return fmt.Errorf("migrate: given up: %w", context.Cause(ctx))
		}
		n := min(length, int64(len(b)))
		if _, err := t.store.WriteAt(b[:n], off); err != nil {
			return err
		}
		off, length = off+n, length-n
	}
	return nil
}

// TrimAtContext gives the space of [off, off+length) back, where the disk can.
// It waits as WriteAtContext does.
func (t *Tracker) TrimAtContext(ctx context.Context, off, length int64) error {
	return t.change(ctx, off, length, func() error {
		if err := storage.CheckRange(off, length, uint64(t.size)); err != nil || t.trim == nil {
			return err
		}
		return eachChunk(ctx, off, length, t.trim.TrimAt)
	})
}

// Sync returns when every write that was answered before is on stable storage.
func (t *Tracker) Sync() error {
	if t.HandedOff() {
		return ErrHandedOff
	}
	return t.store.Flush()
}

// change does something that changes [off, off+length) of the disk, whether it
// says so or fails.
func (t *Tracker) change(ctx context.Context, off, length int64, do func() error) error {
	if err := t.enter(ctx); err != nil {
		return err
	}
	defer t.leave()
	if d := t.dirt.Load(); d != nil {
		d.mark(off, length)
	}
	t.changes.begins()
	err := do()
	t.changes.ends()
	// Once more, and with what is remembered by now: see dirt.
	if d := t.dirt.Load(); d != nil {
		d.mark(off, length)
		d.written.Add(length)
	}
	return err
}

// enter counts a write as in flight, when its time has come.
func (t *Tracker) enter(ctx context.Context) error {
	for {
		t.writes.Add(1) // before the look at the gate: see hold
		switch t.gate.Load() {
		case gateServing:
			return nil
		case gateHandedOff:
			t.leave()
			return ErrHandedOff
		}
		t.leave()
		if err := t.await(ctx); err != nil {
			return err
		}
	}
}

func (t *Tracker) leave() {
	if t.writes.Add(-1) == 0 && t.gate.Load() != gateServing {
		notify(t.drained)
	}
}

// await waits for the end of the present hold.
func (t *Tracker) await(ctx context.Context) error {
	t.mu.Lock()
	opened := t.opened
	t.mu.Unlock()
	if opened == nil {
		return nil
	}
	if t.onWait != nil {
		defer t.onWait(ctx)()
	}
	select {
	case <-opened:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// hold makes new writes wait, and returns when none is in flight. A write
// counts itself and then looks at the gate, this shuts the gate and then looks
// at the count: one of them sees the other (trap M2). After an error, too, the
// writes wait until release or give.
func (t *Tracker) hold(ctx context.Context) error {
	t.mu.Lock()
	if t.gate.Load() == gateServing {
		t.gate.Store(gateHeld)
		t.opened = make(chan struct{})
	}
	t.mu.Unlock()
	for t.writes.Load() != 0 {
		select {
		case <-t.drained:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// release lets the writes that were held go on.
func (t *Tracker) release() { t.open(gateServing) }

// give refuses every request from now on: the disk belongs to owner.
func (t *Tracker) give(owner Device) {
	t.mu.Lock()
	t.owner = owner
	t.mu.Unlock()
	t.open(gateHandedOff)
	t.changes.invalidate()
}

func (t *Tracker) open(gate int32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.gate.Load() == gateHandedOff {
		return // for good
	}
	t.gate.Store(gate)
	if t.opened != nil {
		close(t.opened)
		t.opened = nil
	}
}

// track begins to remember what is written, if that has not begun, and returns
// where. Nothing that is read after it returns can be out of date without being
// dirty: a write that is not remembered has reached the disk by now, or will be
// when it has.
func (t *Tracker) track(geo geometry) *dirt {
	d := t.dirt.Load()
	switch {
	case d != nil && d.geo == geo:
		return d
	case d != nil: // what was left is in other blocks
		fresh := newDirt(geo)
		t.dirt.Store(fresh)
		fresh.markAll()
		t.changes.invalidate()
		return fresh
	case t.changes == nil || t.changes.geo != geo:
		t.dirt.CompareAndSwap(nil, newDirt(geo))
	case t.dirt.CompareAndSwap(nil, t.changes.dirt()):
		t.changes.validate()
	}
	return t.dirt.Load()
}

// markAll makes all of the disk dirty.
func (t *Tracker) markAll() {
	if d := t.dirt.Load(); d != nil {
		d.markAll()
	}
}

func (t *Tracker) handedTo() Device {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.owner
}

// The names and flags of NBD's own context.
const (
	contextAllocation = "base:allocation"
	flagHole          = 1 | 2 // a hole, which reads as zeroes
)

// MetaContexts are the names that BlockStatus knows.
func (t *Tracker) MetaContexts() []string {
	if t.ext == nil {
		return nil
	}
	return []string{contextAllocation}
}

// BlockStatus yields the runs of data and holes of [off, off+length), ascending
// and in bytes, until yield returns false.
func (t *Tracker) BlockStatus(_ context.Context, name string, off, length int64, yield func(length int64, flags uint32) bool) error {
	if t.HandedOff() {
		return ErrHandedOff
	}
	if err := storage.CheckRange(off, length, uint64(t.size)); err != nil {
		return err
	}
	if t.ext == nil || name != contextAllocation {
		return fmt.Errorf("migrate: no context %q", name)
	}
	for end := off + length; off < end; {
		stop, hole, err := t.ext.ExtentAt(off)
		if err != nil {
			return fmt.Errorf("migrate: extents at %d: %w", off, err)
		}
		if stop <= off { // it does not know
			stop, hole = end, false
		}
		flags := uint32(0)
		if hole {
			flags = flagHole
		}
		if stop = min(stop, end); !yield(stop-off, flags) {
			return nil
		}
		off = stop
	}
	return nil
}
