package lazy

import (
	"errors"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
)

const testLog = 64 << 10 // bytes

// newLogged has a disk of n blocks, and a map whose log is in use.
func newLogged(t *testing.T, n int64, o Options) *alive {
	a := newAliveWith(t, n, testLog, o)
	a.sync() // the first is an ordinary one
	return a
}

// did is what the files were asked for by f.
func (a *alive) did(f func()) []string {
	n := len(a.p.done())
	f()
	return slices.Clone(a.p.done()[n:])
}

// put writes and flushes, and wants that to be logged.
func (a *alive) put(off int64, p []byte) {
	a.t.Helper()
	mustWrite(a.t, a.d, off, p)
	if log := a.did(a.sync); slices.Contains(log, "sync disk") || !slices.Contains(log, "sync map") {
		a.t.Fatalf("a flush that can be logged did %v", log)
	}
}

// A small flush is one sync of the map; all that is large, no write or not whole
// sectors takes the ordinary way, and so does what the log has no room for.
func TestSmallFlushIsOneSync(t *testing.T) {
	a := newLogged(t, 32, Options{})
	ctx := t.Context()
	mustWrite(t, a.s, 0, filled(1, 32*testBlock))
	mustWrite(t, a.d, 0, filled(1, 32*testBlock))
	a.sync() // all blocks are settled, and written: no bit changes any more
	for i, c := range []struct {
		change func() error
		logged bool
	}{
		{func() error { _, err := a.d.WriteAt(filled(2, 512), 512); return err }, true},
		{func() error { _, err := a.d.WriteAt(filled(2, maxLogged/2), 0); return err }, true},
		{func() error { return nil }, true}, // nothing is to be done at all
		{func() error { _, err := a.d.WriteAt(filled(2, 511), 512); return err }, false},
		{func() error { _, err := a.d.WriteAt(filled(2, maxLogged+512), 0); return err }, false},
		{func() error { return a.d.ZeroAtContext(ctx, 0, testBlock, false) }, false},
		{func() error { return a.d.TrimAtContext(ctx, testBlock, testBlock) }, false},
	} {
		a.put(testBlock, filled(2, 512))
		if err := c.change(); err != nil {
			t.Fatal(err)
		}
		log := a.did(a.sync)
		if ordinary := []string{"sync disk", "write map", "sync map"}; c.logged && slices.Contains(log, "sync disk") || !c.logged && !slices.Equal(log, ordinary) {
			t.Errorf("change %d: a flush did %v", i, log)
		}
	}
	// The room in the log ends, and then there is room again.
	full := 0
	for range 40 {
		mustWrite(t, a.d, 0, filled(3, 512))
		if log := a.did(a.sync); slices.Contains(log, "sync disk") {
			full++
		}
	}
	if want := 2; full != want {
		t.Errorf("the log was full %d times, want %d", full, want)
	}
	// What is written between two flushes is more than is logged.
	for range 2 {
		for i := range int64(32) {
			mustWrite(t, a.d, i*testBlock, filled(4, testBlock))
		}
		if !a.d.capture.spoiled.Load() {
			t.Error("all of it was collected")
		}
	}
	for i := range 1 + crowdFor {
		mustWrite(t, a.d, 0, filled(5, 512))
		if log := a.did(a.sync); !slices.Contains(log, "sync disk") {
			t.Errorf("flush %d after that did %v", i, log)
		}
	}
	a.put(0, filled(5, 512))
}

