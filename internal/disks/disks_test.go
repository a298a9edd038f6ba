package disks

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

// parse makes specs of flags whose paths lie in dir.
func parse(t *testing.T, dir string, flags ...string) []Spec {
	t.Helper()
	specs, err := ParseSpecs(flags)
	require.NoError(t, err)
	for i := range specs {
		specs[i].Path = filepath.Join(dir, specs[i].Path)
	}
	return specs
}

func announce(name string, size uint64) migrate.Announcement {
	return migrate.Announcement{Name: name, Size: size, BlockSize: 4096}
}

func file(t *testing.T, path, content string) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
}

func TestMissingDiskIsMadeSparse(t *testing.T) {
	dir := t.TempDir()
	set, err := OpenDestination(parse(t, dir, "b.raw"), Options{})
	require.NoError(t, err)
	require.Equal(t, 1, set.Expected())
	require.NoFileExists(t, dir+"/b.raw", "nothing is made before the source has said the size")
	d, err := set.Open(announce("from the source", 1<<30))
	require.NoError(t, err)
	require.Equal(t, "from the source", d.Name)
	require.True(t, d.KnownZero)
	require.EqualValues(t, 1<<30, d.Size())
	require.NoError(t, d.Close())
	require.NoError(t, set.Close())
}

func TestExistingDiskNeedsOverwrite(t *testing.T) {
	dir := t.TempDir()
	file(t, dir+"/b.raw", "precious")
	_, err := OpenDestination(parse(t, dir, "b.raw"), Options{})
	require.ErrorContains(t, err, "exists: give --overwrite")
	got, err := os.ReadFile(dir + "/b.raw")
	require.NoError(t, err)
	require.Equal(t, "precious", string(got))
}

func TestOverwrittenDiskKeepsItsSizeAndIsNotTakenForZero(t *testing.T) {
	for name, before := range map[string]string{"shorter": "abc", "longer": "0123456789", "empty": "", "equal": "12345678"} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			file(t, dir+"/b.raw", before)
			set, err := OpenDestination(parse(t, dir, "b.raw"), Options{Overwrite: true})
			require.NoError(t, err)
			info, err := os.Stat(dir + "/b.raw")
			require.NoError(t, err)
			require.EqualValues(t, len(before), info.Size(), "nothing changes before the source has come")
			d, err := set.Open(announce("a", 8))
			if n := len(before); n != 0 && n != 8 {
				require.ErrorContains(t, err, fmt.Sprintf("b.raw has %d bytes, the source's disk 8: ", n))
				got, err := os.ReadFile(dir + "/b.raw")
				require.NoError(t, err)
				require.Equal(t, before, string(got))
				require.NoFileExists(t, dir+"/b.raw"+MapSuffix)
				_, err = OpenSource(parse(t, dir, "b.raw"), false)
				require.ErrorContains(t, err, "in use", "it waits for a source that fits")
				d, err = set.Open(announce("a", uint64(n)))
				require.NoError(t, err)
				require.NoError(t, d.Close())
				require.NoError(t, set.Close())
				return
			}
			require.NoError(t, err)
			require.False(t, d.KnownZero)
			require.EqualValues(t, 8, d.Size())
			require.NoError(t, d.Close())
			require.NoError(t, set.Close())
		})
	}
}

func TestDiskInUseIsRefusedBeforeAnythingIsSent(t *testing.T) {
	dir := t.TempDir()
	file(t, dir+"/a.raw", "12345678")
	specs := parse(t, dir, "a.raw")
	files, err := OpenSource(specs, false)
	require.NoError(t, err)
	_, err = OpenDestination(specs, Options{Overwrite: true})
	require.ErrorContains(t, err, "in use")
	require.NoError(t, files[0].Close())

	set, err := OpenDestination(specs, Options{Overwrite: true})
	require.NoError(t, err)
	_, err = OpenSource(specs, false)
	require.ErrorContains(t, err, "in use")
	require.NoError(t, set.Close())
	files, err = OpenSource(specs, false)
	require.NoError(t, err, "closing lets go of disks that were not asked for")
	require.NoError(t, files[0].Close())
}

