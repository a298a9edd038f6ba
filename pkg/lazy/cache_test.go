package lazy

import (
	"bytes"
	"log/slog"
	"math/rand/v2"
	"strings"
	"testing"
)

// emptied kills the process and starts another one in the same boot, with nothing left
// in the directory that lives as long as the boot. It returns what the new one logs.
func (a *alive) emptied() string {
	a.t.Helper()
	a.p.kill()
	_ = a.d.Close() // it is dead
	a.boot.losePower()
	var log bytes.Buffer
	a.o.Log = slog.New(slog.NewTextHandler(&log, nil))
	a.start(newProcess(nil, -1))
	a.o.Log = nil
	return log.String()
}

// A was flushed by way of the log, B was written over it, and the process is killed.
// Its mirror is gone, as with a container that is started again, and the boot is the
// same: the disk has B, and A is not laid over it, however often that happens. What may
// be lost is said. After a power cut A is laid over the disk again. (fault F2, trap I9)
func TestAKillWithoutAMirrorLaysNothingOverTheDisk(t *testing.T) {
	for _, mirror := range []bool{true, false} {
		a := newMirrored(t, 8, testLog, Options{})
		if !mirror { // no process has one
			a.boot = nil
			a.crash()
		}
		a.sync()
		a.put(testBlock, filled(2, 512)) // A
		a.put(3*testBlock, filled(6, 512))
		mustWrite(t, a.d, testBlock, filled(3, 512)) // B
		for range 3 {
			if log := a.emptied(); !strings.Contains(log, "may be undone") {
				t.Errorf("it is not said what may be lost: %s", log)
			}
			mustRead(t, a.d, testBlock, filled(3, 512))
			mustRead(t, a.d, 3*testBlock, filled(6, 512))
		}
		a.cut(false, false) // the start has made durable what was in the cache
		mustRead(t, a.d, testBlock, filled(3, 512))
		a.sync()
		a.put(testBlock, filled(4, 512))
		mustWrite(t, a.d, testBlock, filled(5, 512))
		a.cut(false, false)
		mustRead(t, a.d, testBlock, filled(4, 512))
	}
}

// put, flushed, is on the disk only once the log was laid over it: a process that is
// killed before that, after a power cut, leaves no word that it is. (fault F2, trap I9)
func TestACacheCountsOnlyWhenTheLogIsOnTheDisk(t *testing.T) {
	for n := range 60 {
		a := newMirrored(t, 8, testLog, Options{})
		a.sync()
		a.put(testBlock, filled(2, 512))
		a.put(3*testBlock, filled(4, 512))
		a.p.kill()
		_ = a.d.Close() // it is dead
		for _, f := range []*crashFile{a.disk, a.file} {
			f.now, f.since = bytes.Clone(f.durable), make(map[int][][]byte)
		}
		a.boot.losePower()
		a.boots++
		p := newProcess(rand.New(rand.NewPCG(uint64(n), 5)), n)
		if d, err := a.machine.start(p, a.o); err == nil {
			p.kill()
			_ = d.Close() // it is dead
		}
		a.boot.losePower()
		a.start(newProcess(nil, -1))
		mustRead(t, a.d, testBlock, filled(2, 512))
		mustRead(t, a.d, 3*testBlock, filled(4, 512))
	}
}

// After an end in order nothing is lost, and nothing is said.
func TestAnEndInOrderIsNoKill(t *testing.T) {
	a := newMirrored(t, 8, testLog, Options{})
	a.sync()
	a.put(testBlock, filled(2, 512))
	mustWrite(t, a.d, 3*testBlock, filled(3, testBlock))
	if err := a.d.Close(); err != nil {
		t.Fatal(err)
	}
	if log := a.emptied(); strings.Contains(log, "may be undone") {
		t.Errorf("it is taken for a kill: %s", log)
	}
	mustRead(t, a.d, testBlock, filled(2, 512))
	mustRead(t, a.d, 3*testBlock, filled(3, testBlock))
}
