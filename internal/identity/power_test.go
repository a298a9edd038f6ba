package identity

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/internal/durable"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// world is a file system and disks that fail or lose power at one operation.
type world struct {
	rand  *rand.Rand
	steps int   // operations so far
	at    int   // which one fails, or is the first that does not happen
	cut   bool  // from there on nothing happens
	err   error // what the one that fails says
	late  bool  // it says so after it has happened
	rest  bool  // and so does each one after it
	fired bool

	now, safe map[string]*memFile // what the directories hold, and durably
	pending   []func(dir map[string]*memFile)
	clock     int64
	disks     []*memDisk
}

type memFile struct {
	content []byte
	locked  *memLock
	changed int64
}

type memLock struct{ file *memFile }

func (l *memLock) Content() []byte { return l.file.content }
func (l *memLock) Changed() int64  { return l.file.changed }
func (l *memLock) Close() error {
	if l.file.locked == l {
		l.file.locked = nil
	}
	return nil
}

func newWorld(seed uint64) *world {
	return &world{rand: rand.New(rand.NewPCG(seed, 1)), at: -1, now: make(map[string]*memFile), safe: make(map[string]*memFile), clock: 1000}
}

// do counts an operation that changes something.
func (w *world) do(change func()) error {
	n := w.steps
	w.steps++
	switch {
	case w.cut && w.at >= 0 && n >= w.at:
		w.fired = true
		return errors.New("the power is gone")
	case n == w.at, w.rest && w.at >= 0 && n > w.at:
		w.fired = true
		if w.late {
			change()
		}
		return w.err
	}
	change()
	return nil
}

func (w *world) tick() int64 { w.clock++; return w.clock }

// change changes what a directory holds, durably only after SyncDir.
func (w *world) change(do func(dir map[string]*memFile)) {
	do(w.now)
	w.pending = append(w.pending, do)
}

func (w *world) Open(path string) (durable.File, error) {
	f := w.now[path]
	switch {
	case f == nil:
		return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
	case f.locked != nil:
		return nil, durable.ErrInUse
	}
	f.locked = &memLock{f}
	return f.locked, nil
}

func (w *world) Read(path string) ([]byte, error) {
	if f := w.now[path]; f != nil {
		return f.content, nil
	}
	return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
}

func (w *world) Create(path string, content []byte) (durable.File, error) {
	f := &memFile{content: content, changed: w.tick()}
	f.locked = &memLock{f}
	err := w.do(func() { w.change(func(dir map[string]*memFile) { dir[path] = f }) })
	if err != nil {
		return nil, err
	}
	return f.locked, nil
}

func (w *world) Rename(from, to string) error {
	f := w.now[from]
	return w.do(func() {
		f.changed = w.tick()
		w.change(func(dir map[string]*memFile) { delete(dir, from); dir[to] = f })
	})
}

func (w *world) Claim(from, to string) error {
	if w.now[to] != nil {
		return fs.ErrExist
	}
	return w.Rename(from, to)
}

func (w *world) Remove(path string) error {
	if w.now[path] == nil {
		return nil
	}
	return w.do(func() { w.change(func(dir map[string]*memFile) { delete(dir, path) }) })
}

func (w *world) SyncDir(string) error {
	return w.do(func() {
		for _, p := range w.pending {
			p(w.safe)
		}
		w.pending = nil
	})
}

func (w *world) Names(string) ([]string, error) {
	var all []string
	for path := range w.now {
		all = append(all, filepath.Base(path))
	}
	return all, nil
}

// kill ends the process: what it has done stays.
func (w *world) kill() {
	for _, f := range w.now {
		f.locked = nil
	}
	w.at, w.cut = -1, false
}

// powerCut keeps any part of what is not durable.
func (w *world) powerCut() {
	for _, p := range w.pending {
		if w.rand.IntN(2) == 0 {
			p(w.safe)
		}
	}
	w.pending, w.now = nil, maps.Clone(w.safe)
	for _, d := range w.disks {
		if w.rand.IntN(2) == 0 {
			d.attr = d.safeAttr
		}
		d.safeAttr = d.attr
	}
	w.kill()
}

// memDisk is a disk in a world.
type memDisk struct {
	w              *world
	path           string
	inode          uint64
	attr, safeAttr []byte
	modTime, cTime int64
}

func (w *world) disk(path string) *memDisk {
	d := &memDisk{w: w, path: path, inode: uint64(len(w.disks) + 10), modTime: w.tick()}
	d.cTime = d.modTime
	w.disks = append(w.disks, d)
	return d
}

