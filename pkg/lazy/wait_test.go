package lazy

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// records keeps log records.
type records struct {
	slog.Handler
	mu  sync.Mutex
	all []slog.Record
}

func (r *records) Enabled(context.Context, slog.Level) bool { return true }

func (r *records) Handle(_ context.Context, rec slog.Record) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, rec)
	return nil
}

// take returns what there is and forgets it.
func (r *records) take() []slog.Record {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := r.all
	r.all = nil
	return all
}

func attrs(r slog.Record) map[string]slog.Value {
	m := map[string]slog.Value{}
	r.Attrs(func(a slog.Attr) bool { m[a.Key] = a.Value; return true })
	return m
}

func TestWaitingIsVisible(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &records{}
		d, _ := newTestDevice(t, 64*testBlock, Options{BlockSize: testBlock, Log: slog.New(log)})
		s := d.Attach(&asks{})
		begin := time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		first := run(func() { _, _ = d.ReadAtContext(ctx, make([]byte, 1), 3*testBlock+7) }) // cancelled below
		pass(time.Second)
		var others []<-chan struct{}
		for range 100 {
			others = append(others, run(func() { mustRead(t, d, 9*testBlock, filled(1, 1)) }))
		}
		synctest.Wait()
		if st := d.Stats(); st.Waiting != 101 || !st.OldestWait.Equal(begin) || st.WaitOff != 3*testBlock+7 {
			t.Errorf("stats: %+v", st)
		}
		var got []time.Duration
		pass(24 * time.Second)
		_ = s.Close() // always nil
		pass(76 * time.Second)
		for i, r := range log.take() {
			got = append(got, r.Time.Sub(begin))
			a := attrs(r)
			if a["block_offset"].Int64() != 3*testBlock || !a["since"].Time().Equal(begin) ||
				a["source_attached"].Bool() != (i == 0) || a["waiting"].Int64() != 101 {
				t.Errorf("line %d: %v", i, a)
			}
			if i == 0 && a["source_attached_for"].Duration() != 5*time.Second || i > 0 && a["source_gone_for"].Duration() != r.Time.Sub(begin)-25*time.Second {
				t.Errorf("line %d, since when the source is there, or gone: %v", i, a)
			}
			if _, ok := a["source_last_sent"]; ok {
				t.Errorf("line %d tells of an arrival, and there was none: %v", i, a)
			}
		}
		if want := []time.Duration{5 * time.Second, 30 * time.Second, time.Minute}; !slices.Equal(got, want) {
			t.Errorf("lines at %v, want %v", got, want)
		}
		// The next oldest has been waiting for 100 s: nothing new to say before 120 s.
		cancel()
		<-first
		pass(10 * time.Second)
		if n := len(log.take()); n != 0 {
			t.Errorf("%d lines when another became the oldest", n)
		}
		pass(12 * time.Second)
		if lines := log.take(); len(lines) != 1 || attrs(lines[0])["block_offset"].Int64() != 9*testBlock {
			t.Errorf("after two minutes: %v", lines)
		}
		s = d.Attach(&asks{})
		mustWrite(t, s, 9*testBlock, filled(1, testBlock))
		for _, done := range others {
			<-done
		}
		if st := d.Stats(); st.Waiting != 0 || !st.OldestWait.IsZero() {
			t.Errorf("stats: %+v", st)
		}
		// A new stall is told from the start.
		last := run(func() { mustRead(t, d, 0, filled(1, 1)) })
		pass(6 * time.Second)
		if n := len(log.take()); n != 1 {
			t.Errorf("%d lines about the next stall", n)
		}
		mustWrite(t, s, 0, filled(1, testBlock))
		<-last
	})
}

