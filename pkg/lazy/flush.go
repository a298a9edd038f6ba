package lazy

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// flusher makes the flushes of the disk and its map one at a time, so that one
// flush answers everybody who asked before it began, and so that a failure is
// known to every flush that begins after it: the kernel tells it only once.
type flusher struct {
	turn chan struct{} // capacity 1: held by whoever flushes, or writes the map

	mu sync.Mutex
	// Guarded by mu:
	begun  uint64 // flushes that have begun
	ended  uint64 // the last flush that has ended well
	failed error  // the first failure; it is final

	broken atomic.Bool // failed is set

	took histogram // of every flush, with its wait for its turn
}

func newFlusher() *flusher { return &flusher{turn: make(chan struct{}, 1)} }

// flush returns when every write that was answered before the call is on stable
// storage, and the map says so. It does not look at whether the device is closed.
func (f *flusher) flush(ctx context.Context, d *Device) error {
	began := time.Now()
	defer func() { f.took.observe(time.Since(began)) }()
	f.mu.Lock()
	need := f.begun + 1 // the next to begin covers all that was answered by now
	f.mu.Unlock()
	select {
	case f.turn <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("lazy: flush: %w", context.Cause(ctx))
	}
	defer func() { <-f.turn }()

	f.mu.Lock()
	if f.failed != nil || f.ended >= need {
		defer f.mu.Unlock()
		return f.failed
	}
	f.begun++
	begun := f.begun
	f.mu.Unlock()

	err := d.commit()
	var room *roomError
	if err != nil && !errors.As(err, &room) {
		return f.fail(d, err)
	}
	if err == nil {
		f.mu.Lock()
		f.ended = begun
		f.mu.Unlock()
	}
	return err
}

// alone does something to the map while nobody flushes. If it fails, that is
// final, too, unless it says that it is only for want of room.
func (f *flusher) alone(d *Device, do func() error) error {
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	if err := f.failure(); err != nil {
		return err
	}
	err := do()
	var room *roomError
	if err != nil && !errors.As(err, &room) {
		return f.fail(d, err)
	}
	if err != nil {
		return err
	}
	return nil
}

// fail notes that the disk or the map failed. The kernel may have dropped what it
// could not write, so no retry can make it good: nothing is acknowledged from
// here on.
func (f *flusher) fail(d *Device, err error) error {
	err = &finalError{fmt.Errorf("lazy: nothing that is written from here on can be trusted: %w", err)}
	d.log.Error("the disk or its map has failed: no later write or flush is taken; reads of what is here go on", "error", err)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failed = err
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
