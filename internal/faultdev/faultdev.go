// Package faultdev is storage that fails when it is told to, for tests of what
// happens then.
package faultdev

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// ErrInjected is the failure of an operation that was told to fail.
var ErrInjected = errors.New("faultdev: injected failure")

// Kind is what an operation does.
type Kind string

// The operations that are counted. Size and Close are not, and never fail here.
const (
	Read   Kind = "read"
	Write  Kind = "write"
	Zero   Kind = "zero"
	Trim   Kind = "trim"
	Extent Kind = "extent"
	Flush  Kind = "flush"
)

// Op is one operation on the store.
type Op struct {
	N        int // how many came before it
	Kind     Kind
	Off, Len int64 // bytes; 0 of a Flush
	Punch    bool  // of a Zero
}

func (op Op) fault() error {
	return fmt.Errorf("%w: operation %d, %s of %d bytes at %d", ErrInjected, op.N, op.Kind, op.Len, op.Off)
}

// Hook is called before an operation, on its goroutine, and may block. An
// error is the operation's answer, and the store never hears of it.
type Hook func(op Op) error

// Device wraps a store. It offers all the optional interfaces: what the store
// cannot do itself is done by writing zeroes, by doing nothing, or by saying
// that all is data.
type Device struct {
	store storage.StorageProvider
	hook  Hook
	short int // the operation that writes half and fails; -1: none
	lost  int // the operation that is performed and fails all the same; -1: none
	ops   atomic.Int64
	fired atomic.Bool

	closed atomic.Bool // for what is answered without the store
}

var (
	_ storage.StorageProvider = (*Device)(nil)
	_ storage.Zeroer          = (*Device)(nil)
	_ storage.Trimmer         = (*Device)(nil)
	_ storage.Extenter        = (*Device)(nil)
)

// New returns a store whose operations ask hook first.
func New(store storage.StorageProvider, hook Hook) *Device {
	return &Device{store: store, hook: hook, short: -1, lost: -1}
}

// FailAt returns a store whose operation n, counted from 0, fails with
// ErrInjected and does nothing. All others work.
func FailAt(store storage.StorageProvider, n int) *Device {
	return New(store, func(op Op) error {
		if op.N == n {
			return op.fault()
		}
		return nil
	})
}

// FailFrom returns a store whose operation n, counted from 0, fails with
// ErrInjected, and every later one: a disk that has died.
func FailFrom(store storage.StorageProvider, n int) *Device {
	return New(store, func(op Op) error {
		if op.N >= n {
			return op.fault()
		}
		return nil
	})
}

// FailKindAt returns a store whose operation n of one kind, counted from 0,
// fails with ErrInjected and does nothing.
func FailKindAt(store storage.StorageProvider, kind Kind, n int) *Device {
	var seen atomic.Int64
	return New(store, func(op Op) error {
		if op.Kind == kind && seen.Add(1)-1 == int64(n) {
			return op.fault()
		}
		return nil
	})
}

// ShortAt returns a store whose operation n, counted from 0, does the first
// half of its bytes if it reads, writes or zeroes, and fails with ErrInjected.
func ShortAt(store storage.StorageProvider, n int) *Device {
	d := New(store, nil)
	d.short = n
	return d
}

// LostAt returns a store whose operation n, counted from 0, is performed and
// answers ErrInjected all the same.
func LostAt(store storage.StorageProvider, n int) *Device {
	d := New(store, nil)
	d.lost = n
	return d
}

// NoSpaceAfter returns a store that answers ENOSPC to every write, and zeroing
// that is no punch, once more than size bytes would have been written. What is
// refused writes nothing, and what fits is taken also later.
func NoSpaceAfter(store storage.StorageProvider, size int64) *Device {
	var used atomic.Int64
	return New(store, func(op Op) error {
		if op.Kind != Write && (op.Kind != Zero || op.Punch) {
			return nil
		}
		for {
			before := used.Load()
			if op.Len > size-before {
				return fmt.Errorf("faultdev: write of %d bytes at %d: %w", op.Len, op.Off, syscall.ENOSPC)
			}
			if used.CompareAndSwap(before, before+op.Len) {
				return nil
			}
		}
	})
}

// Fired says that an operation was made to fail.
func (d *Device) Fired() bool { return d.fired.Load() }

// Ops is how many operations were asked for.
func (d *Device) Ops() int { return int(d.ops.Load()) }

// perform counts an operation and does it through do, which takes how much of
// its length to do.
func (d *Device) perform(op Op, do func(length int64) error) error {
	op.N = int(d.ops.Add(1)) - 1
	if d.hook != nil {
		if err := d.hook(op); err != nil {
			d.fired.Store(true)
			return err
		}
	}
	length := op.Len
	if op.N == d.short {
		length /= 2
	}
	err := do(length)
	if err == nil && (op.N == d.short || op.N == d.lost) {
		d.fired.Store(true)
		return op.fault()
	}
	return err
}

// ReadAt implements storage.StorageProvider.
func (d *Device) ReadAt(p []byte, off int64) (n int, err error) {
	err = d.perform(Op{Kind: Read, Off: off, Len: int64(len(p))}, func(length int64) (err error) {
		n, err = d.store.ReadAt(p[:length], off)
		return err
	})
	return n, err
}

// WriteAt implements storage.StorageProvider.
func (d *Device) WriteAt(p []byte, off int64) (n int, err error) {
	err = d.perform(Op{Kind: Write, Off: off, Len: int64(len(p))}, func(length int64) (err error) {
		n, err = d.store.WriteAt(p[:length], off)
		return err
	})
	return n, err
}

// ZeroAt implements storage.Zeroer.
func (d *Device) ZeroAt(off, length int64, punch bool) error {
	return d.perform(Op{Kind: Zero, Off: off, Len: length, Punch: punch}, func(length int64) error {
		if z, ok := d.store.(storage.Zeroer); ok {
			return z.ZeroAt(off, length, punch)
		}
		if err := storage.CheckRange(off, length, d.store.Size()); err != nil {
			return err
		}
		_, err := d.store.WriteAt(make([]byte, length), off)
		return err
	})
}

// TrimAt implements storage.Trimmer.
func (d *Device) TrimAt(off, length int64) error {
	return d.perform(Op{Kind: Trim, Off: off, Len: length}, func(length int64) error {
		if t, ok := d.store.(storage.Trimmer); ok {
			return t.TrimAt(off, length)
		}
		if d.closed.Load() {
			return os.ErrClosed
		}
		return storage.CheckRange(off, length, d.store.Size())
	})
}

// ExtentAt implements storage.Extenter.
func (d *Device) ExtentAt(off int64) (end int64, hole bool, err error) {
	err = d.perform(Op{Kind: Extent, Off: off}, func(int64) (err error) {
		if e, ok := d.store.(storage.Extenter); ok {
			end, hole, err = e.ExtentAt(off)
			return err
		}
		if d.closed.Load() {
			return os.ErrClosed
		}
		end = int64(d.store.Size())
		return storage.CheckRange(off, 1, d.store.Size())
	})
	if err != nil {
		return 0, false, err
	}
	return end, hole, nil
}

// Flush implements storage.StorageProvider.
func (d *Device) Flush() error {
	return d.perform(Op{Kind: Flush}, func(int64) error { return d.store.Flush() })
}

// Size implements storage.StorageProvider.
func (d *Device) Size() uint64 { return d.store.Size() }

// Close implements storage.StorageProvider.
func (d *Device) Close() error {
	d.closed.Store(true)
	return d.store.Close()
}
