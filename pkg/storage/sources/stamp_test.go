package sources

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func stampOf(t *testing.T, f *File) Stamp {
	t.Helper()
	s, err := f.Stamp()
	require.NoError(t, err)
	return s
}

func TestStampStaysAsLongAsNothingIsWritten(t *testing.T) {
	f := create(t, filepath.Join(t.TempDir(), "disk"), 1<<20)
	s := stampOf(t, f)
	require.NotZero(t, s.Inode)
	require.NotEmpty(t, s.BootID)
	_, err := f.ReadAt(make([]byte, 4096), 0)
	require.NoError(t, err)
	require.Equal(t, s, stampOf(t, f))
	require.True(t, s.Unchanged(stampOf(t, f)))

	b, err := json.Marshal(s)
	require.NoError(t, err)
	var kept Stamp
	require.NoError(t, json.Unmarshal(b, &kept))
	require.Equal(t, s, kept)

	later := s
	later.BootID = "another"
	require.True(t, s.Unchanged(later), "a file keeps its times over a restart of the host")
	require.False(t, Stamp{}.Unchanged(Stamp{}), "what is not known proves nothing")
}

// TestStampTellsAWriteWhoseTimeWasPutBack: the change time cannot be set (fault F5).
func TestStampTellsAWriteWhoseTimeWasPutBack(t *testing.T) {
	f := create(t, filepath.Join(t.TempDir(), "disk"), 1<<20)
	old := time.Now().Add(-time.Hour)
	require.NoError(t, os.Chtimes(f.Path(), old, old))
	s := stampOf(t, f)
	_, err := f.WriteAt([]byte("other"), 4096)
	require.NoError(t, err)
	require.False(t, s.Unchanged(stampOf(t, f)))
	require.NoError(t, os.Chtimes(f.Path(), old, old))
	now := stampOf(t, f)
	require.Equal(t, s.ModTime, now.ModTime)
	require.False(t, s.Unchanged(now))
	same, known := s.SameDisk(now)
	require.True(t, same && known, "it is the same file, written or not")
}

// TestStampKnowsTheFileAndNotThePath: a path that leads to another file (fault F1),
// and other names of one file (fault A10).
func TestStampKnowsTheFileAndNotThePath(t *testing.T) {
	dir := t.TempDir()
	f := create(t, filepath.Join(dir, "disk"), 1<<20)
	s := stampOf(t, f)
	require.NoError(t, os.Symlink("disk", filepath.Join(dir, "link")))
	require.NoError(t, f.Close())
	link, err := OpenFile(filepath.Join(dir, "link"), FileOptions{ReadOnly: true})
	require.NoError(t, err)
	defer link.Close()
	same, known := s.SameDisk(stampOf(t, link))
	require.True(t, same && known)

	require.NoError(t, os.Remove(filepath.Join(dir, "disk")))
	other := create(t, filepath.Join(dir, "disk"), 1<<20) // may well get the inode's number again
	same, known = s.SameDisk(stampOf(t, other))
	require.True(t, !same && known)
	require.False(t, s.Unchanged(stampOf(t, other)))
}

func TestSameDiskSaysWhenItCannotTell(t *testing.T) {
	file := Stamp{Size: 1, Dev: 7, Inode: 8, Birth: 9}
	device := Stamp{Size: 1, Block: true, Dev: 7, BootID: "b"}
	for name, c := range map[string]struct {
		a, b        Stamp
		same, known bool
	}{
		"another size":                    {file, Stamp{Size: 2, Dev: 7, Inode: 8}, false, true},
		"a file and a device":             {file, device, false, true},
		"another file system's number":    {file, Stamp{Size: 1, Dev: 70, Inode: 8, Birth: 9}, false, false},
		"inode given again":               {file, Stamp{Size: 1, Dev: 7, Inode: 8, Birth: 10}, false, true},
		"no inode numbers of its own":     {file, Stamp{Size: 1, Dev: 7, Inode: 80, Fickle: true}, false, false},
		"nothing known of a device":       {device, device, false, false},
		"device of the same boot":         {with(device, "", "", "", 3), with(device, "", "", "", 3), true, true},
		"a name in all the world":         {with(device, "naa.5", "", "", 3), with(device, "naa.5", "", "", 4), true, true},
		"another such name":               {with(device, "naa.5", "", "", 3), with(device, "naa.6", "", "", 3), false, true},
		"a volume":                        {with(device, "", "LVM-1", "", 3), with(device, "", "LVM-1", "", 4), true, true},
		"another partition of one disk":   {with(device, "naa.5", "", "p1", 3), with(device, "naa.5", "", "p2", 3), false, true},
		"partition whose disk has a copy": {with(device, "", "", "p1", 3), with(device, "", "", "p1", 4), false, false},
	} {
		same, known := c.a.SameDisk(c.b)
		require.Equal(t, [2]bool{c.same, c.known}, [2]bool{same, known}, name)
		same, known = c.b.SameDisk(c.a)
		require.Equal(t, [2]bool{c.same, c.known}, [2]bool{same, known}, name)
	}
}

