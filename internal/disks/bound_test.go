package disks

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
)

const (
	testBlock = 4096
	testSize  = 64 * testBlock
)

// noSource is asked for blocks in vain.
type noSource struct{}

func (noSource) NeedAt(int64, int64)     {}
func (noSource) DontNeedAt(int64, int64) {}

// life is one run of dest over a disk: blocks [lo, hi) arrive. With kill it ends as if
// it had been killed after its last save.
type life struct {
	lo, hi   int64
	complete bool
	kill     bool
}

// run lives a life on the disk b.raw in dir, and returns what refused it.
func run(t *testing.T, specs []Spec, o Options, l life) error {
	t.Helper()
	set, err := OpenDestination(specs, o)
	if err != nil {
		return err
	}
	defer func() { require.NoError(t, set.Close()) }()
	var d *Disk
	if resumed := set.Resumed(); len(resumed) > 0 {
		d = resumed[0]
	} else if d, err = set.Open(announce("a", testSize)); err != nil {
		return err
	}
	dev, err := lazy.New(d.File, lazy.Options{Map: d.Map, Standby: true})
	require.NoError(t, err)
	s := dev.Attach(noSource{})
	for b := l.lo; b < l.hi; b++ {
		_, err := s.WriteAt(bytes.Repeat([]byte{byte(b + 1)}, testBlock), b*testBlock)
		require.NoError(t, err)
	}
	require.NoError(t, s.Flush())
	if l.complete {
		require.NoError(t, dev.GoLive())
		require.NoError(t, dev.Complete())
	}
	require.Eventually(t, func() bool { return !d.Map.Binding().Unsettled }, 10*time.Second, time.Millisecond, "the mark is durable")
	where := d.Map.Path()
	before, err := os.ReadFile(where)
	require.NoError(t, err)
	mark, err := d.Xattr(markName)
	if !d.IsBlockDevice() {
		require.NoError(t, err)
	}
	require.NoError(t, dev.Close())
	require.NoError(t, d.Close())
	if l.kill { // nothing of a clean end is in the map, nor at the disk
		require.NoError(t, os.WriteFile(where, before, 0o600))
		if !d.IsBlockDevice() {
			require.NoError(t, unix.Setxattr(d.Path(), markName, mark, 0))
		}
	}
	return nil
}

// copyFile copies contents and mark into to, in place if it exists.
func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(to, b, 0o600))
	v := make([]byte, 4096)
	if n, err := unix.Getxattr(from, markName, v); err == nil {
		require.NoError(t, unix.Setxattr(to, markName, v[:n], 0))
	}
}

// TestAnotherDiskOrAnotherStateIsRefused: whatever lies where the disk of a map should
// is not served, not written and not called complete, unless it is that disk as dest has
// left it (fault F1, trap I6).
func TestAnotherDiskOrAnotherStateIsRefused(t *testing.T) {
	const disk, where, old, oldMap = "b.raw", "b.raw" + MapSuffix, "old", "old.map"
	same := func(path string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) { copyFile(t, filepath.Join(dir, old), filepath.Join(dir, path)) }
	}
	for name, c := range map[string]struct {
		last  life
		spoil func(t *testing.T, dir string)
		want  string
	}{
		"another file": {life{lo: 10, hi: 20}, func(t *testing.T, dir string) {
			file(t, dir+"/other", strings.Repeat("P", testSize))
			require.NoError(t, os.Rename(dir+"/other", filepath.Join(dir, disk)))
		}, "inode"},
		"another file, killed": {life{lo: 10, hi: 20, kill: true}, func(t *testing.T, dir string) {
			file(t, dir+"/other", strings.Repeat("P", testSize))
			require.NoError(t, os.Rename(dir+"/other", filepath.Join(dir, disk)))
		}, "inode"},
		"an older state, in place":         {life{lo: 10, hi: 20}, same(disk), "older state"},
		"an older state, in place, killed": {life{lo: 10, hi: 20, kill: true}, same(disk), "older state"},
		"an older state by another file": {life{lo: 10, hi: 20, kill: true}, func(t *testing.T, dir string) {
			copyFile(t, dir+"/"+old, dir+"/restored")
			require.NoError(t, os.Rename(dir+"/restored", filepath.Join(dir, disk)))
		}, "inode"},
		"an older map": {life{lo: 10, hi: 20}, func(t *testing.T, dir string) {
			copyFile(t, dir+"/"+oldMap, filepath.Join(dir, where))
		}, "older state"},
		"a complete map beside a disk from before": {life{lo: 0, hi: 64, complete: true}, same(disk), "older state"},
		"without its mark": {life{lo: 10, hi: 20, kill: true}, func(t *testing.T, dir string) {
			require.NoError(t, unix.Removexattr(filepath.Join(dir, disk), markName))
		}, "no mark"},
		"written, with its time put back": {life{lo: 10, hi: 20}, func(t *testing.T, dir string) {
			path := filepath.Join(dir, disk)
			info, err := os.Stat(path)
			require.NoError(t, err)
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			require.NoError(t, err)
			_, err = f.WriteAt([]byte("x"), 30*testBlock+17) // of a block that is missing
			require.NoError(t, err)
			require.NoError(t, f.Close())
			require.NoError(t, os.Chtimes(path, time.Time{}, info.ModTime()))
		}, "changed since dest ended"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			specs := parse(t, dir, disk)
			require.NoError(t, run(t, specs, Options{}, life{lo: 0, hi: 10}))
			copyFile(t, filepath.Join(dir, disk), dir+"/"+old)
			copyFile(t, filepath.Join(dir, where), dir+"/"+oldMap)
			require.NoError(t, run(t, specs, Options{}, c.last), "the right disk goes on")
			c.spoil(t, dir)
			read := func() (all [2]string) {
				for i, name := range []string{disk, where} {
					b, err := os.ReadFile(filepath.Join(dir, name))
					require.NoError(t, err)
					all[i] = string(b)
				}
				return all
			}
			before := read()
			err := run(t, specs, Options{}, life{lo: 20, hi: 30})
			require.ErrorContains(t, err, c.want)
			require.ErrorContains(t, err, "--disk-moved")
			require.ErrorContains(t, err, filepath.Join(dir, where))
			require.True(t, before == read(), "nothing is changed")
		})
	}
}