func (d *memDisk) Path() string        { return d.path }
func (d *memDisk) Size() uint64        { return 4096 }
func (d *memDisk) IsBlockDevice() bool { return false }
func (d *memDisk) Stamp() (sources.Stamp, error) {
	return sources.Stamp{Size: 4096, Dev: 1, Inode: d.inode, Birth: 1, ModTime: d.modTime, ChangeTime: d.cTime, BootID: "b"}, nil
}
func (d *memDisk) Xattr(string) ([]byte, error) { return d.attr, nil }
func (d *memDisk) SetXattr(_ string, value []byte) error {
	return d.w.do(func() { d.attr, d.cTime = slices.Clone(value), d.w.tick() })
}
func (d *memDisk) RemoveXattr(string) error {
	return d.w.do(func() { d.attr, d.cTime = nil, d.w.tick() })
}
func (d *memDisk) SyncXattr() error { return d.w.do(func() { d.safeAttr = d.attr }) }
func (d *memDisk) write()           { d.modTime = d.w.tick(); d.cTime = d.modTime }

// outcome is what a source has done before it failed or ended.
type outcome struct {
	prepared bool
	told     bool // the destination: it may be live
	back     bool // the source serves on after a handoff that came to nothing
	unsure   bool // it serves nothing, and says so
	open     bool // it had the disks at all
	renamed  bool // a state file had got its new name
}

// source runs a source over the disks of w, up to the end of a handoff.
func (w *world) source(o Options) (out outcome, err error) {
	o.Files = w
	disks := w.specs()
	l, err := Open(disks, o)
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	out.open = true
	if l.HandedOff() {
		out.told = true
		return out, errors.Join(l.Taken(), l.Complete())
	}
	for _, d := range disks {
		if err := l.Confirm(d.Name, ownersOf(disks)[d.Name]); err != nil {
			return out, err
		}
	}
	if err := l.Prepare(ownersOf(disks)); err != nil {
		return out, err
	}
	out.prepared = true
	if o.Live {
		for _, d := range w.disks {
			d.write()
		}
	}
	err = l.HandOff()
	if err == nil && w.cut && w.fired {
		return out, nil // the process is gone: no destination was told
	}
	if err != nil {
		for _, d := range l.staged.disks {
			out.renamed = out.renamed || d.renamed
		}
		if back := l.TakeBack(); back != nil {
			out.unsure = true
			return out, errors.Join(err, back)
		}
		out.back = true
		if l.HandedOff() {
			return out, errors.New("it was taken back, and yet handed off")
		}
		return out, err
	}
	out.told = true
	return out, errors.Join(l.Taken(), l.Complete())
}

func (w *world) specs() []Spec {
	var all []Spec
	for i, d := range w.disks {
		all = append(all, Spec{Disk: d, Name: fmt.Sprint("disk", i)})
	}
	return all
}

// check opens the disks anew and holds that against what has happened.
func (w *world) check(t *testing.T, out outcome, o Options) {
	t.Helper()
	o.Files = w
	disks := w.specs()
	for _, d := range disks { // as dest does
		at, err := look(w, d.Disk, "")
		require.NoError(t, err)
		require.False(t, out.told && at.note() == nil, "dest would serve it")
		require.False(t, out.back && at.note() != nil && at.note().Undecided, "the state file knows")
	}
	if out.told { // each alone, and served: never
		for _, d := range disks {
			alone := o
			alone.Live = true
			l, err := Open([]Spec{d}, alone)
			if err == nil {
				require.True(t, l.HandedOff(), "two owners")
				require.NoError(t, l.Close())
			}
		}
	}
	l, err := Open(disks, o)
	require.NoError(t, err)
	defer func() { require.NoError(t, l.Close()) }()
	switch {
	case out.told:
		require.True(t, l.HandedOff(), "two owners")
		owner, ok := l.Owner("disk1")
		require.True(t, ok)
		require.Equal(t, migrate.Device{2}, owner.Device)
	case out.back, !out.prepared:
		require.False(t, l.HandedOff(), "no owner")
	}
}

func kinds(t *testing.T, do func(t *testing.T, o Options)) {
	for _, o := range []Options{{}, {Live: true}} {
		t.Run(fmt.Sprintf("live %v", o.Live), func(t *testing.T) { do(t, o) })
	}
}

// TestPowerCutInAHandoff: the power goes before each operation in turn, and of
// what is not durable any part stays. Never are there two owners, nor none, and
// the note is not erased (faults A1, A10, B1; traps I1, I11).
func TestPowerCutInAHandoffLeavesOneOwner(t *testing.T) {
	kinds(t, func(t *testing.T, o Options) {
		for n, fired := 0, true; fired; n++ {
			for seed := range uint64(40) {
				w := newWorld(seed)
				w.disk("/vm/a.raw")
				w.disk("/other/b.raw")
				w.at, w.cut = n, true
				out, err := w.source(o)
				fired = w.fired
				require.True(t, fired || err == nil && out.told)
				w.powerCut()
				w.check(t, out, o)
			}
		}
	})
}

