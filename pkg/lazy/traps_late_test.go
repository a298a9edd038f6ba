package lazy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
)

// L8: what was trimmed or zeroed stays zero when the block arrives; of a trimmed
// part of a block the sectors are zero, and what is less than a sector is left
// alone; zeroing is exact to the byte.
func TestL8TrimAndZeroOutliveTheArrival(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, disk := newTestDevice(t, 8*testBlock, Options{BlockSize: testBlock})
		copy(disk.b, filled(0xee, 8*testBlock)) // the disk's old contents come back nowhere
		src := &asks{}
		s := d.Attach(src)
		ctx := t.Context()
		// From inside block 0 to inside block 3.
		if err := d.TrimAtContext(ctx, testBlock-600, 2*testBlock+1200); err != nil {
			t.Fatal(err)
		}
		if err := d.TrimAtContext(ctx, 5*testBlock+5, 100); err != nil { // less than a sector
			t.Fatal(err)
		}
		synctest.Wait()
		if want := [][2]int64{{testBlock, 2 * testBlock}}; !slices.Equal(src.needless(), want) || len(src.needed()) != 0 {
			t.Errorf("told not to send %v, want %v; asked for %v", src.needless(), want, src.needed())
		}
		zeroed := run(func() {
			if err := d.ZeroAtContext(ctx, 6*testBlock+5, testBlock, true); err != nil {
				t.Error(err)
			}
		})
		if ended(zeroed) {
			t.Error("zeroing part of a missing sector did not wait for it")
		}
		mustWrite(t, s, 0, filled(1, 8*testBlock))
		mustWrite(t, s, 0, filled(2, 8*testBlock))
		<-zeroed
		want := filled(1, 8*testBlock)
		clear(want[testBlock-512 : 3*testBlock+512])
		clear(want[6*testBlock+5 : 7*testBlock+5])
		mustRead(t, d, 0, want)
	})
}

// L9: zeroes that arrive are written, unless the disk is known to be zero; and
// that is not known any more where a write failed or a block was taken back.
func TestL9ZeroesAreWrittenUnlessKnown(t *testing.T) {
	const size = 4 * testBlock
	t.Run("unknown", func(t *testing.T) {
		d, disk := newTestDevice(t, size, Options{BlockSize: testBlock})
		copy(disk.b, filled(0xee, size))
		if err := d.Attach(&asks{}).ZeroAt(0, size, true); err != nil {
			t.Fatal(err)
		}
		mustRead(t, d, 0, make([]byte, size))
	})
	t.Run("known", func(t *testing.T) {
		d, disk := newTestDevice(t, size, Options{BlockSize: testBlock, KnownZero: true})
		mustWrite(t, d, 512, filled(0xaa, 512))
		disk.hook = func(op string, off, length int64) error {
			if op != "read" && op != "flush" {
				t.Errorf("%s %d+%d, though the disk is known to be zero", op, off, length)
			}
			return nil
		}
		if err := d.Attach(&asks{}).ZeroAt(0, size, true); err != nil {
			t.Fatal(err)
		}
		want := make([]byte, size)
		copy(want[512:], filled(0xaa, 512))
		mustRead(t, d, 0, want)
	})
	t.Run("taken back", func(t *testing.T) {
		d, _ := newTestDevice(t, size, Options{BlockSize: testBlock, KnownZero: true, Standby: true})
		s := d.Attach(&asks{})
		mustWrite(t, s, 0, filled(1, size))
		if err := s.DirtyList([]uint32{1}); err != nil {
			t.Fatal(err)
		}
		if err := s.ZeroAt(0, size, true); err != nil {
			t.Fatal(err)
		}
		mustGoLive(t, d)
		mustRead(t, d, 0, append(append(filled(1, testBlock), make([]byte, testBlock)...), filled(1, 2*testBlock)...))
	})
	for _, who := range []string{"client", "source"} {
		t.Run("failed write of the "+who, func(t *testing.T) {
			d, disk := newTestDevice(t, size, Options{BlockSize: testBlock, KnownZero: true})
			s := d.Attach(&asks{})
			disk.hook = func(_ string, off, length int64) error { // half of it gets there
				copy(disk.b[off:off+length/2], filled(0xee, length/2))
				return syscall.EIO
			}
			var w io.WriterAt = d
			if who == "source" {
				w = s
			}
			if _, err := w.WriteAt(filled(7, testBlock), 0); !errors.Is(err, syscall.EIO) {
				t.Fatal(err)
			}
			disk.hook = nil
			if err := s.ZeroAt(0, size, true); err != nil {
				t.Fatal(err)
			}
			mustRead(t, d, 0, make([]byte, size))
		})
	}
}