// D2, D12: what was flushed by way of the log is there after a power cut, and
// ours: sectors of missing blocks, whole blocks, and of blocks that were fetched
// and were not durable; the newest of what was written to the same place.
func TestD2LoggedWritesOutliveThePowerCut(t *testing.T) {
	for _, o := range []Options{{}, {Revocable: true}} {
		for _, keep := range [][2]bool{{false, false}, {true, false}, {false, true}, {true, true}} {
			a := newLogged(t, 8, o)
			mustWrite(t, a.s, 6*testBlock, filled(1, testBlock))
			a.put(testBlock, filled(2, testBlock))
			a.put(3*testBlock+512, filled(3, 1024))
			a.put(6*testBlock+512, filled(4, 512)) // D12
			a.put(3*testBlock+1024, filled(5, 1024))
			mustWrite(t, a.d, testBlock, filled(6, 512))
			mustWrite(t, a.d, testBlock, filled(7, 512))
			mustWrite(t, a.d, testBlock+512, filled(7, 512))
			a.put(testBlock+512, filled(8, 512))
			mustWrite(t, a.d, 0, filled(9, 512)) // not flushed
			a.cut(keep[0], keep[1])
			if n := a.logged(); n != 0 || a.d.saver.m.log.used() {
				t.Errorf("%d bytes are still in the log", n)
			}
			for range 2 {
				mustRead(t, a.d, testBlock, slices.Concat(filled(7, 512), filled(8, 512), filled(2, testBlock-1024)))
				mustRead(t, a.d, 3*testBlock+512, slices.Concat(filled(3, 512), filled(5, 1024)))
				mustRead(t, a.d, 6*testBlock+512, filled(4, 512))
				a.cut(false, false) // all of it is durable
			}
			mustWrite(t, a.s, 0, filled(1, 8*testBlock)) // the source sends it all
			mustRead(t, a.d, 2*testBlock+512, filled(1, testBlock))
			mustRead(t, a.d, testBlock, slices.Concat(filled(7, 512), filled(8, 512), filled(2, testBlock-1024)))
			mustRead(t, a.d, 3*testBlock, slices.Concat(filled(1, 512), filled(3, 512), filled(5, 1024), filled(1, testBlock-2048)))
			mustRead(t, a.d, 6*testBlock, slices.Concat(filled(1, 512), filled(4, 512), filled(1, testBlock-1024)))
		}
	}
}

// A flush that is not logged ends the log: what it made durable is not undone by
// what was logged before, also if no bit has changed, and though the log is not
// overwritten. Then the log goes on, and nothing of its last time counts.
func TestLogNeverUndoesALaterFlush(t *testing.T) {
	for _, change := range map[string]func(d *Device) error{
		"a trim":                 func(d *Device) error { return d.TrimAtContext(t.Context(), testBlock, testBlock) },
		"zeroes":                 func(d *Device) error { return d.ZeroAtContext(t.Context(), testBlock, 3*testBlock, false) },
		"a large write":          func(d *Device) error { _, err := d.WriteAt(make([]byte, 16*testBlock), 0); return err },
		"parts of two sectors":   func(d *Device) error { _, err := d.WriteAt(make([]byte, 1300), testBlock); return err },
		"writes after a refusal": nil,
	} {
		for _, settled := range []bool{true, false} {
			a := newLogged(t, 20, Options{})
			if settled {
				mustWrite(t, a.d, 0, filled(1, 20*testBlock))
				a.sync()
			}
			a.put(testBlock, filled(2, 1024))
			a.put(testBlock+512, filled(3, 1024))
			a.put(testBlock+512, filled(4, 1024))
			if change == nil {
				a.p.hook = func(what string) error {
					if what == "write disk" {
						return syscall.EIO
					}
					return nil
				}
				if _, err := a.d.WriteAt(filled(9, 512), testBlock); !errors.Is(err, syscall.EIO) {
					t.Fatal(err)
				}
				a.p.hook = nil
				mustWrite(t, a.d, testBlock, make([]byte, 2048))
			} else if err := change(a.d); err != nil {
				t.Fatal(err)
			}
			a.sync()
			mustWrite(t, a.d, 19*testBlock, filled(5, 512))
			for i := range 2 {
				if i == 1 {
					a.put(19*testBlock, filled(6, 512)) // lies where the first of the others was
				}
				a.cut(false, false)
				mustRead(t, a.d, testBlock, make([]byte, 1300))
				a.sync()
			}
			mustRead(t, a.d, 19*testBlock, filled(6, 512))
		}
	}
}