// TestAnOperationOfAHandoffFails: each in turn, before or after it has taken
// effect. Then the process is killed, or loses power. Without room nothing has
// happened, and the disks are served on (fault B1; trap I11).
func TestHandoffInWhichAnOperationFailsLeavesOneOwner(t *testing.T) {
	kinds(t, func(t *testing.T, o Options) {
		for n, fired := 0, true; fired; n++ {
			for seed := range uint64(16) {
				w := newWorld(seed)
				w.disk("/vm/a.raw")
				w.disk("/other/b.raw")
				w.at, w.err, w.late = n, syscall.ENOSPC, seed%2 == 1
				out, err := w.source(o)
				fired = w.fired
				require.True(t, err != nil || out.told)
				require.False(t, out.unsure, "one operation failed, and the disk was given up: %v", err)
				if seed%4 < 2 {
					w.kill()
				} else {
					w.powerCut()
				}
				w.check(t, out, o)
			}
		}
	})
}

// TestNoRoom: from one operation on nothing can be written for lack of room, and
// names can still be changed or not. The disks are served on, and go when there is
// room (fault B1).
func TestDisksAreServedOnWithoutRoomForANote(t *testing.T) {
	kinds(t, func(t *testing.T, o Options) {
		w := newWorld(1)
		w.disk("/vm/a.raw")
		w.disk("/other/b.raw")
		disks := w.specs()
		o.Files = w
		l, err := Open(disks, o)
		require.NoError(t, err)
		for n := 0; ; n++ {
			w.steps, w.at, w.err, w.fired = 0, n, syscall.ENOSPC, false
			err := l.Prepare(ownersOf(disks))
			if !w.fired {
				require.NoError(t, err)
				break
			}
			require.ErrorIs(t, err, syscall.ENOSPC)
			require.False(t, l.HandedOff())
			w.at = -1
			look, err := look(w, w.disks[0], "")
			require.NoError(t, err)
			require.Nil(t, look.note())
		}
		w.at = -1
		require.NoError(t, l.HandOff())
		require.NoError(t, l.Taken())
		require.NoError(t, l.Close())
		w.check(t, outcome{told: true}, o)
	})
}

// From one operation on all fail, as on a file system that has become read-only.
// As long as no state file has got its new name the disks are served on; after that
// nothing is served, since it is not known what is durable, and there are never two
// owners (fault B1).
func TestHandoffOnAFileSystemThatFailsLeavesOneOwner(t *testing.T) {
	kinds(t, func(t *testing.T, o Options) {
		unsure := 0
		for n, fired := 0, true; fired; n++ {
			for seed := range uint64(16) {
				w := newWorld(seed)
				w.disk("/vm/a.raw")
				w.disk("/other/b.raw")
				w.at, w.err, w.rest = n, syscall.EROFS, true
				out, err := w.source(o)
				fired = w.fired
				require.True(t, err != nil || out.told)
				if out.unsure {
					require.True(t, out.renamed, "nothing was published, and the disk was given up: %v", err)
					unsure++
				}
				if fired && out.told {
					continue // in memory only, or known to be incomplete
				}
				if seed%2 == 0 {
					w.kill()
				} else {
					w.powerCut()
				}
				w.check(t, out, o)
			}
		}
		require.Positive(t, unsure)
	})
}

// TestPowerCutInAReclaim: afterwards the disks are this host's, or still the
// destination's and can be reclaimed.
func TestPowerCutInAReclaimOrReturnLosesNoDisk(t *testing.T) {
	kinds(t, func(t *testing.T, o Options) {
		for _, reclaim := range []bool{true, false} {
			for n, fired := 0, true; fired; n++ {
				for seed := range uint64(20) {
					w := newWorld(seed)
					w.disk("/vm/a.raw")
					w.disk("/other/b.raw")
					out, err := w.source(o)
					require.NoError(t, err)
					require.True(t, out.told)
					w.steps, w.at, w.cut = 0, n, true
					again := o
					again.Files, again.Reclaim = w, true
					if reclaim {
						l, err := Open(w.specs(), again)
						if err == nil {
							require.NoError(t, l.disks.unlock())
						}
					} else {
						for _, d := range w.disks {
							_ = endNote(w, d, "")
						}
					}
					fired = w.fired
					w.powerCut()
					l, err := Open(w.specs(), again)
					require.NoError(t, err)
					require.False(t, l.HandedOff())
					require.NoError(t, l.Close())
					again.Reclaim = false
					l, err = Open(w.specs(), again)
					require.NoError(t, err, "the marks of the past count no more")
					require.NoError(t, l.Close())
				}
			}
		}
	})
}
