package lazy

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
)

// newMirrored is an alive with memory that outlives its process.
func newMirrored(t *testing.T, n, log int64, o Options) *alive {
	t.Helper()
	a := newAliveWith(t, n, log, o)
	a.p.kill()
	_ = a.d.Close() // it is dead
	a.boot = new(bootMemory)
	a.start(newProcess(nil, -1))
	return a
}

// restarts is kill -9 and a start, n times.
func (a *alive) restarts(n int) {
	a.t.Helper()
	kept := a.boot.kept
	for range n {
		a.crash()
	}
	if a.boot.kept != kept+n {
		a.t.Errorf("of %d starts after a kill %d believed what was there", n, a.boot.kept-kept)
	}
}

// A is flushed by way of the log, B is written over it, and C is written to a missing
// block; the process is killed. B and C are there, however often it is killed, and a
// flush makes them durable. (fault F2, trap I9)
func TestAKillUndoesNothingThatWasAnswered(t *testing.T) {
	for _, log := range []int64{0, testLog} {
		a := newMirrored(t, 8, log, Options{})
		mustWrite(t, a.s, 4*testBlock, filled(1, testBlock))
		a.sync()
		mustWrite(t, a.d, testBlock, filled(2, 512)) // A
		a.sync()
		mustWrite(t, a.d, testBlock, filled(3, 512))         // B
		mustWrite(t, a.d, 2*testBlock, filled(4, testBlock)) // C
		mustWrite(t, a.d, 3*testBlock+512, filled(5, 1024))
		mustWrite(t, a.d, 4*testBlock, filled(6, 512))
		if err := a.d.TrimAtContext(t.Context(), 5*testBlock, testBlock); err != nil {
			t.Fatal(err)
		}
		mustWrite(t, a.s, 6*testBlock, filled(1, testBlock))
		mustWrite(t, a.d, 6*testBlock+512, filled(7, 512))
		want := func() {
			t.Helper()
			mustRead(t, a.d, testBlock, filled(3, 512))
			mustRead(t, a.d, 2*testBlock, filled(4, testBlock))
			mustRead(t, a.d, 3*testBlock+512, filled(5, 1024))
			mustRead(t, a.d, 4*testBlock, filled(6, 512))
			mustRead(t, a.d, 5*testBlock, make([]byte, testBlock))
			mustRead(t, a.d, 6*testBlock+512, filled(7, 512))
		}
		for range 3 {
			a.restarts(2)
			want()
		}
		a.sync()
		a.cut(false, false)
		want()
		a.restarts(1)
		mustWrite(t, a.s, 0, filled(1, 8*testBlock))
		want()
		mustRead(t, a.d, testBlock+512, filled(1, testBlock-512))
		mustRead(t, a.d, 3*testBlock, filled(1, 512))
	}
}

// A block that came from the source and was written to since is not taken for what the
// source has, after a kill either. (fault F2, trap D8)
func TestAKillKeepsWhichBlocksAreAsTheyCame(t *testing.T) {
	a := newMirrored(t, 8, 0, Options{})
	mustWrite(t, a.s, 0, filled(1, 8*testBlock))
	a.sync()
	mustWrite(t, a.d, 3*testBlock+512, filled(2, 512))
	a.restarts(2)
	for block := range int64(8) {
		if got := a.d.Unmodified(block * testBlock); got != (block != 3) {
			t.Errorf("block %d is unmodified: %t", block, got)
		}
	}
}

// After a power cut the log is laid over the disk, also by a process that is killed
// while it does so, and that had memory for a mirror by then. (fault F2, trap I9)
func TestTheLogIsLaidAfterAPowerCutAlsoWhenThatIsInterrupted(t *testing.T) {
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
		a.start(newProcess(nil, -1))
		mustRead(t, a.d, testBlock, filled(2, 512))
		mustRead(t, a.d, 3*testBlock, filled(4, 512))
	}
}

// What the source took back is not claimed by a process that is started after a kill,
// and neither is what was here before the source began anew. (fault F2, trap M13)
func TestAKillKeepsWhatWasTakenBack(t *testing.T) {
	a := newMirrored(t, 8, 0, Options{Standby: true})
	mustWrite(t, a.s, 0, filled(1, 8*testBlock))
	if err := a.s.DirtyList([]uint32{1, 2, 5}); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, a.s, 5*testBlock, filled(2, testBlock))
	a.restarts(1)
	if got, want := a.local(), [][2]int64{{0, 1}, {3, 5}}; !slices.Equal(got, want) {
		t.Errorf("local %v, want %v", got, want)
	}
	if err := a.d.Restart(UUID{7}, 8); err != nil {
		t.Fatal(err)
	}
	a.restarts(1)
	if got := a.local(); len(got) != 0 {
		t.Errorf("after the source has begun anew %v is claimed", got)
	}
}