// D1, D4: as long as the disk is not synced, what was logged stays, whatever
// becomes of the map.
func TestD1LogEndsAfterTheDiskIsSynced(t *testing.T) {
	for _, keepMap := range []bool{false, true} {
		a := newLogged(t, 20, Options{})
		a.put(testBlock, filled(2, 1024))
		if err := a.d.TrimAtContext(t.Context(), 5*testBlock, testBlock); err != nil {
			t.Fatal(err)
		}
		a.p.hook = func(what string) error {
			if what == "sync disk" {
				return syscall.EIO
			}
			return nil
		}
		if err := a.d.Sync(); !errors.Is(err, syscall.EIO) {
			t.Errorf("a flush said %v", err)
		}
		a.p.hook = nil
		if err := a.d.Sync(); !errors.Is(err, syscall.EIO) {
			t.Errorf("a flush after it said %v", err)
		}
		a.cut(false, keepMap)
		mustRead(t, a.d, testBlock, filled(2, 1024))
	}
}

// D12: the mark that the data of an epoch is on the disk survives a power cut, and
// the bits that were to become durable with it do not: its sectors are ours all
// the same, and are not written again.
func TestD12MarkWithoutItsBits(t *testing.T) {
	a := newLogged(t, 20, Options{})
	a.put(testBlock, filled(2, 512))
	mustWrite(t, a.d, testBlock, filled(3, 512))
	if err := a.d.TrimAtContext(t.Context(), 3*testBlock, testBlock); err != nil { // not logged
		t.Fatal(err)
	}
	a.p.hook = func(what string) error {
		if what == "sync map" {
			a.p.kill()
		}
		return nil
	}
	if err := a.d.Sync(); !errors.Is(err, errDead) {
		t.Fatal(err)
	}
	l := a.d.saver.m.log
	a.file.mu.Lock()
	copy(a.file.durable[l.marks:l.begin], a.file.now[l.marks:l.begin])
	a.file.mu.Unlock()
	a.cut(false, false)
	if !a.d.readable(testBlock, testBlock+512) {
		t.Fatal("what was written here is forgotten")
	}
	mustRead(t, a.d, testBlock, filled(3, 512))
	mustWrite(t, a.s, 0, filled(1, 20*testBlock))
	mustRead(t, a.d, testBlock, filled(3, 512))
}

// D5: a flush that is logged is answered when the map is synced, and not before.
func TestD5LoggedFlushWaitsForTheMap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newLogged(t, 8, Options{})
		goOn := a.hold("sync map")
		mustWrite(t, a.d, 0, filled(1, 512))
		first := run(a.sync)
		synctest.Wait()
		mustWrite(t, a.d, 512, filled(2, 512))
		others := []<-chan struct{}{run(a.sync), run(a.sync)}
		synctest.Wait()
		mustWrite(t, a.d, 1024, filled(3, 512)) // a flush that has not begun takes it, too
		others = append(others, run(a.sync))
		synctest.Wait()
		n := a.seen.records.Load()
		if ended(first) || ended(others[0]) || n != 1 {
			t.Errorf("a flush was answered while the map is synced, %d records", n)
		}
		close(goOn)
		for _, done := range append(others, first) {
			<-done
		}
		if n := a.seen.records.Load(); n != 2 {
			t.Errorf("four flushes made %d records", n)
		}
		a.p.hook = nil
		a.cut(false, false)
		mustRead(t, a.d, 0, slices.Concat(filled(1, 512), filled(2, 512), filled(3, 512)))
	})
}