// TestRightDiskGoesOnAfterAnyEnd is the other side: no end of dest makes a stranger of
// the disk that it has left.
func TestRightDiskGoesOnAfterAnyEnd(t *testing.T) {
	dir := t.TempDir()
	specs := parse(t, dir, "b.raw")
	for i, l := range []life{
		{lo: 0, hi: 10}, {lo: 10, hi: 20, kill: true}, {}, {kill: true}, {kill: true}, {lo: 20, hi: 30},
		{lo: 30, hi: 64, complete: true, kill: true}, {}, {kill: true}, {},
	} {
		require.NoError(t, run(t, specs, Options{}, l), "life %d", i)
	}
	require.NoError(t, os.WriteFile(dir+"/x", nil, 0o600))
	f, err := os.OpenFile(dir+"/b.raw", os.O_RDWR, 0)
	require.NoError(t, err)
	_, err = f.WriteAt([]byte("x"), 17)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	require.NoError(t, run(t, specs, Options{}, life{}), "a complete disk may be written by others")
}

// TestMovedDiskIsTakenWhenTheOperatorVouches: a copy goes on with --disk-moved, what was
// fetched is to be compared, and another disk is refused all the same (fault F1).
func TestMovedDiskIsTakenWhenTheOperatorVouches(t *testing.T) {
	dir := t.TempDir()
	specs := parse(t, dir, "b.raw")
	require.NoError(t, run(t, specs, Options{}, life{lo: 0, hi: 20}))
	copyFile(t, dir+"/b.raw", dir+"/copy")
	file(t, dir+"/other", strings.Repeat("P", testSize))
	other, err := os.ReadFile(dir + "/other")
	require.NoError(t, err)

	require.NoError(t, os.Rename(dir+"/other", dir+"/b.raw"))
	err = run(t, specs, Options{Moved: true}, life{})
	require.ErrorContains(t, err, "are not what they were")
	require.NotContains(t, err.Error(), "--disk-moved")
	got, err := os.ReadFile(dir + "/b.raw")
	require.NoError(t, err)
	require.Equal(t, other, got)

	require.NoError(t, os.Rename(dir+"/copy", dir+"/b.raw"))
	require.ErrorContains(t, run(t, specs, Options{}, life{}), "--disk-moved")
	require.NoError(t, run(t, specs, Options{Moved: true}, life{lo: 20, hi: 21}))
	m, err := lazy.OpenMap(dir+"/b.raw"+MapSuffix, lazy.Identity{})
	require.NoError(t, err)
	require.True(t, m.Compare())
	require.NoError(t, m.Close())
	require.NoError(t, run(t, specs, Options{}, life{lo: 21, hi: 22}), "from then on it is the disk")
}

