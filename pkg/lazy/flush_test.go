package lazy

import (
	"context"
	"errors"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
)

// D4: a failed flush is final: nothing that comes later is acknowledged, though
// the disk says that all is well, also on a complete device.
func TestD4FailedFlushIsFinal(t *testing.T) {
	for _, complete := range []bool{false, true} {
		d, disk := newTestDevice(t, 4*testBlock, Options{BlockSize: testBlock})
		s := d.Attach(&asks{})
		mustWrite(t, s, 0, filled(1, testBlock))
		if complete {
			mustWrite(t, s, 0, filled(1, 4*testBlock))
			if err := d.Complete(); err != nil {
				t.Fatal(err)
			}
		}
		disk.hook = func(op string, _, _ int64) error {
			if op == "flush" {
				return syscall.EIO
			}
			return nil
		}
		if err := d.Sync(); !errors.Is(err, syscall.EIO) {
			t.Errorf("the flush said %v", err)
		}
		disk.hook = nil
		_, werr := d.WriteAt(filled(2, 512), 0)
		errs := []error{werr, d.Sync(), d.Sync(), d.ZeroAtContext(t.Context(), 0, 512, true),
			d.TrimAtContext(t.Context(), 0, testBlock)}
		if complete {
			errs = append(errs, d.Complete())
		} else {
			_, serr := s.WriteAt(filled(2, testBlock), testBlock)
			errs = append(errs, serr, s.ZeroAt(testBlock, testBlock, true), s.Flush())
		}
		mustRead(t, d, 0, filled(1, testBlock)) // reading goes on
		for i, err := range append(errs, d.Close()) {
			if !errors.Is(err, syscall.EIO) {
				t.Errorf("complete %t: call %d after the failed flush: %v", complete, i, err)
			}
		}
		if i := mismatch(disk.b[:testBlock], filled(1, testBlock)); i >= 0 {
			t.Error("a refused write reached the disk")
		}
	}
}

// D4: two flushes at once: the kernel tells a failure to one of them only, so the
// other may not be answered from a flush of its own that ran beside it.
func TestD4FailureReachesEveryFlushInProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, disk := newTestDevice(t, 4*testBlock, Options{BlockSize: testBlock})
		stop := make(chan error)
		disk.hook = func(op string, _, _ int64) error {
			if op == "flush" {
				return <-stop
			}
			return nil
		}
		var all []<-chan struct{}
		for range 5 {
			all = append(all, run(func() {
				if err := d.Sync(); !errors.Is(err, syscall.EIO) {
					t.Errorf("flush: %v", err)
				}
			}))
		}
		synctest.Wait()
		stop <- syscall.EIO
		for _, done := range all {
			<-done
		}
	})
}

// D5: a flush covers what was answered before it, and only a flush that began
// after that does. Sharing the flush that is running fails it.
func TestD5FlushCoversEveryAnsweredWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, disk := newTestDevice(t, 4*testBlock, Options{BlockSize: testBlock})
		flushes := make(chan struct{})
		disk.hook = func(op string, _, _ int64) error {
			if op == "flush" {
				flushes <- struct{}{}
			}
			return nil
		}
		sync := func() {
			if err := d.Sync(); err != nil {
				t.Error(err)
			}
		}
		first := run(sync)
		synctest.Wait() // the first flush is in the disk
		mustWrite(t, d, 0, filled(1, 512))
		var later []<-chan struct{}
		for range 10 {
			later = append(later, run(sync))
		}
		ctx, cancel := context.WithCancel(t.Context())
		gone := run(func() {
			if err := d.SyncContext(ctx); !errors.Is(err, context.Canceled) {
				t.Errorf("cancelled flush: %v", err)
			}
		})
		synctest.Wait()
		cancel()
		<-gone
		<-flushes
		<-first
		if ended(later[0]) {
			t.Fatal("answered by a flush that began before the write was answered")
		}
		<-flushes // one for all ten
		for _, done := range later {
			<-done
		}
		disk.hook = nil
	})
}

// While the map is written for one flush, the disk is flushed for the next; the
// maps are written one after the other, and each flush answers in its turn.
func TestTheNextFlushBeginsWhileTheMapIsWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAlive(t, 8, Options{})
		go1, go2 := make(chan struct{}), make(chan struct{})
		maps := 0
		a.p.hook = func(what string) error {
			if what == "sync map" {
				if maps++; maps == 1 {
					<-go1
				} else {
					<-go2
				}
			}
			return nil
		}
		flush := func() { a.sync() }
		mustWrite(t, a.s, 0, filled(1, testBlock))
		first := run(flush)
		synctest.Wait() // in the map
		mustWrite(t, a.s, testBlock, filled(1, testBlock))
		n := len(a.p.done())
		second, beside := run(flush), run(flush)
		synctest.Wait()
		if log := a.p.done()[n:]; !slices.Equal(log, []string{"sync disk"}) {
			t.Errorf("while the map is written for the first: %v", log)
		}
		if ended(first) || ended(second) || ended(beside) {
			t.Error("a flush was answered before the map was synced")
		}
		close(go1)
		<-first
		synctest.Wait()
		if ended(second) || ended(beside) || maps != 2 {
			t.Errorf("the second flush was answered with the first, after %d syncs of the map", maps)
		}
		close(go2)
		<-second
		<-beside
		a.p.hook = nil
		a.cut(false, false)
		if st := a.d.Stats(); st.Fetched != 2 {
			t.Errorf("after a power cut: %+v", st)
		}
	})
}