func TestDisksAreFoundByName(t *testing.T) {
	dir := t.TempDir()
	set, err := OpenDestination(parse(t, dir, "root=x.raw", "data.raw"), Options{})
	require.NoError(t, err)
	require.Equal(t, 2, set.Expected())
	d, err := set.Open(announce("root", 100))
	require.NoError(t, err)
	require.Equal(t, dir+"/x.raw", d.Path())
	require.Equal(t, "root", d.Name)
	require.NoError(t, d.Close())
	_, err = set.Open(announce("x", 100))
	require.ErrorContains(t, err, `no --disk is called "x"`)

	named, err := OpenDestination(parse(t, dir, "root=y.raw"), Options{})
	require.NoError(t, err)
	_, err = named.Open(announce("other", 100))
	require.ErrorContains(t, err, `no --disk is called "other"`)
	require.NoFileExists(t, dir+"/y.raw")
}

func TestSourceWithoutNameGetsTheFiles(t *testing.T) {
	set, err := OpenDestination(parse(t, t.TempDir(), "b.raw"), Options{})
	require.NoError(t, err)
	d, err := set.Open(announce("", 100))
	require.NoError(t, err)
	require.Equal(t, "b", d.Name)
	require.NoError(t, d.Close())
}

// TestHostileNameNeverBecomesAPath is trap P7.
func TestHostileNameNeverBecomesAPath(t *testing.T) {
	outer := t.TempDir()
	dir := filepath.Join(outer, "disks")
	require.NoError(t, os.Mkdir(dir, 0o700))
	set, err := OpenDestination(nil, Options{Dir: dir, Overwrite: true})
	require.NoError(t, err)
	require.Zero(t, set.Expected())
	for _, name := range hostileNames {
		_, err := set.Open(announce(name, 100))
		require.Error(t, err, "%.20q", name)
	}
	for _, d := range []string{outer, dir} {
		entries, err := os.ReadDir(d)
		require.NoError(t, err)
		require.LessOrEqual(t, len(entries), 1)
	}
	d, err := set.Open(announce("vm-1", 100))
	require.NoError(t, err)
	require.Equal(t, dir+"/vm-1.raw", d.Path())
	require.NoError(t, d.Close())

	again, err := OpenDestination(nil, Options{Dir: dir})
	require.NoError(t, err)
	resumed := again.Resumed()
	require.Len(t, resumed, 1, "the disk and its map are here")
	require.Equal(t, "vm-1", resumed[0].Name)
	require.NoError(t, resumed[0].Close())
	require.NoError(t, os.Remove(dir+"/vm-1.raw"+MapSuffix))
	careful, err := OpenDestination(nil, Options{Dir: dir})
	require.NoError(t, err)
	_, err = careful.Open(announce("vm-1", 100))
	require.ErrorContains(t, err, "exists")
}

// TestDiskThatDoesNotFitItsMapIsRefused is trap D7.
func TestDiskThatDoesNotFitItsMapIsRefused(t *testing.T) {
	for name, spoil := range map[string]func(disk, where string) error{
		"shrunk":  func(disk, _ string) error { return os.Truncate(disk, 100) },
		"grown":   func(disk, _ string) error { return os.Truncate(disk, 1<<20) },
		"gone":    func(disk, _ string) error { return os.Remove(disk) },
		"cut":     func(_, where string) error { return os.Truncate(where, 100) },
		"foreign": func(_, where string) error { return os.WriteFile(where, []byte("somebody's"), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			specs := parse(t, dir, "b.raw")
			set, err := OpenDestination(specs, Options{})
			require.NoError(t, err)
			d, err := set.Open(announce("a", 8192))
			require.NoError(t, err)
			_, err = OpenDestination(specs, Options{})
			require.ErrorContains(t, err, "in use", "trap D10")
			require.NoError(t, d.Close())
			disk, where := dir+"/b.raw", dir+"/b.raw"+MapSuffix
			require.NoError(t, spoil(disk, where))
			before, _ := os.ReadFile(where)
			_, err = OpenDestination(specs, Options{})
			require.Error(t, err)
			after, _ := os.ReadFile(where)
			require.Equal(t, before, after, "nothing was touched")
		})
	}
}