func with(s Stamp, wwid, dm, part string, seq uint64) Stamp {
	s.WWID, s.DMUUID, s.PartUUID, s.DiskSeq = wwid, dm, part, seq
	return s
}

// TestStampOfADeviceCountsWhatIsWritten: also what another process has written and
// the kernel has not passed on yet (fault F5, fault A9).
func TestStampOfADeviceCountsWhatIsWritten(t *testing.T) {
	path := loop(t, t.TempDir(), 1<<20)
	f, err := OpenFile(path, FileOptions{ReadOnly: true})
	require.NoError(t, err)
	defer f.Close()
	s := stampOf(t, f)
	require.True(t, s.Block)
	require.NotEmpty(t, s.BootID)
	require.NotEmpty(t, s.WWID, "the file behind it")
	_, err = f.ReadAt(make([]byte, 1<<20), 0)
	require.NoError(t, err)
	require.True(t, s.Unchanged(stampOf(t, f)))

	other, err := os.OpenFile(path, os.O_WRONLY, 0) // as dd does: no O_EXCL, and not synced
	require.NoError(t, err)
	defer other.Close()
	_, err = other.WriteAt([]byte("other"), 8192)
	require.NoError(t, err)
	now := stampOf(t, f)
	require.Greater(t, now.Written, s.Written)
	require.False(t, s.Unchanged(now))
	same, known := s.SameDisk(now)
	require.True(t, same && known)
	require.NoError(t, blockRange(int(other.Fd()), unix.BLKDISCARD, 0, 4096))
	require.Greater(t, stampOf(t, f).Written, now.Written, "a discard changes what is read")
}

// TestStampSeesTheFileBehindALoopDevice: it is written past the device (fault H1).
func TestStampSeesTheFileBehindALoopDevice(t *testing.T) {
	dir := t.TempDir()
	f, err := OpenFile(loop(t, dir, 1<<20), FileOptions{ReadOnly: true})
	require.NoError(t, err)
	defer f.Close()
	s := stampOf(t, f)
	backing, err := filepath.Glob(dir + "/backing*")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(backing[0], []byte("other"), 0o600))
	require.False(t, s.Unchanged(stampOf(t, f)))
}

// TestLoopDevicesWithOneNumberAreTwoDisks: the device's name and number are the
// same, what is behind it is not (fault F1).
func TestLoopDevicesWithOneNumberAreTwoDisks(t *testing.T) {
	var stamps [2]Stamp
	dir := t.TempDir()
	for i := range stamps {
		t.Run("", func(t *testing.T) {
			f, err := OpenFile(loop(t, dir, 1<<20), FileOptions{ReadOnly: true})
			require.NoError(t, err)
			defer f.Close()
			stamps[i] = stampOf(t, f)
		})
	}
	stamps[1].Dev = stamps[0].Dev
	same, known := stamps[0].SameDisk(stamps[1])
	require.True(t, !same && known)
}

// TestALoopDeviceIsNamedAfterItsFile: one over a file that has got the inode's number
// again is another disk (fault F1).
func TestALoopDeviceIsNamedAfterItsFile(t *testing.T) {
	dir, names := t.TempDir(), make(map[string]bool)
	for range 4 {
		t.Run("", func(t *testing.T) {
			path := loop(t, dir, 1<<20)
			backing, err := filepath.Glob(dir + "/backing*")
			require.NoError(t, err)
			defer os.Remove(backing[0]) // the next one may well be given its inode
			for range 2 {
				f, err := OpenFile(path, FileOptions{ReadOnly: true})
				require.NoError(t, err)
				names[stampOf(t, f).WWID] = true
				require.NoError(t, f.Close())
			}
		})
	}
	require.Len(t, names, 4)
}

