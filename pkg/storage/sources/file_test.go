package sources

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/storagetest"
)

func create(t *testing.T, path string, size int64) *File {
	t.Helper()
	f, err := OpenFile(path, FileOptions{Create: true, Size: size})
	require.NoError(t, err)
	t.Cleanup(func() { _ = f.Close() }) // idempotent; tests that care look themselves
	return f
}

func TestFilePassesTheSuite(t *testing.T) {
	storagetest.Run(t, func(t *testing.T, size int64) storage.StorageProvider {
		return create(t, filepath.Join(t.TempDir(), "disk"), size)
	})
}

// A file system that can do nothing but read and write.
func TestFileWithoutQuickWaysPassesTheSuite(t *testing.T) {
	storagetest.Run(t, func(t *testing.T, size int64) storage.StorageProvider {
		f := create(t, filepath.Join(t.TempDir(), "disk"), size)
		f.noPunch.Store(true)
		f.noZero.Store(true)
		f.noZeroRange.Store(true)
		f.fastZero = false
		f.noDiscard.Store(true)
		return f
	})
}

func TestPartOfALargerFilePassesTheSuite(t *testing.T) {
	storagetest.Run(t, func(t *testing.T, size int64) storage.StorageProvider {
		path := filepath.Join(t.TempDir(), "disk")
		behind := bytes.Repeat([]byte{0xee}, 9000)
		require.NoError(t, os.WriteFile(path, append(make([]byte, size), behind...), 0o600))
		f, err := OpenFile(path, FileOptions{Size: size})
		require.NoError(t, err)
		require.EqualValues(t, size+9000, f.Room())
		t.Cleanup(func() {
			content, err := os.ReadFile(path)
			require.NoError(t, err)
			require.True(t, bytes.Equal(behind, content[size:]), "what lies behind the disk was touched")
		})
		return f
	}, 513, 65537, 1<<20+513)
}

func TestCreatedFileIsSparseAndZero(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	f := create(t, path, 1<<30+5)
	require.True(t, f.Created())
	require.Equal(t, path, f.Path())
	require.False(t, f.IsBlockDevice())
	end, hole, err := f.ExtentAt(77)
	require.NoError(t, err)
	require.True(t, hole)
	require.EqualValues(t, 1<<30+5, end)
	var st unix.Stat_t
	require.NoError(t, unix.Stat(path, &st))
	require.Less(t, st.Blocks, int64(100))
	require.EqualValues(t, 0o600, st.Mode&0o777, "a disk is its owner's only")
	require.NoError(t, f.Close())

	again, err := OpenFile(path, FileOptions{Create: true, Size: 1<<30 + 5})
	require.NoError(t, err)
	defer again.Close()
	require.False(t, again.Created(), "only the call that made the file knows it to be zero")
}

func TestPunchGivesSpaceBackAndZeroKeepsIt(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	f := create(t, path, 1<<20)
	blocks := func() int64 {
		require.NoError(t, f.Flush()) // some file systems allocate only then
		var st unix.Stat_t
		require.NoError(t, unix.Stat(path, &st))
		return st.Blocks * 512
	}
	_, err := f.WriteAt(bytes.Repeat([]byte{1}, 1<<20), 0)
	require.NoError(t, err)
	require.GreaterOrEqual(t, blocks(), int64(1<<20))
	require.NoError(t, f.ZeroAt(0, 1<<19, false))
	require.GreaterOrEqual(t, blocks(), int64(1<<20))
	require.NoError(t, f.ZeroAt(0, 1<<19, true))
	if f.noPunch.Load() {
		t.Skip("the file system of the temporary directory cannot punch holes")
	}
	require.Less(t, blocks(), int64(1<<19+1<<17))
	require.NoError(t, f.TrimAt(1<<19, 1<<19))
	require.Less(t, blocks(), int64(1<<17))
}

func TestOneDiskIsNeverOpenedTwiceForWriting(t *testing.T) { // D10
	path := filepath.Join(t.TempDir(), "disk")
	writer := create(t, path, 512)
	for _, readOnly := range []bool{false, true} {
		_, err := OpenFile(path, FileOptions{ReadOnly: readOnly})
		require.EqualError(t, err, path+": in use by this process already: give each disk once")
		require.ErrorIs(t, err, syscall.EBUSY)
	}
	_, err := OpenFile(path, FileOptions{Create: true, Size: 512})
	require.ErrorIs(t, err, syscall.EBUSY)
	require.FileExists(t, path)
	require.NoError(t, writer.Close())

	r1, err := OpenFile(path, FileOptions{ReadOnly: true})
	require.NoError(t, err)
	defer r1.Close()
	r2, err := OpenFile(path, FileOptions{ReadOnly: true})
	require.NoError(t, err, "any number may read")
	defer r2.Close()
	_, err = OpenFile(path, FileOptions{})
	require.ErrorIs(t, err, syscall.EBUSY, "who reads keeps writers out")
}

func TestReadOnlyFileTakesNoWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	require.NoError(t, os.WriteFile(path, []byte("content"), 0o400))
	f, err := OpenFile(path, FileOptions{ReadOnly: true})
	require.NoError(t, err)
	defer f.Close()
	_, err = f.WriteAt([]byte{1}, 0)
	require.EqualError(t, err, path+": write of 1 bytes at 0: it was opened for reading only")
	require.ErrorIs(t, err, syscall.EPERM)
	require.ErrorIs(t, f.ZeroAt(0, 1, true), syscall.EPERM)
	require.ErrorIs(t, f.TrimAt(0, 1), syscall.EPERM)
	require.NoError(t, f.Flush())
	content, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "content", string(content))
}