// TestPartOfADiskIsNoSource is trap D10 after dest has ended: what is missing would
// be sent as zeroes.
func TestPartOfADiskIsNoSource(t *testing.T) {
	dir := t.TempDir()
	specs := parse(t, dir, "b.raw")
	set, err := OpenDestination(specs, Options{})
	require.NoError(t, err)
	d, err := set.Open(announce("a", 8192))
	require.NoError(t, err)
	_, err = OpenSource(specs, false)
	require.ErrorContains(t, err, "in use")
	require.NoError(t, d.Close())
	_, err = OpenSource(specs, false)
	require.EqualError(t, err, dir+"/b.raw is not whole: dest has received a part of it, as its map "+dir+"/b.raw"+MapSuffix+
		" says; run dest with it again to get the rest")

	disk, err := OpenDestination(specs, Options{})
	require.NoError(t, err)
	d = disk.Resumed()[0]
	dev, err := lazy.New(d.File, lazy.Options{Map: d.Map})
	require.NoError(t, err)
	require.NoError(t, dev.GoLive())
	require.NoError(t, dev.ZeroAtContext(t.Context(), 0, 8192, false))
	require.NoError(t, dev.Complete())
	require.NoError(t, dev.Close())
	require.NoError(t, d.Close())
	files, err := OpenSource(specs, false)
	require.NoError(t, err, "complete: a plain disk")
	require.NoError(t, files[0].Close())

	require.NoError(t, os.WriteFile(dir+"/b.raw"+MapSuffix, []byte("silo-map, once"), 0o600))
	_, err = OpenSource(specs, false)
	require.ErrorContains(t, err, "nobody can say whether")
}

func TestOverwriteBeginsAnewWithItsOwnMap(t *testing.T) {
	dir := t.TempDir()
	specs := parse(t, dir, "b.raw")
	for i, overwrite := range []bool{false, true} {
		set, err := OpenDestination(specs, Options{Overwrite: overwrite})
		require.NoError(t, err)
		require.Empty(t, set.Resumed())
		a := announce("a", 8192)
		a.Identity.Generation = uint64(i + 1)
		d, err := set.Open(a)
		require.NoError(t, err)
		require.Equal(t, a.Identity.Generation, d.Map.Identity().Generation)
		require.NoError(t, d.Close())
	}
}

// TestOverwriteLeavesTheMapOfOthersAlone: nothing is changed, the disk neither.
func TestOverwriteLeavesTheMapOfOthersAlone(t *testing.T) {
	dir := t.TempDir()
	file(t, dir+"/letter", "somebody's")
	file(t, dir+"/b.raw", "precious")
	set, err := OpenDestination(parse(t, dir, "other.raw"), Options{})
	require.NoError(t, err)
	other, err := set.Open(announce("a", 8192))
	require.NoError(t, err)
	for where, want := range map[string]string{
		"letter":                "not a map",
		"other.raw" + MapSuffix: "in use",
		"nowhere/b":             "no such file",
	} {
		specs := parse(t, dir, "b.raw")
		specs[0].Map = filepath.Join(dir, where)
		before, _ := os.ReadFile(specs[0].Map)
		_, err := OpenDestination(specs, Options{Overwrite: true})
		require.ErrorContains(t, err, want)
		after, _ := os.ReadFile(specs[0].Map)
		require.Equal(t, before, after)
	}
	got, err := os.ReadFile(dir + "/b.raw")
	require.NoError(t, err)
	require.Equal(t, "precious", string(got))
	require.NoError(t, other.Close())
}

func TestBadDisksAreRefused(t *testing.T) {
	dir := t.TempDir()
	file(t, dir+"/empty.raw", "")
	file(t, dir+"/file", "x")
	for flag, want := range map[string]string{
		"nothing.raw": "does not exist",
		"empty.raw":   "empty",
		".":           "directory",
	} {
		_, err := OpenSource(parse(t, dir, "n="+flag), false)
		require.ErrorContains(t, err, want, flag)
	}
	_, err := OpenDestination(parse(t, dir, "n=."), Options{Overwrite: true})
	require.ErrorContains(t, err, "directory")
	_, err = OpenDestination(parse(t, dir, "no/such/b.raw"), Options{Overwrite: true})
	require.ErrorContains(t, err, "no such file")
	_, err = OpenDestination(nil, Options{Dir: dir + "/file", Overwrite: true})
	require.ErrorContains(t, err, "not a directory")
	_, err = OpenDestination(nil, Options{Dir: dir + "/nowhere", Overwrite: true})
	require.ErrorContains(t, err, "no such file")
}

func TestSourceOpensAllOrNone(t *testing.T) {
	dir := t.TempDir()
	file(t, dir+"/a.raw", "12345678")
	_, err := OpenSource(parse(t, dir, "a.raw", "b.raw"), false)
	require.Error(t, err)
	set, err := OpenDestination(parse(t, dir, "a.raw"), Options{Overwrite: true})
	require.NoError(t, err, "the first disk must not stay locked")
	require.NoError(t, set.Close())
}
