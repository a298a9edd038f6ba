package durable

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestFileIsReplacedAndLockedThroughout(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	_, err := OS.Open(path)
	require.ErrorIs(t, err, fs.ErrNotExist)
	held, err := Replace(OS, path, []byte("one"), true)
	require.NoError(t, err)
	for _, content := range []string{"two", "three"} {
		_, err = OS.Open(path)
		require.ErrorIs(t, err, ErrInUse)
		next, err := Replace(OS, path, []byte(content), false)
		require.NoError(t, err)
		_, err = OS.Open(path)
		require.ErrorIs(t, err, ErrInUse, "between the two")
		require.NoError(t, held.Close())
		_, err = OS.Open(path)
		require.ErrorIs(t, err, ErrInUse)
		b, err := OS.Read(path)
		require.NoError(t, err)
		require.Equal(t, content, string(b))
		held = next
	}
	_, err = Replace(OS, path, []byte("another's"), true)
	require.ErrorIs(t, err, fs.ErrExist)
	require.NoError(t, held.Close())
	held, err = OS.Open(path)
	require.NoError(t, err)
	require.Equal(t, "three", string(held.Content()))
	require.NotZero(t, held.Changed())
	require.NoError(t, held.Close())
	require.Equal(t, []string{"state"}, dirNames(t, filepath.Dir(path)), "no temporary file is left")
}

func dirNames(t *testing.T, dir string) []string {
	t.Helper()
	names, err := OS.Names(dir)
	require.NoError(t, err)
	return names
}

// A file whose name is as long as can be is replaced as any other (fault H3).
func TestTemporaryNamesAreNeverTooLong(t *testing.T) {
	dir := t.TempDir()
	for _, n := range []int{1, 100, 244, 245, 246, 247, 254, 255} {
		path := filepath.Join(dir, strings.Repeat("n", n))
		for _, content := range []string{"one", "two"} {
			f, err := Replace(OS, path, []byte(content), content == "one")
			require.NoError(t, err)
			require.NoError(t, f.Close())
		}
	}
	require.Len(t, dirNames(t, dir), 8)
}

func TestNamesThatAreTooLongAreShortenedAndDiffer(t *testing.T) {
	const suffix = ".suffix"
	require.Equal(t, strings.Repeat("x", 248)+suffix, FitName(strings.Repeat("x", 248), suffix))
	seen := make(map[string]bool)
	for _, name := range []string{strings.Repeat("x", 249), strings.Repeat("x", 250), strings.Repeat("é", 127), strings.Repeat("é", 126) + "x"} {
		got := FitName(name, suffix)
		require.LessOrEqual(t, len(got), 255)
		require.True(t, strings.HasSuffix(got, suffix))
		require.True(t, bytes.Equal([]byte(got), bytes.ToValidUTF8([]byte(got), nil)))
		require.False(t, seen[got])
		seen[got] = true
	}
}

func TestCleanRemovesOnlyTemporaryFilesOfTheFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state")
	keep := []string{"state", "state.12345678", ".state.mine", ".state.123456789", ".state.1234567", ".other.12345678"}
	for _, name := range append([]string{".state.12345678", ".state.abcdef00"}, keep...) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
	}
	require.NoError(t, Clean(OS, path))
	require.ElementsMatch(t, keep, dirNames(t, dir))
}

// A FIFO that is named as a state file does not hang, and is refused (fault H9).
func TestOnlyRegularFilesAreOpened(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	require.NoError(t, unix.Mkfifo(fifo, 0o600))
	for _, path := range []string{fifo, dir} {
		_, err := OS.Open(path)
		require.Error(t, err)
		_, err = OS.Read(path)
		require.Error(t, err)
	}
}

// What a file system does not know is no failure: to sync a directory (SMB says
// EINVAL), and to lock (some FUSE and network file systems) (faults H1, H3).
func TestWhatAFileSystemCannotDoIsNoFailure(t *testing.T) {
	for _, err := range []error{unix.EINVAL, unix.ENOTSUP, unix.EOPNOTSUPP, unix.ENOSYS} {
		require.True(t, noDirSync(&fs.PathError{Op: "sync", Err: err}), err)
	}
	for _, err := range []error{unix.ENOSYS, unix.ENOLCK, unix.EOPNOTSUPP, unix.EBADF} {
		require.True(t, noLocks(err), err)
	}
	for _, err := range []error{unix.EIO, unix.ENOSPC} {
		require.False(t, noDirSync(err) || noLocks(err), err)
	}
	require.Error(t, SyncDir(filepath.Join(t.TempDir(), "none")))
}

// Of processes that make the same file at the same time one has it.
func TestOnlyOneClaimsAName(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	var won atomic.Int32
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			f, err := Replace(OS, path, []byte("mine"), true)
			if err == nil {
				won.Add(1)
				defer func() { require.NoError(t, f.Close()) }()
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, 1, won.Load())
	require.Equal(t, []string{"state"}, dirNames(t, filepath.Dir(path)))
}
