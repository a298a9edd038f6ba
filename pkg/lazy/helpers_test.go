package lazy

import (
	"bytes"
	"io"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// memDisk is a disk in memory whose operations a test can stop, fail and watch.
// hook is called before (and, with after set, after) each, with no lock held.
type memDisk struct {
	mu   sync.Mutex
	b    []byte
	hook func(op string, off, length int64) error // nil: none
	done func(op string, off, length int64)       // nil: none
	torn bool                                     // others may come between two sectors
}

var (
	_ storage.StorageProvider = (*memDisk)(nil)
	_ storage.Zeroer          = (*memDisk)(nil)
)

func newMemDisk(size int64) *memDisk { return &memDisk{b: make([]byte, size)} }

func (m *memDisk) do(op string, off, length int64, f func()) error {
	if m.hook != nil {
		if err := m.hook(op, off, length); err != nil {
			return err
		}
	}
	f()
	if m.done != nil {
		m.done(op, off, length)
	}
	return nil
}

// pieces does f for n bytes: at once, or with others let in now and then.
func (m *memDisk) pieces(n int, f func(i, j int)) {
	step := max(n, 1)
	if m.torn {
		step = sectorSize
	}
	for i := 0; i < n; i += step {
		m.mu.Lock()
		f(i, min(i+step, n))
		m.mu.Unlock()
		if m.torn && rand.IntN(4) == 0 {
			runtime.Gosched()
		}
	}
}

func (m *memDisk) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(m.b)) {
		return 0, io.EOF
	}
	var n int
	err := m.do("read", off, int64(len(p)), func() {
		n = min(len(p), len(m.b)-int(off))
		m.pieces(n, func(i, j int) { copy(p[i:j], m.b[int(off)+i:]) })
	})
	if err == nil && n < len(p) {
		err = io.EOF
	}
	return n, err
}

func (m *memDisk) WriteAt(p []byte, off int64) (int, error) {
	if err := storage.CheckRange(off, int64(len(p)), m.Size()); err != nil {
		return 0, err
	}
	err := m.do("write", off, int64(len(p)), func() {
		m.pieces(len(p), func(i, j int) { copy(m.b[int(off)+i:], p[i:j]) })
	})
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

func (m *memDisk) ZeroAt(off, length int64, _ bool) error {
	if err := storage.CheckRange(off, length, m.Size()); err != nil {
		return err
	}
	return m.do("zero", off, length, func() {
		m.pieces(int(length), func(i, j int) { clear(m.b[int(off)+i : int(off)+j]) })
	})
}

func (m *memDisk) Size() uint64 { return uint64(len(m.b)) }
func (m *memDisk) Flush() error { return m.do("flush", 0, 0, func() {}) }
func (m *memDisk) Close() error { return nil }

// asks is a source that writes down what it is told.
type asks struct {
	mu         sync.Mutex
	need, dont [][2]int64
}

func (a *asks) NeedAt(off, length int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.need = append(a.need, [2]int64{off, length})
}

func (a *asks) DontNeedAt(off, length int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.dont = append(a.dont, [2]int64{off, length})
}

func (a *asks) needed() [][2]int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.need)
}

func (a *asks) needless() [][2]int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.dont)
}

// newTestDevice is a device on a new disk, closed at the end of the test.
func newTestDevice(t *testing.T, size int64, o Options) (*Device, *memDisk) {
	t.Helper()
	disk := newMemDisk(size)
	return newDeviceOn(t, disk, o), disk
}

func newDeviceOn(t *testing.T, disk storage.StorageProvider, o Options) *Device {
	t.Helper()
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	d, err := New(disk, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() }) // the tests of Close look at its error
	return d
}

// filled is n bytes of value v.
func filled(v byte, n int64) []byte { return bytes.Repeat([]byte{v}, int(n)) }

func mustGoLive(t *testing.T, d *Device) {
	t.Helper()
	if err := d.GoLive(); err != nil {
		t.Errorf("go live: %v", err)
	}
}

// mustRead reads, and fails the test if that is not what is there.
func mustRead(t *testing.T, d *Device, off int64, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := d.ReadAt(got, off); err != nil {
		t.Fatalf("read %d bytes at %d: %v", len(want), off, err)
	}
	if i := mismatch(got, want); i >= 0 {
		t.Fatalf("read at %d: byte %d is %#x, want %#x", off, off+int64(i), got[i], want[i])
	}
}

func mismatch(got, want []byte) int {
	if bytes.Equal(got, want) {
		return -1 // the loop is slow under -race
	}
	for i := range want {
		if got[i] != want[i] {
			return i
		}
	}
	return -1
}

func mustWrite(t *testing.T, w io.WriterAt, off int64, p []byte) {
	t.Helper()
	if n, err := w.WriteAt(p, off); err != nil || n != len(p) {
		t.Fatalf("write %d bytes at %d: %d, %v", len(p), off, n, err)
	}
}

// pass lets time pass inside a synctest bubble, and all that is due then happen.
func pass(t time.Duration) {
	<-time.After(t)
	synctest.Wait()
}