// The mirror goes with one state of one map. A map that is older than it (put back
// from a backup), or newer (a process without a mirror has had it), is believed alone.
// (fault F2, trap I5)
func TestAMirrorOfAnotherTimeIsNotBelieved(t *testing.T) {
	older := func(t *testing.T, a *alive) {
		backup := [2][]byte{a.disk.bytes(), a.file.bytes()}
		mustWrite(t, a.s, testBlock, filled(2, testBlock))
		a.sync()
		mustWrite(t, a.s, 2*testBlock, filled(3, testBlock))
		a.p.kill()
		_ = a.d.Close() // it is dead
		a.disk, a.file = crashFileOf(backup[0], sectorSize), crashFileOf(backup[1], 64)
	}
	newer := func(t *testing.T, a *alive) {
		mustWrite(t, a.s, testBlock, filled(2, testBlock))
		a.p.kill()
		_ = a.d.Close() // it is dead
		boot := a.boot
		a.boot = nil
		a.start(newProcess(nil, -1))
		a.p.kill()
		_ = a.d.Close() // it is dead
		a.boot = boot
	}
	for name, meanwhile := range map[string]func(*testing.T, *alive){"older": older, "newer": newer} {
		t.Run(name, func(t *testing.T) {
			a := newMirrored(t, 8, 0, Options{})
			mustWrite(t, a.s, 0, filled(1, testBlock))
			a.sync()
			meanwhile(t, a)
			a.start(newProcess(nil, -1))
			if got, want := a.local(), [][2]int64{{0, 1}}; !slices.Equal(got, want) {
				t.Errorf("local %v, want %v", got, want)
			}
			mustWrite(t, a.d, 3*testBlock, filled(3, testBlock))
			a.restarts(1) // the new one counts again
			mustRead(t, a.d, 3*testBlock, filled(3, testBlock))
		})
	}
}

// A process that has seen a sync fail leaves no mirror that is believed: what it says
// may be in the cache only. (fault F3, trap I10)
func TestAMirrorOfAFailedSyncIsNotBelieved(t *testing.T) {
	for _, what := range []string{"sync disk", "sync map"} {
		a := newMirrored(t, 8, testLog, Options{})
		a.sync()
		a.put(testBlock, filled(2, 512))
		mustWrite(t, a.d, 3*testBlock, filled(3, testBlock))
		if err := a.d.TrimAtContext(t.Context(), 5*testBlock, testBlock); err != nil { // it is not logged
			t.Fatal(err)
		}
		a.badSync(what, true)
		if a.d.Sync() == nil {
			t.Fatal("a flush did not fail")
		}
		a.crash()
		if got := a.local(); len(got) != 0 {
			t.Errorf("after a failed %s %v is believed", what, got)
		}
		mustRead(t, a.d, testBlock, filled(2, 512))
		mustWrite(t, a.d, 3*testBlock, filled(4, testBlock))
		a.restarts(1)
		mustRead(t, a.d, 3*testBlock, filled(4, testBlock))
		a.sync()
		a.cut(false, false)
		mustRead(t, a.d, 3*testBlock, filled(4, testBlock))
	}
}

// The process is killed between a failed sync of the disk and the mark in its map: the
// mirror knows of it. (fault F3, trap I10)
func TestAFailedSyncIsKnownAlsoWhenTheMapWasNotMarked(t *testing.T) {
	a := newMirrored(t, 8, testLog, Options{})
	a.sync()
	a.put(testBlock, filled(2, 512))
	mustWrite(t, a.d, 3*testBlock, filled(3, testBlock))
	if err := a.d.TrimAtContext(t.Context(), 5*testBlock, testBlock); err != nil { // it is not logged
		t.Fatal(err)
	}
	failed := false
	a.p.hook = func(op string) error {
		if failed && op == "write map" {
			a.p.kill()
		}
		if op == "sync disk" {
			failed = true
			a.disk.failSync(nil)
			return syscall.EIO
		}
		return nil
	}
	if a.d.Sync() == nil {
		t.Fatal("a flush did not fail")
	}
	a.crash()
	if got := a.local(); len(got) != 0 {
		t.Errorf("%v is believed", got)
	}
	mustRead(t, a.d, testBlock, filled(2, 512))
	mustWrite(t, a.d, 3*testBlock, filled(4, testBlock))
	a.sync()
	a.cut(false, false)
	mustRead(t, a.d, 3*testBlock, filled(4, testBlock))
}

// A real file: the mirror outlives a process that does not close it, and is gone when
// one ends in order or the disk is complete. Without a place for it all works, and
// says so. (fault F2, trap I9)
func TestTheMirrorIsAFileThatGoesWhenItIsNotNeeded(t *testing.T) {
	dir := t.TempDir()
	run := filepath.Join(dir, "run")
	m, err := CreateMap(filepath.Join(dir, "map"), Identity{Size: 8 * testBlock, BlockSize: testBlock})
	if err != nil {
		t.Fatal(err)
	}
	files := func() int {
		t.Helper()
		names, err := os.ReadDir(run)
		if err != nil {
			t.Fatal(err)
		}
		return len(names)
	}
	disk := newMemDisk(8 * testBlock)
	useMap(t, m, Options{RunDir: run}, func(d *Device) {
		mustWrite(t, d, testBlock, filled(1, 512))
		if n := files(); n != 1 {
			t.Errorf("%d files while the device is used", n)
		}
	})
	if n := files(); n != 0 {
		t.Errorf("%d files after an end in order", n)
	}
	if m, err = OpenMap(m.Path(), Identity{}); err != nil {
		t.Fatal(err)
	}
	d := newDeviceOn(t, disk, Options{RunDir: run, Map: m})
	mustWrite(t, d.Attach(&asks{}), 0, filled(1, 8*testBlock))
	if err := d.Complete(); err != nil {
		t.Fatal(err)
	}
	if n := files(); n != 0 {
		t.Errorf("%d files when all is complete", n)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	blocked := filepath.Join(dir, "file")
	if err := os.WriteFile(blocked, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if m, err = CreateMap(filepath.Join(dir, "other"), Identity{Size: 8 * testBlock, BlockSize: testBlock}); err != nil {
		t.Fatal(err)
	}
	useMap(t, m, Options{RunDir: blocked}, func(d *Device) { mustWrite(t, d, testBlock, filled(1, 512)) })
}