// TestMapElsewhereLeavesNoMapThatLies: --overwrite with --map leaves no other map of the
// disk, and the disk itself says that it is not whole, by any of its names (faults F12 and
// H2, trap I6).
func TestMapElsewhereLeavesNoMapThatLies(t *testing.T) {
	dir := t.TempDir()
	specs := parse(t, dir, "b.raw")
	require.NoError(t, run(t, specs, Options{}, life{lo: 0, hi: 64, complete: true}))
	files, err := OpenSource(specs, false)
	require.NoError(t, err, "complete: a plain disk")
	require.NoError(t, files[0].Close())

	elsewhere := parse(t, dir, "b.raw")
	elsewhere[0].Map = dir + "/m.map"
	require.NoError(t, run(t, elsewhere, Options{Overwrite: true}, life{lo: 0, hi: 5}))
	require.NoFileExists(t, dir+"/b.raw"+MapSuffix)
	require.NoError(t, os.Symlink("b.raw", dir+"/link"))
	require.NoError(t, os.Rename(dir+"/m.map", dir+"/moved.map"))
	for _, name := range []string{"b.raw", "link"} {
		_, err := OpenSource(parse(t, dir, name), false)
		require.ErrorContains(t, err, "is not whole", name)
		require.ErrorContains(t, err, dir+"/m.map", name)
	}
	require.NoError(t, os.Rename(dir+"/moved.map", dir+"/m.map"))
	_, err = OpenDestination(specs, Options{})
	require.ErrorContains(t, err, "give that by --map to go on", "its map is named")
	require.Equal(t, dir+"/m.map", FindMap(dir+"/link"))

	// A stale map that comes back beside the disk is refused, whatever it says.
	file(t, dir+"/letter", "somebody's")
	m, err := lazy.CreateMap(dir+"/b.raw"+MapSuffix, lazy.Identity{Size: testSize, BlockSize: testBlock})
	require.NoError(t, err)
	require.NoError(t, m.Close())
	require.ErrorContains(t, run(t, elsewhere, Options{}, life{}), "another map of the disk")
	require.NoError(t, os.Remove(dir+"/b.raw"+MapSuffix))
	require.NoError(t, run(t, elsewhere, Options{}, life{lo: 5, hi: 64, complete: true}))
	files, err = OpenSource(parse(t, dir, "link"), false)
	require.NoError(t, err, "complete: a plain disk")
	require.NoError(t, files[0].Close())
}

// TestLinkToHalfADiskIsNoSource also where no attribute says so: the map lies beside the
// file that the link leads to (fault H2).
func TestLinkToHalfADiskIsNoSource(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(dir+"/pool", 0o700))
	require.NoError(t, run(t, parse(t, dir, "pool/b.raw"), Options{}, life{lo: 0, hi: 5}))
	require.NoError(t, os.Symlink("pool/b.raw", dir+"/link"))
	require.NoError(t, os.Link(dir+"/pool/b.raw", dir+"/hard"))
	_, err := OpenSource(parse(t, dir, "hard"), false)
	require.ErrorContains(t, err, "is not whole")
	require.NoError(t, unix.Removexattr(dir+"/pool/b.raw", markName))
	_, err = OpenSource(parse(t, dir, "link"), false)
	require.ErrorContains(t, err, "is not whole")
	require.ErrorContains(t, err, dir+"/pool/b.raw"+MapSuffix)
}

// TestDestGoesOnByALink with the map beside the file that it leads to.
func TestDestGoesOnByALink(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(dir+"/pool", 0o700))
	require.NoError(t, run(t, parse(t, dir, "pool/b.raw"), Options{}, life{lo: 0, hi: 5}))
	require.NoError(t, os.Symlink("pool/b.raw", dir+"/link"))
	require.NoError(t, run(t, parse(t, dir, "link"), Options{}, life{lo: 5, hi: 10}))
	require.NoFileExists(t, dir+"/link"+MapSuffix)
}

