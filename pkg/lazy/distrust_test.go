package lazy

import (
	"slices"
	"syscall"
	"testing"
)

// badSync has every sync of what fail from now on as Linux has it fail: what it was
// for is not on the device, and is clean in the cache. Of all other files that are
// written to after that nothing becomes durable either, if dead.
func (a *alive) badSync(what string, dead bool) {
	failed := false
	a.p.hook = func(op string) error {
		switch {
		case op == what && (dead || !failed):
			failed = true
			a.file.failSync(nil)
			if what == "sync disk" {
				a.disk.failSync(nil)
			}
			return syscall.EIO
		case dead && failed && op == "sync map":
			a.file.failSync(nil)
			return syscall.EIO
		}
		return nil
	}
}

// crash ends the process as kill -9 does, and starts the next one.
func (a *alive) crash() {
	a.t.Helper()
	a.p.kill()
	_ = a.d.Close() // it is dead
	a.start(newProcess(nil, -1))
}

// A sync of the map fails, the process ends, and the next one flushes: what it
// answers for is on the device, whatever was in the cache when it began, and whether
// the map could be marked or not. (fault F3, trap I10)
func TestAFlushAfterAFailedSyncOfTheMapIsDurable(t *testing.T) {
	for _, log := range []int64{0, testLog} {
		for _, dead := range []bool{false, true} {
			a := newAliveWith(t, 8, log, Options{})
			a.sync()
			mustWrite(t, a.d, testBlock, filled(2, testBlock))
			if err := a.d.TrimAtContext(t.Context(), 5*testBlock, testBlock); err != nil { // it is not logged
				t.Fatal(err)
			}
			a.badSync("sync map", dead)
			if a.d.Sync() == nil {
				t.Fatal("a flush did not fail with the map")
			}
			a.crash()
			mustWrite(t, a.d, testBlock, filled(9, testBlock))
			a.sync()
			a.cut(false, false)
			mustWrite(t, a.s, 0, filled(1, 8*testBlock))
			mustRead(t, a.d, testBlock, filled(9, testBlock))
		}
	}
}

// The mark that ends an epoch of the log was written by a sync that failed: the next
// process goes on with the epoch that the device knows of. (fault F3, trap I10)
func TestAFlushIsNotLoggedBehindAMarkThatOnlyTheCacheHas(t *testing.T) {
	for _, dead := range []bool{false, true} {
		a := newLogged(t, 8, Options{})
		a.put(testBlock, filled(2, 512))
		if err := a.d.TrimAtContext(t.Context(), 5*testBlock, testBlock); err != nil { // it is not logged
			t.Fatal(err)
		}
		a.badSync("sync map", dead)
		if a.d.Sync() == nil {
			t.Fatal("a flush did not fail with the map")
		}
		a.crash()
		a.sync()
		a.put(3*testBlock, filled(9, 512))
		a.cut(false, false)
		mustWrite(t, a.s, 0, filled(1, 8*testBlock))
		mustRead(t, a.d, 3*testBlock, filled(9, 512))
		mustRead(t, a.d, testBlock, filled(2, 512))
	}
}

// A sync of the disk fails, and a client that was told so flushes again at the next
// process: what it reads is what the device has, and what the log has is laid over
// that. (fault F3, trap I10)
func TestAfterAFailedSyncOfTheDiskTheDeviceIsRead(t *testing.T) {
	a := newLogged(t, 8, Options{})
	mustWrite(t, a.s, 0, filled(1, 8*testBlock))
	if err := a.s.Flush(); err != nil {
		t.Fatal(err)
	}
	a.put(testBlock, filled(2, 512))
	mustWrite(t, a.d, 3*testBlock, filled(3, testBlock))
	if err := a.d.TrimAtContext(t.Context(), 5*testBlock, testBlock); err != nil { // it is not logged
		t.Fatal(err)
	}
	a.badSync("sync disk", false)
	if a.d.Sync() == nil {
		t.Fatal("a flush did not fail with the disk")
	}
	if a.d.epoch.m.header().flags&flagFailed == 0 {
		t.Error("the map does not say that a sync has failed")
	}
	a.crash()
	if !slices.Contains(a.p.done(), "drop disk") {
		t.Errorf("the disk's cache was not dropped: %v", a.p.done())
	}
	for range 2 {
		mustRead(t, a.d, testBlock, filled(2, 512))
		mustRead(t, a.d, 3*testBlock, filled(1, testBlock))
		mustRead(t, a.d, 5*testBlock, filled(1, testBlock))
		a.sync()
		a.cut(false, false)
	}
	if a.d.epoch.m.header().flags&flagFailed != 0 || slices.Contains(a.p.done(), "drop disk") {
		t.Error("the map says for ever that a sync has failed")
	}
}

// A plain disk that is complete is marked, too: its client may flush again at the
// next process. (fault F3, trap I10)
func TestAFailedSyncOfACompleteDiskIsNotForgotten(t *testing.T) {
	a := newAlive(t, 4, Options{})
	mustWrite(t, a.s, 0, filled(1, 4*testBlock))
	if err := a.d.Complete(); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, a.d, testBlock, filled(2, testBlock))
	a.badSync("sync disk", false)
	if a.d.Sync() == nil {
		t.Fatal("a flush did not fail with the disk")
	}
	a.crash()
	mustRead(t, a.d, testBlock, filled(1, testBlock))
	a.sync()
	a.crash()
	if slices.Contains(a.p.done(), "drop disk") {
		t.Error("the map says for ever that a sync has failed")
	}
}

// The file of a map is read from the device at a start. (fault F3)
func TestAMapIsReadFromTheDevice(t *testing.T) {
	a := newAlive(t, 4, Options{})
	a.crash()
	log := a.p.done()
	drop := slices.Index(log, "drop map")
	if drop < 1 || log[drop-1] != "sync map" || slices.Index(log, "read map") < drop {
		t.Errorf("a start did %v", log)
	}
}