// L10: a packet of an earlier session, or after Complete, changes nothing and
// says so; one in progress has ended when Attach returns.
func TestL10PacketsOfEarlierSessionsAreRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, disk := newTestDevice(t, 4*testBlock, Options{BlockSize: testBlock})
		s1 := d.Attach(&asks{})
		stop := stopAt(disk, "write")
		inProgress := run(func() { mustWrite(t, s1, 0, filled(1, testBlock)) })
		<-stop.at
		var s2 *Stream
		attached := run(func() { s2 = d.Attach(&asks{}) })
		if ended(attached) {
			t.Fatal("attached while a packet of the earlier session was being written")
		}
		stop.goOn <- struct{}{}
		<-stop.at
		stop.goOn <- struct{}{}
		<-inProgress
		<-attached
		disk.hook, disk.done = nil, nil
		_, werr := s1.WriteAt(filled(9, testBlock), testBlock)
		_, rerr := s1.ReadAt(make([]byte, 10), 0)
		for i, err := range []error{werr, rerr, s1.ZeroAt(testBlock, testBlock, true), s1.DirtyList([]uint32{0}), s1.Flush()} {
			if !errors.Is(err, ErrDetached) {
				t.Errorf("call %d of the earlier session: %v", i, err)
			}
		}
		if d.Stats().Fetched != 1 {
			t.Errorf("the earlier session changed something: %+v", d.Stats())
		}
		mustWrite(t, s2, testBlock, filled(2, 3*testBlock))
		if err := d.Complete(); err != nil {
			t.Fatal(err)
		}
		_, werr = s2.WriteAt(filled(9, testBlock), testBlock)
		for i, err := range []error{werr, s2.ZeroAt(0, testBlock, true), s2.DirtyList([]uint32{0})} {
			if !errors.Is(err, ErrComplete) {
				t.Errorf("call %d after Complete: %v", i, err)
			}
		}
		mustRead(t, d, 0, append(filled(1, testBlock), filled(2, 3*testBlock)...))
	})
}

// L10: what is waited for is asked again of the next session, once.
func TestL10NextSessionIsAskedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, _ := newTestDevice(t, 64*testBlock, Options{BlockSize: testBlock})
		reader := run(func() { mustRead(t, d, 5*testBlock, filled(4, 3*testBlock)) })
		synctest.Wait() // no source at all yet
		want := [][2]int64{{5 * testBlock, 3 * testBlock}}
		for range 3 {
			src := &asks{}
			s := d.Attach(src)
			synctest.Wait()
			if !slices.Equal(src.needed(), want) {
				t.Errorf("asked for %v, want %v", src.needed(), want)
			}
			_ = s.Close() // always nil
		}
		src := &asks{}
		s := d.Attach(src)
		mustWrite(t, s, 5*testBlock, filled(4, testBlock))
		src2 := &asks{}
		s = d.Attach(src2)
		synctest.Wait()
		if want = [][2]int64{{6 * testBlock, 2 * testBlock}}; !slices.Equal(src2.needed(), want) {
			t.Errorf("asked for %v, want %v: block 5 is here", src2.needed(), want)
		}
		mustWrite(t, s, 6*testBlock, filled(4, 2*testBlock))
		<-reader
	})
}

