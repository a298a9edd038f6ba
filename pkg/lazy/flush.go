package lazy

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
)

// flusher makes the disk's flushes one at a time, so that one flush answers
// everybody who asked before it began, and so that a failure is known to every
// flush that begins after it: the kernel tells it only once.
type flusher struct {
	turn chan struct{} // capacity 1: held by whoever flushes

	mu sync.Mutex
	// Guarded by mu:
	begun  uint64 // flushes that have begun
	ended  uint64 // the last flush that has ended well
	failed error  // the first failure; it is final

	broken atomic.Bool // failed is set
}

func newFlusher() *flusher { return &flusher{turn: make(chan struct{}, 1)} }

// flush returns when every write that was answered before the call is on stable
// storage. It does not look at whether the device is closed.
func (f *flusher) flush(ctx context.Context, d *Device) error {
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
	f.mu.Unlock()

	err := d.disk.Flush()

	f.mu.Lock()
	defer f.mu.Unlock()
	if err != nil {
		// The kernel may have dropped what it could not write, so no retry can
		// make it good: nothing is acknowledged from here on.
		f.failed = fmt.Errorf("lazy: the disk failed a flush, and no later write or flush can be trusted: %w", err)
		f.broken.Store(true)
		d.direct.Store(false)
		return f.failed
	}
	f.ended = f.begun
	return nil
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
