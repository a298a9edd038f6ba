package sources

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// foreign locks a byte of a file as another program would, until the test's end.
func foreign(t *testing.T, path string, how int16, start, length int64) (unlock func()) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	t.Cleanup(func() { _ = f.Close() }) // it may be closed
	require.NoError(t, unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: how, Start: start, Len: length}))
	return func() { require.NoError(t, f.Close()) }
}

// lockedBytes are those on which a file has a lock, as others see it.
func lockedBytes(t *testing.T, path string) (bytes []int64) {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	for at := range int64(300) {
		l := unix.Flock_t{Type: unix.F_WRLCK, Start: at, Len: 1}
		require.NoError(t, unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l))
		if l.Type != unix.F_UNLCK {
			bytes = append(bytes, at)
		}
	}
	return bytes
}

// TestDiskIsLockedAsQEMULocksIt: shared OFD locks on the bytes of the permissions
// that are used, and of those that are denied (trap I13, fault F9).
func TestDiskIsLockedAsQEMULocksIt(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	f, err := OpenFile(path, FileOptions{Create: true, Size: 4096, Partial: true})
	require.NoError(t, err)
	require.Equal(t, []int64{100, 101, 103, 200, 201, 203}, lockedBytes(t, path), "half a disk")
	require.NoError(t, f.SetAccess(AccessLive))
	require.Equal(t, []int64{100, 101, 103, 201, 203}, lockedBytes(t, path), "complete")
	require.NoError(t, f.SetAccess(AccessShared))
	require.Equal(t, []int64{100}, lockedBytes(t, path), "another program takes it over")
	unlock := foreign(t, path, unix.F_RDLCK, 101, 1)
	require.EqualError(t, f.SetAccess(AccessLive), path+": in use by this process already: give each disk once")
	require.Equal(t, []int64{100, 101}, lockedBytes(t, path), "nothing has changed")
	require.Equal(t, AccessShared, f.Access())
	unlock()
	require.NoError(t, f.SetAccess(AccessLive))
	require.NoError(t, f.Close())
	require.ErrorIs(t, f.SetAccess(AccessLive), ErrClosed)
	require.Empty(t, lockedBytes(t, path))

	f, err = OpenFile(path, FileOptions{ReadOnly: true})
	require.NoError(t, err)
	defer f.Close()
	require.Equal(t, []int64{100, 201, 203}, lockedBytes(t, path), "frozen")
}

// TestLocksOfOthersAreHonoured (trap I13, fault F9).
func TestLocksOfOthersAreHonoured(t *testing.T) {
	dir := t.TempDir()
	create(t, filepath.Join(dir, "disk"), 4096).Close()
	reader, writer := FileOptions{ReadOnly: true}, FileOptions{}
	for name, c := range map[string]struct {
		how           int16
		start, length int64
		read, write   bool // may be
	}{
		"it reads":               {unix.F_RDLCK, 100, 1, true, true},
		"it writes":              {unix.F_RDLCK, 101, 1, false, false},
		"it resizes":             {unix.F_RDLCK, 103, 1, false, false},
		"half a disk":            {unix.F_RDLCK, 200, 1, false, false},
		"it denies writes":       {unix.F_RDLCK, 201, 1, true, false},
		"it denies to resize":    {unix.F_RDLCK, 203, 1, true, false},
		"another program writes": {unix.F_WRLCK, 0, 1, false, false},
		"another program reads":  {unix.F_RDLCK, 0, 1, true, false},
		"all of it":              {unix.F_WRLCK, 0, 0, false, false},
		"QEMU of another day":    {unix.F_RDLCK, 104, 1, true, true},
	} {
		unlock := foreign(t, filepath.Join(dir, "disk"), c.how, c.start, c.length)
		for may, o := range map[*bool]FileOptions{&c.read: reader, &c.write: writer} {
			f, err := OpenFile(filepath.Join(dir, "disk"), o)
			if *may {
				require.NoError(t, err, name)
				require.NoError(t, f.Close())
				continue
			}
			require.ErrorIs(t, err, syscall.EBUSY, name)
		}
		unlock()
	}
}

// TestAFileSystemWithoutLocksIsUsedWithAWarning: with one kind of locks without
// (fault H1).
func TestAFileSystemWithoutLocksIsUsedWithAWarning(t *testing.T) {
	flock, ofd := callFlock, callOFD
	t.Cleanup(func() { callFlock, callOFD = flock, ofd })
	for _, no := range []syscall.Errno{unix.ENOSYS, unix.ENOLCK, unix.EOPNOTSUPP} {
		for _, c := range []struct{ flock, ofd bool }{{true, false}, {false, true}, {false, false}} {
			path := filepath.Join(t.TempDir(), "disk")
			callFlock, callOFD = flock, ofd
			if !c.flock {
				callFlock = func(int, int) error { return no }
			}
			if !c.ofd {
				callOFD = func(uintptr, int, *unix.Flock_t) error { return no }
			}
			f, err := OpenFile(path, FileOptions{Create: true, Size: 4096})
			require.NoError(t, err)
			_, err = OpenFile(path, FileOptions{})
			if c.flock || c.ofd {
				require.ErrorIs(t, err, syscall.EBUSY, "one kind is enough")
				require.Empty(t, f.Warnings())
			} else {
				require.NoError(t, err)
				require.Len(t, f.Warnings(), 1)
				require.Contains(t, f.Warnings()[0], path+": the file system knows no locks ("+no.Error()+")")
			}
			require.NoError(t, f.SetAccess(AccessFrozen))
			require.NoError(t, f.Close())
		}
	}
}

