package lazy

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// flusher makes the flushes of the disk and its map, so that one flush answers
// everybody who asked before it began, and so that a failure is known to every
// flush that begins after it: the kernel tells it only once. While the map of one
// is written, the disk is flushed for the next; the order stays what it is. A
// small flush of a client is one of the map only, by its log.
type flusher struct {
	disk chan struct{} // capacity 1: held by whoever flushes the disk, until it has the map's turn
	maps chan struct{} // capacity 1: held by whoever writes the map

	mu sync.Mutex
	// Guarded by mu:
	begun  uint64 // rounds that have begun
	last   *round // that began last, or nil
	failed error  // the first failure; it is final

	broken atomic.Bool // failed is set

	took histogram // of every flush, with its wait for its turn
}

// round is one flush of the disk and its map.
type round struct {
	number uint64
	full   bool          // covers what has arrived, too
	before *round        // one that was not at its end when this one began, or nil
	ended  chan struct{} // closed after err is set
	err    error
}

func (r *round) end(err error) {
	r.err, r.before = err, nil
	close(r.ended)
}

func (r *round) running() bool {
	select {
	case <-r.ended:
		return false
	default:
		return true
	}
}

func newFlusher() *flusher {
	return &flusher{disk: make(chan struct{}, 1), maps: make(chan struct{}, 1)}
}

// flush returns when every write of a client that was answered before the call is
// on stable storage, and the map says so; with full also what has arrived. It does
// not look at whether the device is closed.
func (f *flusher) flush(ctx context.Context, d *Device, full bool) error {
	began := time.Now()
	defer func() { f.took.observe(time.Since(began)) }()
	f.mu.Lock()
	need := f.begun + 1 // the next to begin covers all that was answered by now
	f.mu.Unlock()
	select {
	case f.disk <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("lazy: flush: %w", context.Cause(ctx))
	}
	r, err := f.begunSince(need, full)
	if err != nil {
		<-f.disk
		return err
	}
	if r != nil {
		<-f.disk
		select {
		case <-r.ended:
			return r.err
		case <-ctx.Done():
			return fmt.Errorf("lazy: flush: %w", context.Cause(ctx))
		}
	}
	// One that can be logged has nothing to do until the map can be written: until
	// then others join it.
	both := !full && !d.capture.spoiled.Load()
	if both {
		select {
		case f.maps <- struct{}{}:
		case <-ctx.Done():
			<-f.disk
			return fmt.Errorf("lazy: flush: %w", context.Cause(ctx))
		}
	}
	if r, err = f.begin(full); err != nil { // since we looked
		if both {
			<-f.maps
		}
		<-f.disk
		return err
	}
	f.run(d, r, both)
	return r.err
}

// begunSince returns the round that answers who needs one of that number, or nil
// if it has not begun. The disk's turn is held.
func (f *flusher) begunSince(need uint64, full bool) (*round, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failed != nil || f.last == nil || f.last.number < need || full && !f.last.full {
		return nil, f.failed
	}
	return f.last, nil
}

// begin begins a round. The disk's turn is held.
func (f *flusher) begin(full bool) (*round, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failed != nil {
		return nil, f.failed
	}
	f.begun++
	r := &round{number: f.begun, full: full, ended: make(chan struct{})}
	if f.last != nil && f.last.running() {
		r.before = f.last
	}
	f.last = r
	return r, nil
}

// run makes a round, and gives back the disk's turn, and with both the map's.
func (f *flusher) run(d *Device, r *round, both bool) {
	if both {
		defer f.leaveMap(d)
		if b, ok := d.logged(); ok {
			<-f.disk
			r.end(f.final(d, d.saver.log(b)))
			return
		}
	}
	snap, err := d.flushDisk()
	if err != nil {
		r.end(f.fail(d, err))
		<-f.disk
		if !both {
			f.mark(d)
		}
		return
	}
	if !both {
		f.maps <- struct{}{}
		defer f.leaveMap(d)
	}
	<-f.disk
	if r.before != nil && r.before.err != nil {
		// It has put back what it could not write, and some of that may be of
		// writes that this round answers for.
		d.saver.giveUp(snap)
		r.end(r.before.err)
		return
	}
	r.end(f.final(d, d.saver.save(snap)))
}

// leaveMap gives the map's turn back.
func (f *flusher) leaveMap(d *Device) {
	<-f.maps
	if f.broken.Load() {
		f.mark(d)
	}
}

// mark has the map say that a sync has failed. It does not wait for the map's turn:
// who has it marks the map, too, when it gives the turn back.
func (f *flusher) mark(d *Device) {
	select {
	case f.maps <- struct{}{}:
		d.markFailed()
		<-f.maps
	default:
	}
}

// final notes a failure that is not only for want of room.
func (f *flusher) final(d *Device, err error) error {
	var room *roomError
	if err != nil && !errors.As(err, &room) {
		return f.fail(d, err)
	}
	return err
}

// alone does something to the map while nobody flushes. If it fails, that is
// final, too, unless it says that it is only for want of room.
func (f *flusher) alone(d *Device, do func() error) error {
	f.disk <- struct{}{}
	defer func() { <-f.disk }()
	f.maps <- struct{}{}
	defer f.leaveMap(d)
	if err := f.failure(); err != nil {
		return err
	}
	return f.final(d, do())
}

// aloneOnMap is alone for what need not wait for a flush of the disk.
func (f *flusher) aloneOnMap(d *Device, do func() error) error {
	f.maps <- struct{}{}
	defer f.leaveMap(d)
	if err := f.failure(); err != nil {
		return err
	}
	return f.final(d, do())
}

// fail notes that the disk or the map failed. The kernel may have dropped what it
// could not write, so no retry can make it good: nothing is acknowledged from
// here on.
func (f *flusher) fail(d *Device, err error) error {
	d.state.mirror.failed()
	err = &finalError{fmt.Errorf("lazy: nothing that is written from here on can be trusted: %w", err)}
	d.log.Error("the disk or its map has failed: no later write or flush is taken; reads of what is here go on", "error", err)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failed == nil {
		f.failed = err
	}
	f.broken.Store(true)
	d.direct.Store(false)
	return err
}

// failure is why nothing may be acknowledged any more, or nil.
func (f *flusher) failure() error {
	if !f.broken.Load() {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.failed
}