func TestOpenErrorsAreOneClearLine(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	require.NoError(t, os.WriteFile(at("empty"), nil, 0o600))
	require.NoError(t, os.WriteFile(at("small"), make([]byte, 100), 0o600))
	require.NoError(t, unix.Mkfifo(at("fifo"), 0o600))
	require.NoError(t, os.Symlink(at("nowhere"), at("dangling")))
	require.NoError(t, os.Symlink(at("loop"), at("loop")))
	for _, c := range []struct {
		name string
		o    FileOptions
		want string
	}{
		{"none", FileOptions{}, "does not exist: check the path"},
		{"none", FileOptions{ReadOnly: true}, "does not exist: check the path"},
		{"none", FileOptions{Create: true}, "does not exist, and its size is not known: create it first"},
		{"none", FileOptions{Create: true, ReadOnly: true, Size: 1}, "does not exist, and a new disk cannot be read-only: create it first"},
		{"none/disk", FileOptions{Create: true, Size: 1}, "its directory does not exist: create it first"},
		{"small/disk", FileOptions{Create: true, Size: 1}, "a part of the path is no directory: check the path"},
		{"none", FileOptions{Create: true, Size: 1 << 62}, "the file system takes no file of this size: choose another place"},
		{"none", FileOptions{Create: true, Size: -1}, "a disk of -1 bytes is not possible"},
		{"dangling", FileOptions{Create: true, Size: 1}, "is a symbolic link to " + at("nowhere") + ", which does not exist: give that path, or remove the link"},
		{"loop", FileOptions{}, "too many symbolic links: check the path"},
		{".", FileOptions{}, "is a directory: want a file or a block device"},
		{".", FileOptions{Create: true, Size: 1}, "is a directory: want a file or a block device"},
		{"empty", FileOptions{}, "is empty: want a disk with at least one byte"},
		{"empty", FileOptions{Create: true, Size: 1}, "is empty: want a disk with at least one byte"},
		{"small", FileOptions{Size: 101}, "too small: it has 100 bytes and the disk needs 101: make it larger or choose another"},
		{"fifo", FileOptions{}, "is a FIFO: want a regular file or a block device"},
		{"fifo", FileOptions{Create: true, Size: 1}, "is a FIFO: want a regular file or a block device"},
		{"/dev/null", FileOptions{}, "is a character device: want a regular file or a block device"},
	} {
		path := c.name
		if !filepath.IsAbs(path) {
			path = at(path)
		}
		f, err := OpenFile(path, c.o)
		require.Nil(t, f, c.name)
		require.EqualError(t, err, path+": "+c.want)
	}
	require.NoFileExists(t, at("none"), "what could not be made is removed again")
	content, err := os.ReadFile(at("small"))
	require.NoError(t, err)
	require.Len(t, content, 100)
}

func TestUnreadableFileIsOneClearLine(t *testing.T) {
	for cause, want := range map[error]string{
		&os.PathError{Op: "open", Path: "x", Err: syscall.EACCES}: "permission denied: check owner and mode, and whether the device is read-only",
		&os.PathError{Op: "open", Path: "x", Err: syscall.EROFS}:  "lies on a read-only file system: remount it or choose another place",
		&os.PathError{Op: "open", Path: "x", Err: syscall.EBUSY}:  "in use: it is mounted, or another process has it: unmount it or stop that one first",
		&os.PathError{Op: "open", Path: "x", Err: syscall.EIO}:    "input/output error",
	} {
		require.EqualError(t, explain(cause), want)
		require.ErrorIs(t, explain(cause), errors.Unwrap(cause))
	}
	if os.Geteuid() == 0 {
		return // root may read everything, the real thing cannot be tried
	}
	path := filepath.Join(t.TempDir(), "disk")
	require.NoError(t, os.WriteFile(path, []byte{1}, 0))
	_, err := OpenFile(path, FileOptions{ReadOnly: true})
	require.ErrorIs(t, err, os.ErrPermission)
}

func TestShrunkFileIsAnErrorNotAnEnd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	f := create(t, path, 8192)
	require.NoError(t, os.Truncate(path, 5000))
	n, err := f.ReadAt(make([]byte, 8192), 0)
	require.Equal(t, 5000, n)
	require.EqualError(t, err, path+": read of 8192 bytes at 0: the file has become shorter than it was when it was opened")
}

func TestErrorsAfterCloseSayClosed(t *testing.T) {
	f := create(t, filepath.Join(t.TempDir(), "disk"), 4096)
	require.NoError(t, f.Close())
	require.NoError(t, f.Close(), "Close is idempotent")
	_, err := f.ReadAt(make([]byte, 1), 0)
	require.ErrorIs(t, err, ErrClosed)
	require.ErrorIs(t, f.Flush(), ErrClosed)
	require.ErrorIs(t, f.fdatasync(), ErrClosed, "also when Close came after the check")
	require.ErrorIs(t, f.ZeroAt(0, 1, true), ErrClosed)
	require.NoError(t, f.flusher.failed(), "which is no failed flush")
}