// What the source does is in the line: it sends other blocks, or the block has
// come and the disk did not take it.
func TestWaitingSaysWhatTheSourceDoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &records{}
		d, disk := newTestDevice(t, 64*testBlock, Options{BlockSize: testBlock, Log: slog.New(log)})
		s := d.Attach(&asks{})
		reader := run(func() { mustRead(t, d, 0, filled(1, 1)) })
		pass(3 * time.Second)
		mustWrite(t, s, 9*testBlock, filled(1, testBlock))
		pass(3 * time.Second)
		lines := log.take()
		if len(lines) != 1 || lines[0].Message != "a client waits: the source has not sent the block" || attrs(lines[0])["source_last_sent"].Duration() != 2*time.Second {
			t.Errorf("while others come: %v", lines)
		}
		if st := d.Stats(); !st.LastArrival.Equal(time.Now().Add(-3*time.Second)) || !st.AttachedSince.Equal(time.Now().Add(-6*time.Second)) {
			t.Errorf("stats: %+v", st)
		}
		disk.hook = func(string, int64, int64) error { return syscall.ENOSPC }
		if _, err := s.WriteAt(filled(1, testBlock), 0); !NoRoom(err) {
			t.Errorf("without room: %v", err)
		}
		pass(25 * time.Second)
		lines = log.take()
		if len(lines) != 1 || !strings.HasPrefix(lines[0].Message, "a client waits: the disk has no room for the block") || attrs(lines[0])["error"].Any() == nil {
			t.Errorf("without room: %v", lines)
		}
		disk.hook = nil
		mustWrite(t, s, 0, filled(1, testBlock))
		<-reader
	})
}

// W1: with the source gone what is here is served, what is missing waits, visibly,
// and is there when the source is back.
func TestW1SourceGoneLocalBlocksAreServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, _ := newTestDevice(t, 64*testBlock, Options{BlockSize: testBlock})
		s := d.Attach(&asks{})
		mustWrite(t, s, 0, filled(1, testBlock))
		_ = s.Close() // always nil
		missing := run(func() { mustRead(t, d, 10*testBlock, filled(2, testBlock)) })
		begin := time.Now()
		mustRead(t, d, 0, filled(1, testBlock))
		mustWrite(t, d, 10*testBlock, filled(3, 512))
		mustRead(t, d, 10*testBlock, filled(3, 512))
		if err := d.Sync(); err != nil || time.Since(begin) != 0 {
			t.Errorf("after %v: %v", time.Since(begin), err)
		}
		pass(time.Hour)
		if st := d.Stats(); ended(missing) || st.Waiting != 1 || st.Attached {
			t.Errorf("an hour later: %+v", st)
		}
		src := &asks{}
		s = d.Attach(src)
		synctest.Wait()
		if want := [][2]int64{{10 * testBlock, testBlock}}; !slices.Equal(src.needed(), want) {
			t.Errorf("asked for %v, want %v", src.needed(), want)
		}
		mustWrite(t, d, 10*testBlock, filled(2, 512)) // what the reader expects
		mustWrite(t, s, 10*testBlock, filled(2, testBlock))
		<-missing
	})
}

func TestReadServedByLocalWritesAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, _ := newTestDevice(t, 4*testBlock, Options{BlockSize: testBlock})
		reader := run(func() { mustRead(t, d, 1024, filled(5, 1024)) })
		mustWrite(t, d, 1024, filled(5, 512))
		if ended(reader) {
			t.Fatal("half of it was enough")
		}
		mustWrite(t, d, 1536, filled(5, 512))
		<-reader
		if st := d.Stats(); st.Missing != 4 || st.Partial != 1 {
			t.Errorf("%+v", st)
		}
	})
}

func TestFullMaskIsWrittenAndNotNeeded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, _ := newTestDevice(t, 16*testBlock, Options{BlockSize: testBlock})
		src := &asks{}
		d.Attach(src)
		for _, off := range []int64{7, 3, 5, 0, 1, 2, 4} {
			mustWrite(t, d, 2*testBlock+512*off, filled(1, 512))
		}
		synctest.Wait()
		if len(src.needless()) != 0 || d.Stats().Written != 0 {
			t.Fatalf("a sector is missing, but told not to send %v", src.needless())
		}
		mustWrite(t, d, 2*testBlock+512*6, filled(1, 512))
		mustWrite(t, d, 5*testBlock, filled(1, 3*testBlock))
		synctest.Wait()
		if want := [][2]int64{{2 * testBlock, testBlock}, {5 * testBlock, 3 * testBlock}}; !slices.Equal(src.needless(), want) {
			t.Errorf("told not to send %v, want %v", src.needless(), want)
		}
		if st := d.Stats(); st.Written != 4 || st.Partial != 0 || len(src.needed()) != 0 {
			t.Errorf("%+v, asked for %v", st, src.needed())
		}
	})
}