// TestCrashBeforeTheFirstBlockBeginsAnew: a map without its disk, or with a disk that is
// one hole, was left by a crash or for want of room, and the same command goes on (fault F14).
func TestCrashBeforeTheFirstBlockBeginsAnew(t *testing.T) {
	create := func(t *testing.T, dir string) {
		m, err := lazy.CreateMap(dir+"/b.raw"+MapSuffix, lazy.Identity{Size: testSize, BlockSize: testBlock})
		require.NoError(t, err)
		require.NoError(t, m.Close())
	}
	for name, size := range map[string]int64{"no disk": -1, "a disk": testSize} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			create(t, dir)
			if size >= 0 {
				f, err := os.Create(dir + "/b.raw")
				require.NoError(t, err)
				require.NoError(t, f.Truncate(size))
				require.NoError(t, f.Close())
			}
			specs := parse(t, dir, "b.raw")
			set, err := OpenDestination(specs, Options{})
			require.NoError(t, err)
			require.Empty(t, set.Resumed())
			d, err := set.Open(announce("a", testSize))
			require.NoError(t, err)
			require.True(t, d.KnownZero)
			require.NoError(t, d.Close())
			require.NoError(t, set.Close())
			require.NoError(t, run(t, specs, Options{}, life{lo: 0, hi: 10}))
		})
	}
	t.Run("somebody's disk", func(t *testing.T) {
		dir := t.TempDir()
		create(t, dir)
		file(t, dir+"/b.raw", strings.Repeat("P", testSize))
		_, err := OpenDestination(parse(t, dir, "b.raw"), Options{})
		require.ErrorContains(t, err, "give --overwrite")
		got, err := os.ReadFile(dir + "/b.raw")
		require.NoError(t, err)
		require.Equal(t, strings.Repeat("P", testSize), string(got))
	})
	t.Run("no room for the disk", func(t *testing.T) {
		dir := t.TempDir()
		set, err := OpenDestination(parse(t, dir, "b.raw"), Options{})
		require.NoError(t, err)
		a := announce("a", 1<<62) // more than a file can have
		a.BlockSize = 1 << 30
		_, err = set.Open(a)
		require.Error(t, err)
		entries, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Empty(t, entries, "neither disk nor map is left")
	})
}

// TestLongNamesHaveMaps up to what a file system takes (fault H3).
func TestLongNamesHaveMaps(t *testing.T) {
	for _, n := range []int{200, 230, 240, 246, 247, 250, 251, 255} {
		dir := t.TempDir()
		specs := parse(t, dir, strings.Repeat("d", n))
		require.NoError(t, run(t, specs, Options{}, life{lo: 0, hi: 5}), "%d", n)
		require.NoError(t, run(t, specs, Options{}, life{lo: 5, hi: 10}), "%d", n)
		_, err := OpenSource(specs, false)
		require.ErrorContains(t, err, "is not whole", "%d", n)
	}
	dir := t.TempDir()
	name := strings.Repeat("e", 251) // .raw comes after it
	for range 2 {
		set, err := OpenDestination(nil, Options{Dir: dir})
		require.NoError(t, err)
		resumed := set.Resumed()
		if len(resumed) == 0 {
			d, err := set.Open(announce(name, testSize))
			require.NoError(t, err)
			resumed = append(resumed, d)
		}
		require.Equal(t, name, resumed[0].Name)
		require.NoError(t, resumed[0].Close())
	}
	require.NotEqual(t, beside(strings.Repeat("é", 127)+"a"), beside(strings.Repeat("é", 127)+"b"))
}

// TestMapThatWasNeverBoundIsBound when dest takes its disk again: from then on another
// disk is refused (fault F1).
func TestMapThatWasNeverBoundIsBound(t *testing.T) {
	dir := t.TempDir()
	specs := parse(t, dir, "b.raw")
	file(t, dir+"/b.raw", strings.Repeat("P", testSize))
	m, err := lazy.CreateMap(dir+"/b.raw"+MapSuffix, lazy.Identity{Size: testSize, BlockSize: testBlock, Name: "a"})
	require.NoError(t, err)
	f, err := os.OpenFile(dir+"/b.raw", os.O_RDWR, 0)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	set := &Destination{specs: specs}
	disk, err := set.existing(specs[0], testSize)
	require.NoError(t, err)
	require.Nil(t, disk)
	dev, err := lazy.New(zeroDisk{}, lazy.Options{Map: m, Standby: true})
	require.NoError(t, err)
	_, err = dev.Attach(noSource{}).WriteAt(make([]byte, testBlock), 0)
	require.NoError(t, err)
	require.NoError(t, dev.Close())
	require.NoError(t, m.Close())

	require.NoError(t, run(t, specs, Options{}, life{}))
	file(t, dir+"/other", strings.Repeat("P", testSize))
	require.NoError(t, os.Rename(dir+"/other", dir+"/b.raw"))
	require.ErrorContains(t, run(t, specs, Options{}, life{}), "--disk-moved")
}

// zeroDisk takes what is written and has nothing.
type zeroDisk struct{}

func (zeroDisk) ReadAt(p []byte, _ int64) (int, error)  { clear(p); return len(p), nil }
func (zeroDisk) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (zeroDisk) Size() uint64                           { return testSize }
func (zeroDisk) Flush() error                           { return nil }
func (zeroDisk) Close() error                           { return nil }