// D5: what a process wrote that was killed is there for everybody to see: the
// first flush of the next makes it durable.
func TestD5FirstFlushCoversTheProcessBefore(t *testing.T) {
	a := newLogged(t, 8, Options{})
	mustWrite(t, a.s, 0, filled(1, 8*testBlock))
	a.sync()
	mustWrite(t, a.d, 512, filled(2, 512)) // not flushed
	a.p.kill()
	_ = a.d.Close() // it is dead
	a.start(newProcess(nil, -1))
	mustWrite(t, a.d, testBlock, filled(3, 512))
	mustRead(t, a.d, 512, filled(2, 512))
	a.sync()
	a.cut(false, false)
	mustRead(t, a.d, 512, filled(2, 512))
}

// What a write that failed has left behind, and is read, is what a flush makes
// durable.
func TestFailedWriteIsNotCoveredByTheLog(t *testing.T) {
	a := newLogged(t, 8, Options{})
	mustWrite(t, a.s, 0, filled(1, 8*testBlock))
	a.sync()
	a.put(0, filled(2, 1024))
	a.p.hook = func(what string) error {
		if what != "write disk" {
			return nil
		}
		a.disk.mu.Lock()
		defer a.disk.mu.Unlock()
		copy(a.disk.now, filled(3, 512)) // a part of it
		a.disk.noteLocked(0, 512)
		return syscall.EIO
	}
	if _, err := a.d.WriteAt(filled(3, 1024), 0); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	a.p.hook = nil
	mustRead(t, a.d, 0, slices.Concat(filled(3, 512), filled(2, 512)))
	a.sync()
	a.cut(false, false)
	mustRead(t, a.d, 0, slices.Concat(filled(3, 512), filled(2, 512)))
}

// A flush of what has arrived is not answered by one that is logged.
func TestStreamFlushIsNotLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newLogged(t, 8, Options{})
		goOn := a.hold("sync map")
		var all []<-chan struct{}
		for i := range int64(2) {
			mustWrite(t, a.d, i*512, filled(2, 512))
			all = append(all, run(a.sync))
			synctest.Wait()
		}
		mustWrite(t, a.s, 4*testBlock, filled(1, testBlock))
		all = append(all, run(func() {
			if err := a.s.Flush(); err != nil {
				t.Error(err)
			}
		}))
		synctest.Wait()
		close(goOn)
		for _, done := range all {
			<-done
		}
		a.p.hook = nil
		a.cut(false, false)
		if st := a.d.Stats(); st.Fetched != 1 {
			t.Errorf("%+v", st)
		}
	})
}

// D4: the map fails while a flush waits for its turn to log: that one fails, too.
func TestD4NothingIsLoggedAfterAFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newLogged(t, 8, Options{})
		goOn := make(chan struct{})
		a.first("sync map", func() error {
			<-goOn
			return syscall.EIO
		})
		sync := func() {
			if err := a.d.Sync(); !errors.Is(err, syscall.EIO) {
				t.Errorf("a flush said %v", err)
			}
		}
		mustWrite(t, a.d, 0, filled(1, 512))
		first := run(sync)
		synctest.Wait()
		mustWrite(t, a.d, 512, filled(2, 512))
		second := run(sync)
		synctest.Wait()
		close(goOn)
		<-first
		<-second
		if n := a.seen.records.Load(); n != 1 {
			t.Errorf("%d records", n)
		}
	})
}

// D5: a write is collected after it was made: a flush of the disk that ends
// meanwhile does not cover it.
func TestD5WriteIsCollectedAfterItWasMade(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newLogged(t, 8, Options{})
		mustWrite(t, a.s, 0, filled(1, 8*testBlock))
		a.sync()
		goOn := make(chan struct{})
		a.first("write disk", func() error {
			<-goOn
			return nil
		})
		write := run(func() { mustWrite(t, a.d, 512, filled(2, 512)) })
		synctest.Wait()
		if err := a.s.Flush(); err != nil {
			t.Fatal(err)
		}
		a.put(testBlock, filled(3, 512)) // there is a log again
		close(goOn)
		<-write
		a.sync()
		a.cut(false, false)
		mustRead(t, a.d, 512, filled(2, 512))
	})
}