// TestTheLoserOfARaceLeavesTheWinnersDisk (fault F11).
func TestTheLoserOfARaceLeavesTheWinnersDisk(t *testing.T) {
	path := filepath.Join(inMemory(t), "disk")
	rounds := 3000
	if testing.Short() {
		rounds = 300
	}
	won := 0
	for range rounds {
		var files [2]*File
		var race sync.WaitGroup
		for i := range files {
			race.Go(func() { files[i], _ = OpenFile(path, FileOptions{Create: true, Size: 4096}) }) // who has lost is not asked why
		}
		race.Wait()
		require.False(t, files[0] != nil && files[1] != nil, "both have it")
		for _, f := range files {
			if f == nil {
				continue
			}
			won++
			ours, err := f.file.Stat()
			require.NoError(t, err)
			there, err := os.Stat(path)
			require.NoError(t, err, "the winner's file has no name any more")
			require.True(t, os.SameFile(ours, there))
			require.NoError(t, f.Close())
		}
		require.NoError(t, os.RemoveAll(path))
	}
	require.Equal(t, rounds, won, "one of the two gets it")
}

// TestAnEmptyFileIsFilledByWhoHasLockedIt, and one that has content, or that another
// program has, never (fault F11).
func TestAnEmptyFileIsFilledByWhoHasLockedIt(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	fill := FileOptions{Create: true, Fill: true, Size: 4096}
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	unlock := foreign(t, path, unix.F_RDLCK, 101, 1)
	_, err := OpenFile(path, fill)
	require.ErrorIs(t, err, syscall.EBUSY)
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.Zero(t, info.Size())
	unlock()
	f, err := OpenFile(path, fill)
	require.NoError(t, err)
	require.EqualValues(t, 4096, f.Room())
	require.False(t, f.Created())
	require.NoError(t, f.Close())
	require.NoError(t, os.WriteFile(path, []byte("content"), 0o600))
	_, err = OpenFile(path, fill)
	require.ErrorContains(t, err, "too small")
	content, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "content", string(content))
}

// TestWhatIsNotOursIsNotRemoved (fault F11).
func TestWhatIsNotOursIsNotRemoved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	file, err := os.Create(path)
	require.NoError(t, err)
	defer file.Close()
	require.NoError(t, os.Remove(path))
	require.NoError(t, os.WriteFile(path, []byte("another's"), 0o600))
	removeOwn(path, file)
	require.FileExists(t, path)
	ours, err := os.Open(path)
	require.NoError(t, err)
	defer ours.Close()
	removeOwn(path, ours)
	require.NoFileExists(t, path)
}

// TestAWriterWithoutLocksIsTold: a copy that is not done yet, for one (fault H1).
func TestAWriterWithoutLocksIsTold(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	create(t, path, 4096).Close()
	other, err := os.OpenFile(path, os.O_WRONLY, 0)
	require.NoError(t, err)
	defer other.Close()
	f, err := OpenFile(path, FileOptions{ReadOnly: true})
	require.NoError(t, err)
	defer f.Close()
	require.Equal(t, []string{path + ": this process has it open for writing: if it writes, what is sent is of no use"}, f.Warnings())
}

// TestHoldersOfADeviceAreNamed: mounts in other namespaces and by a path, swap, and
// what is built on the device or on a partition of it (fault H1).
func TestHoldersOfADeviceAreNamed(t *testing.T) {
	root := t.TempDir()
	s := system{sys: filepath.Join(root, "sys"), proc: filepath.Join(root, "proc")}
	write := func(name, content string) {
		t.Helper()
		require.NoError(t, os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o700))
		require.NoError(t, os.WriteFile(filepath.Join(root, name), []byte(content), 0o600))
	}
	write("sys/devices/sdx/dev", "8:16\n")
	write("sys/devices/sdx/sdx1/dev", "8:17\n")
	write("sys/devices/sdx/sdx1/partition", "1\n")
	require.NoError(t, os.MkdirAll(filepath.Join(root, "sys/dev/block"), 0o700))
	require.NoError(t, os.Symlink("../../devices/sdx", filepath.Join(root, "sys/dev/block/8:16")))
	require.NoError(t, os.Symlink("../../devices/sdx/sdx1", filepath.Join(root, "sys/dev/block/8:17")))
	disk, part := fileID{block: true, dev: unix.Mkdev(8, 16)}, fileID{block: true, dev: unix.Mkdev(8, 17)}
	require.ElementsMatch(t, []fileID{disk, part}, s.family(disk))
	require.ElementsMatch(t, []fileID{disk, part}, s.family(part))
	require.Empty(t, s.claimer(disk))

	write("sys/devices/sdx/sdx1/holders/dm-7/dm/name", "vg-root\n")
	for _, id := range []fileID{disk, part} {
		require.Equal(t, "it is a part of dm-7 (vg-root)", s.claimer(id))
	}
	write("proc/77/mountinfo", "36 35 8:17 / /in/another/namespace rw - ext4 /dev/sdx1 rw\n")
	require.NoError(t, os.MkdirAll(filepath.Join(root, "proc/77/ns"), 0o700))
	require.NoError(t, os.Symlink("mnt:[1]", filepath.Join(root, "proc/77/ns/mnt")))
	require.Equal(t, "it is mounted at /in/another/namespace", s.claimer(disk))
	require.Equal(t, "a b", unescape(`a\040b`))

	write("swap file", strings.Repeat("x", 4096))
	write("proc/swaps", "Filename Type Size Used Priority\n"+strings.ReplaceAll(filepath.Join(root, "swap file"), " ", `\040`)+" file 4 0 -2\n")
	id, ok := idOf(unix.AT_FDCWD, filepath.Join(root, "swap file"), 0)
	require.True(t, ok)
	require.Equal(t, filepath.Join(root, "swap file"), s.swap([]fileID{id}))
}
