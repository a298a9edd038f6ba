package lazy

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

func TestReadOfMissingBlockAsksAndWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, _ := newTestDevice(t, 1<<20, Options{BlockSize: 4096})
		src := &asks{}
		s := d.Attach(src)
		got := make([]byte, 32*4096)
		done := make(chan error, 1)
		go func() {
			_, err := d.ReadAt(got, 4096)
			done <- err
		}()
		synctest.Wait()
		if want := [][2]int64{{4096, 32 * 4096}}; !slices.Equal(src.needed(), want) {
			t.Fatalf("asked for %v, want %v", src.needed(), want)
		}
		mustWrite(t, s, 4096, filled(7, 31*4096))
		synctest.Wait()
		select {
		case err := <-done:
			t.Fatalf("returned before the last block: %v", err)
		default:
		}
		mustWrite(t, s, 32*4096, filled(8, 4096))
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if want := append(filled(7, 31*4096), filled(8, 4096)...); !bytes.Equal(got, want) {
			t.Error("wrong bytes")
		}
		if st := d.Stats(); st.Waiting != 0 || st.Fetched != 32 || len(d.waits.wants) != 0 {
			t.Errorf("after the read: %+v, %d wants", st, len(d.waits.wants))
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestCompleteNeedsEveryBlock(t *testing.T) {
	d, disk := newTestDevice(t, 10*4096+100, Options{BlockSize: 4096})
	s := d.Attach(&asks{})
	for block := range int64(11) {
		err := d.Complete()
		var incomplete *IncompleteError
		if !errors.As(err, &incomplete) || incomplete.Missing != 11-block || incomplete.First != block*4096 {
			t.Fatalf("with %d blocks here: %v", block, err)
		}
		off, end := d.extent(block)
		mustWrite(t, s, off, filled(byte(block+1), end-off))
	}
	flushed := false
	disk.hook = func(op string, _, _ int64) error { flushed = flushed || op == "flush"; return nil }
	for range 2 {
		if err := d.Complete(); err != nil {
			t.Fatal(err)
		}
	}
	st := d.Stats()
	if !flushed || !st.Complete || !d.direct.Load() || st.BytesLocal != 10*4096+100 {
		t.Errorf("complete: flushed %t, direct %t, %+v", flushed, d.direct.Load(), st)
	}
	mustRead(t, d, 9*4096, append(filled(10, 4096), filled(11, 100)...))
}

func TestCloseWakesEveryWaiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, _ := newTestDevice(t, 1<<20, Options{})
		s := d.Attach(&asks{})
		done := make(chan error, 3)
		go func() { _, err := d.ReadAt(make([]byte, 10), 0); done <- err }()
		go func() { _, err := d.ReadAt(make([]byte, 10), 70000); done <- err }()
		go func() { _, err := d.WriteAt(make([]byte, 10), 1); done <- err }()
		synctest.Wait()
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if err := <-done; !errors.Is(err, ErrClosed) || !errors.Is(err, syscall.ESHUTDOWN) {
				t.Errorf("a waiter got %v", err)
			}
		}
		_, rerr := d.ReadAt(make([]byte, 1), 0)
		_, werr := d.WriteAt(make([]byte, 1), 0)
		_, serr := s.WriteAt(make([]byte, 1), 0)
		_, aerr := d.Attach(&asks{}).WriteAt(make([]byte, 1), 0)
		for i, err := range []error{rerr, werr, serr, aerr, d.Sync(), d.Complete(), d.Prefetch(0, 1)} {
			if !errors.Is(err, ErrClosed) {
				t.Errorf("call %d after Close: %v", i, err)
			}
		}
		if err := d.Close(); err != nil {
			t.Errorf("second Close: %v", err)
		}
	})
}

func TestRangesOutsideTheDeviceAreRefused(t *testing.T) {
	d, disk := newTestDevice(t, 10000, Options{BlockSize: 4096})
	s := d.Attach(&asks{})
	disk.hook = func(op string, off, length int64) error {
		if op != "flush" {
			t.Errorf("%s %d+%d reached the disk", op, off, length)
		}
		return nil
	}
	ctx := context.Background()
	for _, r := range [][2]int64{{9999, 2}, {10001, 0}, {1 << 40, 512}, {-1, 5}, {1<<63 - 1, 1}} {
		off, length := r[0], r[1]
		_, werr := d.WriteAt(make([]byte, length), off)
		_, serr := s.WriteAt(make([]byte, length), off)
		for i, err := range []error{werr, serr, d.ZeroAtContext(ctx, off, length, true), d.TrimAtContext(ctx, off, length),
			s.ZeroAt(off, length, false), d.Prefetch(off, length)} {
			if !errors.Is(err, storage.ErrOutOfRange) {
				t.Errorf("call %d with %d+%d: %v", i, off, length, err)
			}
		}
	}
	if n, err := d.ReadAt(nil, 5); n != 0 || err != nil {
		t.Errorf("read of nothing: %d, %v", n, err)
	}
	if _, err := d.WriteAt(nil, 10000); err != nil {
		t.Errorf("write of nothing at the end: %v", err)
	}
}

// pipeDisk is a disk that takes what is in a pipe.
type pipeDisk struct {
	*memDisk
	spliced []int64 // offsets
}

func (p *pipeDisk) CanSplice() bool { return true }

func (p *pipeDisk) SpliceAt(_ int, off, _ int64) error {
	p.spliced = append(p.spliced, off)
	return nil
}

func TestOnlyACompleteDeviceIsSplicedInto(t *testing.T) {
	for _, c := range []struct {
		disk storage.StorageProvider
		can  bool
	}{{&pipeDisk{memDisk: newMemDisk(4096)}, true}, {newMemDisk(4096), false}} {
		d, err := New(c.disk, Options{BlockSize: 4096})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		if d.CanSplice() {
			t.Error("who wrote what has to be kept")
		}
		if err := d.SpliceAt(0, 0, 512); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("while a block is missing: %v", err)
		}
		mustWrite(t, d.Attach(&asks{}), 0, filled(1, 4096))
		if err := d.Complete(); err != nil {
			t.Fatal(err)
		}
		err = d.SpliceAt(0, 512, 512)
		if d.CanSplice() != c.can || (err == nil) != c.can {
			t.Errorf("complete: can %t, want %t; %v", d.CanSplice(), c.can, err)
		}
		if p, is := c.disk.(*pipeDisk); is && !slices.Equal(p.spliced, []int64{512}) {
			t.Errorf("spliced at %v", p.spliced)
		}
	}
}