// What the map had no room for in one flush may be of writes that the next one
// answers for, which took its bits before it was put back: both say no.
func TestL12NoRoomForTheMapIsSaidByTheFlushBehindIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAlive(t, 8, Options{})
		goOn := make(chan struct{})
		full := true
		a.p.hook = func(what string) error {
			if what == "write map" && full {
				<-goOn
				full = false
				return syscall.ENOSPC
			}
			return nil
		}
		errs := make(chan error, 2)
		mustWrite(t, a.s, 0, filled(1, testBlock))
		first := run(func() { errs <- a.d.Sync() })
		synctest.Wait()
		mustWrite(t, a.s, testBlock, filled(1, testBlock))
		second := run(func() { errs <- a.d.Sync() })
		synctest.Wait()
		close(goOn)
		<-first
		<-second
		for range 2 {
			if err := <-errs; !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("a flush said %v", err)
			}
		}
		a.sync()
		a.cut(false, false)
		if st := a.d.Stats(); st.Fetched != 2 {
			t.Errorf("after a flush that found room and a power cut: %+v", st)
		}
	})
}

// D4: a flush that fails in the disk while the map is written for the one before
// takes nothing back from that one, and is final.
func TestD4FailureBesideTheMapOfTheFlushBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAlive(t, 8, Options{})
		goOn := make(chan struct{})
		disks := 0
		a.p.hook = func(what string) error {
			switch what {
			case "sync map":
				<-goOn
			case "sync disk":
				if disks++; disks == 2 {
					return syscall.EIO
				}
			}
			return nil
		}
		mustWrite(t, a.s, 0, filled(1, testBlock))
		first := run(func() { a.sync() })
		synctest.Wait()
		mustWrite(t, a.s, testBlock, filled(1, testBlock))
		if err := a.d.Sync(); !errors.Is(err, syscall.EIO) {
			t.Errorf("the second flush said %v", err)
		}
		close(goOn)
		<-first
		if err := a.d.Sync(); !errors.Is(err, syscall.EIO) {
			t.Errorf("a flush after the failure said %v", err)
		}
		a.p.hook = nil
		a.cut(false, false)
		if st := a.d.Stats(); st.Fetched != 1 {
			t.Errorf("after a power cut: %+v", st)
		}
	})
}

// Every operation of the disk fails once, in turn: the call that needed it says
// so, nobody hangs, nothing is published that is not there, and when it is all
// done again the device is what it should be.
func TestEveryDiskOperationFailsOnce(t *testing.T) {
	const size = 6*testBlock + 700
	for _, o := range []Options{{}, {Revocable: true}, {KnownZero: true}} {
		o.BlockSize = testBlock
		for n := 0; ; n++ {
			fired := false
			synctest.Test(t, func(t *testing.T) {
				d, disk := newTestDevice(t, size, o)
				s := d.Attach(&asks{})
				i := 0
				disk.hook = func(op string, off, length int64) error {
					if i++; i-1 != n {
						return nil
					}
					fired = true
					if op == "write" || op == "zero" { // half of it may be there
						copy(disk.b[off:off+length/2], filled(0xee, length/2))
					}
					return errInjected
				}
				want := make([]byte, size)
				copy(want, filled(1, 3*testBlock))
				got := make([]byte, size)
				failed := 0
				for _, step := range []func() error{
					func() error { _, err := d.WriteAt(filled(2, 1024), 512); return err },
					func() error { _, err := d.WriteAt(filled(3, testBlock), testBlock); return err },
					func() error { return d.ZeroAtContext(t.Context(), 2*testBlock+512, 512, true) },
					func() error { return d.TrimAtContext(t.Context(), 5*testBlock, testBlock) },
					func() error { _, err := s.WriteAt(filled(1, 3*testBlock), 0); return err },
					func() error { return s.ZeroAt(3*testBlock, size-3*testBlock, true) },
					func() error { _, err := d.WriteAt(filled(4, 10), 4*testBlock+3); return err },
					func() error { _, err := d.ReadAt(got, 0); return err },
					d.Sync,
					d.Complete,
					d.Close,
				} {
					err := step()
					if errors.Is(err, errInjected) && failed == 0 {
						failed++
						if err = step(); err == nil && d.flush.failure() != nil {
							t.Errorf("operation %d: acknowledged after a failed flush", n)
						}
					}
					if err != nil && !(fired && d.flush.failure() != nil && errors.Is(err, errInjected)) {
						t.Errorf("operation %d failed, then: %v", n, err)
					}
				}
				if fired && failed == 0 && d.flush.failure() == nil {
					t.Errorf("operation %d failed, and nobody said so", n)
				}
				copy(want[512:], filled(2, 1024))
				copy(want[testBlock:], filled(3, testBlock))
				clear(want[2*testBlock+512 : 2*testBlock+1024])
				copy(want[4*testBlock+3:], filled(4, 10))
				if at := mismatch(got, want); at >= 0 {
					t.Errorf("operation %d failed, and byte %d is %#x, want %#x", n, at, got[at], want[at])
				}
			})
			if !fired {
				break
			}
		}
	}
}