// D9: a flush is logged while a device becomes complete: what it wrote is on the
// disk before the map, and with it the log, goes.
func TestD9FlushWhileTheDeviceBecomesComplete(t *testing.T) {
	a := newLogged(t, 8, Options{})
	mustWrite(t, a.s, 0, filled(1, 8*testBlock))
	a.first("sync map", func() error { // of the flush that comes first
		mustWrite(t, a.d, testBlock, filled(2, 512))
		a.d.saver.m.log.has = true // as if it had been logged right after that flush
		return nil
	})
	if err := a.d.Complete(); err != nil {
		t.Fatal(err)
	}
	old := a.d
	a.cut(false, false)
	if st := a.d.Stats(); !st.Complete || a.file.size() != headerSize {
		t.Fatalf("%+v, a map of %d bytes", st, a.file.size())
	}
	mustRead(t, a.d, testBlock, filled(2, 512))
	if b := old.capture.begin(fill{p: filled(3, 512)}, 0, 512, old.size); b != noFlight || !old.capture.spoiled.Load() {
		t.Error("what is written is collected, and there is no log")
	}
}

// M13: blocks are taken back while there is a log: what was written here stays.
func TestM13TakenBackUnderTheLog(t *testing.T) {
	a := newLogged(t, 8, Options{Revocable: true})
	mustWrite(t, a.s, 0, filled(1, 8*testBlock))
	if err := a.s.Flush(); err != nil {
		t.Fatal(err)
	}
	a.put(2*testBlock+512, filled(2, 512))
	a.put(4*testBlock, filled(2, testBlock))
	if err := a.s.DirtyList([]uint32{2, 3, 4}); err != nil {
		t.Fatal(err)
	}
	a.cut(true, false)
	if want := [][2]int64{{0, 2}, {4, 4}}; !slices.Equal(a.local(), want) {
		t.Errorf("local %v, want %v", a.local(), want)
	}
	mustWrite(t, a.s, 0, filled(3, 8*testBlock))
	mustRead(t, a.d, 2*testBlock, slices.Concat(filled(3, 512), filled(2, 512), filled(3, testBlock-1024)))
	mustRead(t, a.d, 4*testBlock, filled(2, testBlock))
}

// The log ends by itself when nobody flushes any more, and with Close.
func TestLogEndsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newLogged(t, 8, Options{})
		mustWrite(t, a.s, 0, filled(1, 8*testBlock))
		a.sync()
		for _, end := range []func(){func() { pass(2 * saveLatest) }, func() {
			if err := a.d.Close(); err != nil {
				t.Error(err)
			}
		}} {
			a.put(0, filled(2, 512))
			if a.logged() != 512 {
				t.Error("nothing was logged")
			}
			if end(); a.logged() != 0 {
				t.Error("the log did not end")
			}
		}
		a.cut(false, false)
		n := len(a.p.done())
		if pass(100 * saveLatest); len(a.p.done()) != n {
			t.Errorf("with nothing new: %v", a.p.done()[n:])
		}
	})
}

// Inspect says what is in the log, and leaves it there.
func TestInspectTellsOfTheLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "map")
	m := must(t)(CreateMap(path, testID))
	d := newDeviceOn(t, newMemDisk(testID.Size), Options{Map: m})
	for i := range int64(3) {
		if err := d.Sync(); err != nil {
			t.Fatal(err)
		}
		mustWrite(t, d, i*512, filled(1, 512))
	}
	for range 2 {
		if i, err := Inspect(path); err != nil || i.Logged != 1024 || i.State != MapLive || !i.InUse {
			t.Errorf("%+v, %v", i, err)
		}
	}
	if err := errors.Join(d.Close(), m.Close()); err != nil {
		t.Fatal(err)
	}
	if i, err := Inspect(path); err != nil || i.Logged != 0 {
		t.Errorf("closed: %+v, %v", i, err)
	}
}
