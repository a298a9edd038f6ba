package nbdexport

import (
	"context"
	"sync"
	"time"
)

// disk is a backend that can do everything, and that a test can make wait and
// fail. Below missing it has its data; from there on a read waits.
type disk struct {
	*memory
	contexts []string
	status   func(name string, off, length int64, yield func(int64, uint32) bool) error
	slowZero bool
	entered  chan struct{} // takes one for each write that has come to the gate

	mu sync.Mutex
	// Guarded by mu:
	missing  int64 // where the missing part begins; 0 for none
	here     chan struct{}
	gate     chan struct{} // writes wait for it, without asking their context
	fail     error         // of the next operation that can fail
	calls    []string
	prefetch [][2]int64
}

func newDisk(size int) *disk {
	return &disk{memory: newMemory(size), contexts: []string{contextAllocation, "silo:state"}, here: make(chan struct{}),
		entered: make(chan struct{}, 1000)}
}

// arrive makes what is missing be here.
func (d *disk) arrive() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.missing = 0
	close(d.here)
}

func (d *disk) call(name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls = append(d.calls, name)
	err := d.fail
	d.fail = nil
	return err
}

func (d *disk) called() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]string(nil), d.calls...)
}

func (d *disk) failNext(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fail = err
}

func (d *disk) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if err := d.call("read"); err != nil {
		return 0, err
	}
	d.mu.Lock()
	waits, here := d.missing > 0 && off+int64(len(p)) > d.missing, d.here
	d.mu.Unlock()
	if waits {
		defer Waiting(ctx)()
		select {
		case <-here:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
	return d.ReadAt(p, off)
}

func (d *disk) WriteAtContext(_ context.Context, p []byte, off int64) (int, error) {
	d.mu.Lock()
	gate := d.gate
	d.mu.Unlock()
	if gate != nil {
		d.entered <- struct{}{}
		<-gate
	}
	if err := d.call("write"); err != nil {
		return 0, err
	}
	return d.WriteAt(p, off)
}

func (d *disk) SyncContext(context.Context) error {
	if err := d.call("sync"); err != nil {
		return err
	}
	return d.Sync()
}

func (d *disk) ZeroAtContext(_ context.Context, off, length int64, punch bool) error {
	name := "zero"
	if punch {
		name = "punch"
	}
	if err := d.call(name); err != nil {
		return err
	}
	d.memory.mu.Lock()
	defer d.memory.mu.Unlock()
	clear(d.b[off : off+length])
	return nil
}

func (d *disk) CanFastZero() bool { return !d.slowZero }

func (d *disk) FastZeroAtContext(ctx context.Context, off, length int64, punch bool) error {
	if err := d.call("fast"); err != nil {
		return err
	}
	return d.ZeroAtContext(ctx, off, length, punch)
}

func (d *disk) TrimAtContext(context.Context, int64, int64) error { return d.call("trim") }

func (d *disk) Prefetch(off, length int64) error {
	d.mu.Lock()
	d.prefetch = append(d.prefetch, [2]int64{off, length})
	d.mu.Unlock()
	return d.call("prefetch")
}

func (d *disk) MetaContexts() []string { return d.contexts }

func (d *disk) BlockStatus(_ context.Context, name string, off, length int64, yield func(int64, uint32) bool) error {
	if err := d.call("status"); err != nil {
		return err
	}
	if d.status != nil {
		return d.status(name, off, length, yield)
	}
	yield(length, 0)
	return nil
}

// quietDisk is a disk for benchmarks, which notes nothing.
type quietDisk struct {
	*memory
	d *disk
}

func (q *quietDisk) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if off >= q.d.missing {
		return q.d.ReadAtContext(ctx, p, off)
	}
	return q.ReadAt(p, off)
}

var noDeadline time.Time