func TestStandbyHoldsClientsUntilLive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, disk := newTestDevice(t, 4*testBlock, Options{BlockSize: testBlock, Standby: true})
		src := &asks{}
		s := d.Attach(src)
		mustWrite(t, s, 0, filled(1, 4*testBlock))
		disk.hook = func(op string, off, length int64) error {
			if op != "flush" && !d.isLive.Load() {
				t.Errorf("%s %d+%d in standby", op, off, length)
			}
			return nil
		}
		read := run(func() { mustRead(t, d, testBlock, filled(2, 10)) })
		write := run(func() { mustWrite(t, d, 0, filled(3, 512)) })
		trim := run(func() {
			if err := d.TrimAtContext(t.Context(), 3*testBlock, testBlock); err != nil {
				t.Error(err)
			}
		})
		if ended(read) || ended(write) || ended(trim) || d.Stats().Waiting != 3 {
			t.Fatalf("did not wait: %+v", d.Stats())
		}
		disk.hook = nil
		if err := d.Complete(); !errors.Is(err, ErrStandby) {
			t.Errorf("complete in standby: %v", err)
		}
		if err := s.DirtyList([]uint32{1, 1, 3}); err != nil {
			t.Fatal(err)
		}
		if st := d.Stats(); st.Missing != 2 {
			t.Errorf("after the dirty list: %+v", st)
		}
		mustGoLive(t, d)
		mustGoLive(t, d)
		<-write
		<-trim
		if ended(read) {
			t.Error("read a block that was taken back")
		}
		if err := s.DirtyList([]uint32{0}); !errors.Is(err, ErrLive) || d.Stats().Missing != 1 {
			t.Errorf("dirty list of a live device: %v, %+v", err, d.Stats())
		}
		mustWrite(t, s, testBlock, filled(2, testBlock))
		<-read
	})
}

// A dirty list with a block that does not exist, twice, in any order: all that
// exist are taken back (an early return would forget the rest).
func TestDirtyListTakesBackEveryBlockThatExists(t *testing.T) {
	d, _ := newTestDevice(t, 7*testBlock+1, Options{BlockSize: testBlock, Revocable: true})
	s := d.Attach(&asks{})
	mustWrite(t, s, 0, filled(1, 7*testBlock+1))
	mustWrite(t, d, 4*testBlock, filled(2, testBlock))
	err := s.DirtyList([]uint32{6, 7, 8, 9, 1<<32 - 1, 0, 0, 4, 2})
	if !errors.Is(err, storage.ErrOutOfRange) {
		t.Errorf("block 8 does not exist, but: %v", err)
	}
	var missing [][2]int64
	d.EachMissing(func(off, length int64) bool { missing = append(missing, [2]int64{off, length}); return true })
	if want := [][2]int64{{0, testBlock}, {2 * testBlock, testBlock}, {6 * testBlock, testBlock + 1}}; !slices.Equal(missing, want) {
		t.Errorf("missing %v, want %v: block 4 was written here", missing, want)
	}
	// Blocks of half the size, and of twice.
	if err := s.HandleDirtyList(testBlock/2, []uint32{3}); err != nil {
		t.Error(err)
	}
	if err := s.HandleDirtyList(testBlock*2, []uint32{2}); err != nil {
		t.Error(err)
	}
	if err := s.HandleDirtyList(0, []uint32{2}); err == nil {
		t.Error("blocks of no size were taken")
	}
	if d.state.isLocal(1) || !d.state.isLocal(3) || !d.state.isLocal(4) || d.state.isLocal(5) {
		t.Error("blocks of another size: the wrong ones were taken back")
	}
}

func TestInvalidatedBlockIsAskedForAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, _ := newTestDevice(t, 64*testBlock, Options{BlockSize: testBlock, Revocable: true})
		src := &asks{}
		s := d.Attach(src)
		reader := run(func() { mustRead(t, d, 0, filled(2, 2*testBlock)) })
		synctest.Wait()
		mustWrite(t, s, 0, filled(1, testBlock))
		if err := s.DirtyList([]uint32{0}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if want := [][2]int64{{0, 2 * testBlock}, {0, testBlock}}; !slices.Equal(src.needed(), want) {
			t.Errorf("asked for %v, want %v", src.needed(), want)
		}
		mustWrite(t, s, testBlock, filled(2, testBlock))
		if ended(reader) {
			t.Error("read what was taken back")
		}
		mustWrite(t, s, 0, filled(2, testBlock))
		<-reader
	})
}

func TestSequentialFaultsWidenTheRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const blocks = 4096
		d, _ := newTestDevice(t, blocks*testBlock, Options{BlockSize: testBlock})
		src := &asks{}
		s := d.Attach(src)
		read := func(block int64) {
			t.Helper()
			before := len(src.needed())
			done := run(func() { mustRead(t, d, block*testBlock, filled(1, testBlock)) })
			synctest.Wait()
			for _, r := range src.needed()[before:] {
				mustWrite(t, s, r[0], filled(1, r[1]))
			}
			<-done
		}
		for block := range int64(70) {
			read(block)
		}
		// Block 0 alone, then from each fault on as far as it was widened.
		want := [][2]int64{{0, 1}, {1, 5}, {6, 9}, {15, 17}, {32, 33}, {65, 65}}
		var got [][2]int64
		for _, r := range src.needed() {
			got = append(got, [2]int64{r[0] / testBlock, r[1] / testBlock})
		}
		if !slices.Equal(got, want) {
			t.Errorf("asked for blocks %v, want %v", got, want)
		}
		// Anything but the next block is asked for alone, and the window is gone.
		src.need = nil
		for i := range int64(8) {
			read(1000 + 37*i)
		}
		read(130)
		for _, r := range src.needed() {
			if r[1] != testBlock {
				t.Errorf("a random read was widened: %v", src.needed())
			}
		}
		if d.waits.aheads != 0 || len(d.waits.wants) != 0 {
			t.Errorf("%d wants are left, %d of them ahead", len(d.waits.wants), d.waits.aheads)
		}
		d.Attach(&asks{})
	})
}

func TestReaderSharesWhatWasAskedAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, _ := newTestDevice(t, 64*testBlock, Options{BlockSize: testBlock})
		src := &asks{}
		d.Attach(src)
		a := run(func() { mustRead(t, d, 0, filled(1, testBlock)) })
		synctest.Wait()
		b := run(func() { mustRead(t, d, testBlock, filled(1, testBlock)) })
		synctest.Wait()
		c := run(func() { mustRead(t, d, 3*testBlock+5, filled(1, 5)) })
		synctest.Wait()
		var asked [64]int
		for _, r := range src.needed() {
			for off := r[0]; off < r[0]+r[1]; off += testBlock {
				asked[off/testBlock]++
			}
		}
		for block, n := range asked {
			if n > 1 || block < 6 && n == 0 {
				t.Errorf("block %d was asked for %d times: %v", block, n, src.needed())
			}
		}
		// A new session is asked for what somebody waits for, and no more.
		src = &asks{}
		s := d.Attach(src)
		synctest.Wait()
		if want := [][2]int64{{0, 2 * testBlock}, {3 * testBlock, testBlock}}; !slices.Equal(src.needed(), want) {
			t.Errorf("asked the next session for %v, want %v", src.needed(), want)
		}
		mustWrite(t, s, 0, filled(1, 8*testBlock))
		<-a
		<-b
		<-c
	})
}

func TestPrefetchAsksAndDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, _ := newTestDevice(t, 64*testBlock, Options{BlockSize: testBlock})
		mustWrite(t, d, 20*testBlock, filled(1, testBlock))
		if err := d.Prefetch(18*testBlock+9, 4*testBlock); err != nil {
			t.Fatal(err)
		}
		src := &asks{}
		d.Attach(src)
		synctest.Wait()
		if want := [][2]int64{{18 * testBlock, 2 * testBlock}, {21 * testBlock, 2 * testBlock}}; !slices.Equal(src.needed(), want) {
			t.Errorf("asked for %v, want %v", src.needed(), want)
		}
	})
}

// hung is a source whose connection takes nothing.
type hung struct {
	asks
	let chan struct{}
}

func (h *hung) NeedAt(off, length int64) {
	h.asks.NeedAt(off, length)
	<-h.let
}

func TestHungSourceHoldsUpNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, _ := newTestDevice(t, 1024*testBlock, Options{BlockSize: testBlock})
		h := &hung{let: make(chan struct{})}
		d.Attach(h)
		var all []<-chan struct{}
		for i := range int64(100) {
			all = append(all, run(func() { mustRead(t, d, 10*i*testBlock, filled(1, 1)) }))
			synctest.Wait()
		}
		mustWrite(t, d, testBlock, filled(2, testBlock))
		if len(h.needed()) != 1 {
			t.Errorf("one call at a time, but %v", h.needed())
		}
		src := &asks{}
		s := d.Attach(src) // the next session does not wait for the hung one
		synctest.Wait()
		if len(src.needed()) != 100 || len(src.needless()) != 1 {
			t.Errorf("the next session was asked for %d runs, told of %d", len(src.needed()), len(src.needless()))
		}
		mustWrite(t, s, 0, filled(1, 1024*testBlock))
		for _, done := range all {
			<-done
		}
		close(h.let)
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
}