// L11: one of two readers gives up: the other gets its bytes, and the buffer of
// the one that gave up is not touched any more.
func TestL11CancelledReaderLeavesTheOtherAndItsBufferAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, _ := newTestDevice(t, 4*testBlock, Options{BlockSize: testBlock})
		s := d.Attach(&asks{})
		cause := errors.New("no patience")
		ctx, cancel := context.WithCancelCause(t.Context())
		p := filled(0x55, testBlock)
		gone := run(func() {
			if _, err := d.ReadAtContext(ctx, p, 0); !errors.Is(err, cause) {
				t.Errorf("the cancelled reader got %v", err)
			}
		})
		stays := run(func() { mustRead(t, d, 0, filled(1, testBlock)) })
		synctest.Wait()
		cancel(cause)
		<-gone
		if ended(stays) {
			t.Fatal("the other reader ended, too")
		}
		mustWrite(t, s, 0, filled(1, testBlock))
		<-stays
		if !bytes.Equal(p, filled(0x55, testBlock)) {
			t.Error("the buffer was written after the read had returned")
		}
	})
}

// L12: the disk is full: the arrival is refused and asked for again, the local
// write gets ENOSPC, nothing is local; when there is room all goes on.
func TestL12FullDiskPublishesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, disk := newTestDevice(t, 16*testBlock, Options{BlockSize: testBlock})
		src := &asks{}
		s := d.Attach(src)
		reader := run(func() { mustRead(t, d, testBlock, filled(1, testBlock)) })
		synctest.Wait()
		disk.hook = func(op string, _, _ int64) error {
			if op == "write" || op == "zero" {
				return syscall.ENOSPC
			}
			return nil
		}
		for range 2 {
			if _, err := s.WriteAt(filled(1, 2*testBlock), testBlock); !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("arrival on a full disk: %v", err)
			}
		}
		_, err := d.WriteAt(filled(2, 512), 4*testBlock)
		for i, err := range []error{err, d.ZeroAtContext(t.Context(), 5*testBlock, testBlock, false), s.ZeroAt(0, testBlock, true)} {
			if !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("call %d on a full disk: %v", i, err)
			}
		}
		if st := d.Stats(); st.Missing != 16 || st.Partial != 0 || st.Waiting != 1 || ended(reader) {
			t.Errorf("on a full disk: %+v", st)
		}
		if n := len(src.needed()); n != 1 {
			t.Errorf("asked again at once: %v", src.needed())
		}
		pass(2 * retryAfter)
		synctest.Wait()
		if want := [][2]int64{{testBlock, testBlock}, {testBlock, testBlock}}; !slices.Equal(src.needed(), want) {
			t.Errorf("asked for %v, want %v", src.needed(), want)
		}
		disk.hook = nil
		mustWrite(t, s, testBlock, filled(1, 2*testBlock))
		<-reader
		mustWrite(t, d, 4*testBlock, filled(2, 512))
	})
}

// L12: a device whose map finds no room is not complete, and can be when it does. The
// second copy of the header is not needed for that: the first one is durable.
func TestL12NoRoomToBecomeComplete(t *testing.T) {
	for which := 0; ; which++ { // of the writes of Complete to the map
		a := newAlive(t, 8, Options{})
		mustWrite(t, a.s, 0, filled(1, 8*testBlock))
		n := 0
		a.p.hook = func(what string) error {
			if what == "write map" {
				if n++; n-1 == which {
					return syscall.ENOSPC
				}
			}
			return nil
		}
		err := a.d.Complete()
		if err == nil {
			if which < 2 {
				t.Fatalf("write %d of %d found no room, and the device is complete", which, n)
			}
			a.cut(false, false)
			if !a.d.Stats().Complete {
				t.Errorf("write %d found no room, and after a power cut: %+v", which, a.d.Stats())
			}
			return
		}
		if !NoRoom(err) || !MapFull(err) || a.d.Stats().Complete {
			t.Errorf("write %d found no room: %v, %+v", which, err, a.d.Stats())
		}
		if err := a.d.Complete(); err != nil {
			t.Errorf("with room again: %v", err)
		}
		a.cut(false, false)
		if !a.d.Stats().Complete {
			t.Errorf("write %d found no room, and the power was cut: %+v", which, a.d.Stats())
		}
	}
}