func TestADeviceThatIsNotCountedProvesNothing(t *testing.T) {
	for name, c := range map[string]struct {
		stat    string
		sectors uint64
		ok      bool
	}{
		"now":     {"1 0 2 0 3 0 40 0 0 0 0 5 0 60 0 0 0", 100, true},
		"old":     {"1 0 2 0 3 0 40 0 0 0 0", 40, true},
		"nothing": {"", 0, false},
		"words":   {"1 0 2 0 3 0 x 0 0 0 0", 0, false},
	} {
		sectors, ok := written(c.stat)
		require.Equal(t, c.ok, ok, name)
		require.Equal(t, c.sectors, sectors, name)
	}
	dir := t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(dir, "queue"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "stat"), []byte("1 0 2 0 3 0 40 0 0 0 0\n"), 0o600))
	for iostats, counted := range map[string]bool{"0\n": false, "1\n": true} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "queue/iostats"), []byte(iostats), 0o600))
		s := Stamp{Block: true, Size: 1}
		s.fromSysfs(dir, "0:0")
		require.Equal(t, counted, s.Unchanged(s))
	}
}

// TestAttributesGoWithTheFile: also with one that was opened for reading only.
func TestAttributesGoWithTheFile(t *testing.T) {
	const name = "user.silo-nbd-test"
	dir := t.TempDir()
	create(t, filepath.Join(dir, "disk"), 4096).Close()
	f, err := OpenFile(filepath.Join(dir, "disk"), FileOptions{ReadOnly: true})
	require.NoError(t, err)
	defer f.Close()
	err = f.SetXattr(name, []byte("note"))
	if errors.Is(err, errors.ErrUnsupported) {
		missing(t, "no extended attributes in "+dir)
	}
	require.NoError(t, err)
	require.NoError(t, f.SyncXattr())
	require.NoError(t, os.Rename(filepath.Join(dir, "disk"), filepath.Join(dir, "moved")))
	moved, err := OpenFile(filepath.Join(dir, "moved"), FileOptions{ReadOnly: true})
	require.NoError(t, err)
	defer moved.Close()
	b, err := moved.Xattr(name)
	require.NoError(t, err)
	require.Equal(t, "note", string(b))
	require.NoError(t, moved.SetXattr(name, nil))
	b, err = moved.Xattr(name)
	require.NoError(t, err)
	require.NotNil(t, b, "it is there, and empty")
	for range 2 {
		require.NoError(t, moved.RemoveXattr(name))
	}
	b, err = moved.Xattr(name)
	require.NoError(t, err)
	require.Nil(t, b)
	require.NoError(t, moved.Close())
	require.ErrorIs(t, moved.SetXattr(name, nil), ErrClosed)
}

func TestABlockDeviceHasNoAttributes(t *testing.T) {
	f, err := OpenFile(loop(t, t.TempDir(), 1<<20), FileOptions{ReadOnly: true})
	require.NoError(t, err)
	defer f.Close()
	require.ErrorIs(t, f.SetXattr("user.x", nil), errors.ErrUnsupported)
	_, err = f.Xattr("user.x")
	require.ErrorIs(t, err, errors.ErrUnsupported)
}

// TestOpeningADiskIsNotAWrite: its times prove that it was not written (fault F5).
func TestOpeningADiskIsNotAWrite(t *testing.T) {
	f := create(t, filepath.Join(t.TempDir(), "disk"), 1<<20)
	s := stampOf(t, f)
	require.NoError(t, f.Close())
	again, err := OpenFile(f.Path(), FileOptions{})
	require.NoError(t, err)
	defer again.Close()
	require.True(t, again.CanZeroFast() || !f.CanZeroFast())
	require.True(t, s.Unchanged(stampOf(t, again)))
}

func TestStampOfAFileThatIsNotOpened(t *testing.T) {
	dir := t.TempDir()
	f := create(t, filepath.Join(dir, "disk"), 1<<20)
	s, err := StampOf(f.Path())
	require.NoError(t, err)
	require.Equal(t, stampOf(t, f), s)
	for _, path := range []string{dir, filepath.Join(dir, "none")} {
		_, err = StampOf(path)
		require.ErrorContains(t, err, path)
	}
}
