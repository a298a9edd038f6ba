package sources

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// What the file system can do is known at once, and what it cannot is refused
// without a write: tmpfs punches holes but cannot zero a range.
func TestFastZeroingIsWhatTheFileSystemCan(t *testing.T) {
	path := filepath.Join(mountTmpfs(t, "size=16m"), "disk")
	f := create(t, path, 1<<20+100)
	require.True(t, f.CanZeroFast())
	data := make([]byte, 1<<20+100)
	for i := range data {
		data[i] = 7
	}
	_, err := f.WriteAt(data, 0)
	require.NoError(t, err)
	blocks := func() int64 {
		var st unix.Stat_t
		require.NoError(t, unix.Stat(path, &st))
		return st.Blocks * 512
	}
	full := blocks()
	require.ErrorIs(t, f.ZeroFastAt(0, 1<<20, false), errors.ErrUnsupported)
	got := make([]byte, len(data))
	_, err = f.ReadAt(got, 0)
	require.NoError(t, err)
	require.Equal(t, data, got)

	require.NoError(t, f.ZeroFastAt(0, 1<<20, true))
	require.LessOrEqual(t, blocks(), full-1<<20, "the space is given back: nothing was written")
	clear(data[:1<<20])
	_, err = f.ReadAt(got, 0)
	require.NoError(t, err)
	require.Equal(t, data, got)

	f.noPunch.Store(true)
	require.ErrorIs(t, f.ZeroFastAt(1<<20, 100, true), errors.ErrUnsupported)
	require.NoError(t, f.Close())
	ro, err := OpenFile(path, FileOptions{ReadOnly: true})
	require.NoError(t, err)
	require.False(t, ro.CanZeroFast())
	require.NoError(t, ro.Close())
}

// The look at what is possible changes neither size nor space.
func TestProbingForFastZeroingChangesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	require.NoError(t, os.WriteFile(path, make([]byte, 5000), 0o600))
	stat := func() (st unix.Stat_t) {
		require.NoError(t, unix.Stat(path, &st))
		return st
	}
	before := stat()
	f, err := OpenFile(path, FileOptions{})
	require.NoError(t, err)
	defer f.Close()
	after := stat()
	require.Equal(t, []int64{before.Size, before.Blocks}, []int64{after.Size, after.Blocks})
}

func TestBlockDeviceSaysWhetherItZeroesByItself(t *testing.T) {
	dir := t.TempDir()
	disk := filepath.Join(dir, "devices", "sda")
	require.NoError(t, os.MkdirAll(filepath.Join(disk, "sda1"), 0o700))
	require.NoError(t, os.MkdirAll(filepath.Join(disk, "queue"), 0o700))
	require.NoError(t, os.Symlink(disk, filepath.Join(dir, "8:0")))
	require.NoError(t, os.Symlink(filepath.Join(disk, "sda1"), filepath.Join(dir, "8:1")))
	for text, want := range map[string]bool{"33553920\n": true, "0\n": false, "?": false} {
		require.NoError(t, os.WriteFile(filepath.Join(disk, "queue", "write_zeroes_max_bytes"), []byte(text), 0o600))
		require.Equal(t, want, zeroesByItself(dir, "8:0"), text)
		require.Equal(t, want, zeroesByItself(dir, "8:1"), "a partition")
	}
	require.False(t, zeroesByItself(dir, "8:9"))
}
