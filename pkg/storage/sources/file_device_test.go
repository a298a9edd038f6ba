package sources

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/storagetest"
)

// missing skips a test that needs something of the machine, and fails it in CI.
func missing(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("CI must have it: %s", what)
	}
	t.Skip(what)
}

// loop makes a loop device over a sparse file of size bytes in dir.
func loop(t *testing.T, dir string, size int64, flags ...string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "loop devices need root")
	}
	backing, err := os.CreateTemp(dir, "backing")
	require.NoError(t, err)
	require.NoError(t, backing.Truncate(size))
	require.NoError(t, backing.Close())
	out, err := exec.Command("losetup", append(flags, "--find", "--show", backing.Name())...).CombinedOutput()
	if err != nil {
		missing(t, "no loop device: "+strings.TrimSpace(string(out)+" "+err.Error()))
	}
	path := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		out, err := exec.Command("losetup", "--detach", path).CombinedOutput()
		require.NoError(t, err, string(out))
	})
	return path
}

// mountTmpfs mounts a small file system and returns its directory.
func mountTmpfs(t *testing.T, options string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "mounting needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		missing(t, "cannot mount: "+err.Error())
	}
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	return dir
}

func TestBlockDevicePassesTheSuite(t *testing.T) {
	for _, sector := range []string{"512", "4096"} {
		t.Run(sector, func(t *testing.T) {
			storagetest.Run(t, func(t *testing.T, size int64) storage.StorageProvider {
				f, err := OpenFile(loop(t, t.TempDir(), size, "--sector-size", sector), FileOptions{})
				require.NoError(t, err)
				t.Cleanup(func() { _ = f.Close() }) // before the device goes; idempotent
				require.True(t, f.IsBlockDevice())
				require.False(t, f.Created())
				return f
			}, 4096, 1<<20+4096)
		})
	}
}

func TestBlockDeviceWithoutQuickWaysPassesTheSuite(t *testing.T) {
	storagetest.Run(t, func(t *testing.T, size int64) storage.StorageProvider {
		f, err := OpenFile(loop(t, t.TempDir(), size), FileOptions{})
		require.NoError(t, err)
		t.Cleanup(func() { _ = f.Close() }) // before the device goes; idempotent
		f.noPunch.Store(true)
		f.noZero.Store(true)
		f.noZeroRange.Store(true)
		f.fastZero = false
		f.noDiscard.Store(true)
		return f
	}, 512, 1<<20+512)
}

func TestDiskOnAPartOfABlockDevicePassesTheSuite(t *testing.T) {
	storagetest.Run(t, func(t *testing.T, size int64) storage.StorageProvider {
		f, err := OpenFile(loop(t, t.TempDir(), 2<<20), FileOptions{Size: size})
		require.NoError(t, err)
		t.Cleanup(func() { _ = f.Close() }) // before the device goes; idempotent
		require.EqualValues(t, 2<<20, f.Room())
		return f
	}, 1, 513, 1<<20+513)
}

func TestBlockDeviceZeroesByIoctl(t *testing.T) {
	path := loop(t, t.TempDir(), 1<<20)
	f, err := OpenFile(path, FileOptions{})
	require.NoError(t, err)
	defer f.Close()
	content := bytes.Repeat([]byte{7}, 1<<20)
	_, err = f.WriteAt(content, 0)
	require.NoError(t, err)
	require.NoError(t, control(f.raw, func(fd int) error {
		return blockRange(fd, unix.BLKZEROOUT, 4096, 8192)
	}))
	clear(content[4096 : 4096+8192])
	got := make([]byte, 1<<20)
	_, err = f.ReadAt(got, 0)
	require.NoError(t, err)
	require.True(t, bytes.Equal(content, got))
}

func TestBlockDevicePunchReachesTheBackingFile(t *testing.T) {
	dir := t.TempDir()
	path := loop(t, dir, 4<<20)
	f, err := OpenFile(path, FileOptions{})
	require.NoError(t, err)
	defer f.Close()
	_, err = f.WriteAt(bytes.Repeat([]byte{7}, 4<<20), 0)
	require.NoError(t, err)
	require.NoError(t, f.Flush())
	backing, err := filepath.Glob(dir + "/backing*")
	require.NoError(t, err)
	blocks := func() int64 {
		var st unix.Stat_t
		require.NoError(t, unix.Stat(backing[0], &st))
		return st.Blocks * 512
	}
	require.GreaterOrEqual(t, blocks(), int64(4<<20))
	require.NoError(t, f.ZeroAt(0, 2<<20, true))
	require.NoError(t, f.TrimAt(2<<20, 2<<20))
	require.NoError(t, f.Flush())
	if f.noPunch.Load() || f.noDiscard.Load() {
		t.Skip("the file system under the loop device cannot punch holes")
	}
	require.Less(t, blocks(), int64(1<<20))
}

func TestBlockDeviceInUseIsRefused(t *testing.T) {
	path := loop(t, t.TempDir(), 1<<20)
	f, err := OpenFile(path, FileOptions{})
	require.NoError(t, err)
	_, err = OpenFile(path, FileOptions{})
	const busy = ": in use: this process has it: unmount it or stop what uses it first"
	require.EqualError(t, err, path+busy)
	_, err = OpenFile(path, FileOptions{ReadOnly: true})
	require.EqualError(t, err, path+busy)
	require.NoError(t, f.Close())

	reader, err := OpenFile(path, FileOptions{ReadOnly: true})
	require.NoError(t, err)
	_, err = OpenFile(path, FileOptions{})
	require.ErrorIs(t, err, syscall.EBUSY)
	require.NoError(t, reader.Close())
	_, err = OpenFile(path, FileOptions{ReadOnly: true, Size: 1<<20 + 1})
	require.EqualError(t, err, path+": too small: it has 1048576 bytes and the disk needs 1048577: make it larger or choose another")
}

func TestReadOnlyBlockDeviceIsOneClearLine(t *testing.T) {
	path := loop(t, t.TempDir(), 1<<20, "--read-only")
	_, err := OpenFile(path, FileOptions{})
	require.EqualError(t, err, path+": is a read-only device: make it writable (blockdev --setrw) or choose another")
	f, err := OpenFile(path, FileOptions{ReadOnly: true})
	require.NoError(t, err)
	require.NoError(t, f.Close())
}

// The kernel tells of a lost write once; the second fdatasync is a success.
func TestLostWriteOfARealDeviceStaysAFailure(t *testing.T) { // D4
	path := loop(t, mountTmpfs(t, "size=256k"), 8<<20)
	f, err := OpenFile(path, FileOptions{})
	require.NoError(t, err)
	defer f.Close()
	_, err = f.WriteAt(bytes.Repeat([]byte{7}, 4<<20), 0)
	require.NoError(t, err, "the page cache takes it")
	first := f.Flush()
	require.Error(t, first)
	require.Equal(t, first, f.Flush())
	_, err = f.WriteAt([]byte{1}, 0)
	require.ErrorIs(t, err, first)
}

func TestFullFileSystemIsENOSPC(t *testing.T) {
	dir := mountTmpfs(t, "size=256k")
	f := create(t, filepath.Join(dir, "disk"), 1<<20)
	_, err := f.WriteAt(make([]byte, 1<<20), 0)
	require.ErrorIs(t, err, syscall.ENOSPC)
	require.ErrorContains(t, err, "of 1048576 bytes at 0: no space left on device")
	require.ErrorIs(t, f.ZeroAt(0, 1<<20, false), syscall.ENOSPC)
	require.NoError(t, f.ZeroAt(0, 1<<20, true), "a hole needs no space")
	_, err = f.WriteAt(make([]byte, 64<<10), 0)
	require.NoError(t, err, "a full disk is no failed flush")
}

func TestReadOnlyFileSystemIsOneClearLine(t *testing.T) {
	dir := mountTmpfs(t, "")
	path := filepath.Join(dir, "disk")
	require.NoError(t, os.WriteFile(path, []byte{1}, 0o600))
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	for name, o := range map[string]FileOptions{"disk": {}, "new": {Create: true, Size: 512}} {
		_, err := OpenFile(filepath.Join(dir, name), o)
		require.EqualError(t, err, filepath.Join(dir, name)+": lies on a read-only file system: remount it or choose another place")
	}
	f, err := OpenFile(path, FileOptions{ReadOnly: true})
	require.NoError(t, err)
	require.NoError(t, f.Close())
}

func TestTmpfsPassesTheSuite(t *testing.T) { // it punches holes but cannot zero a range
	dir := mountTmpfs(t, "size=16m")
	storagetest.Run(t, func(t *testing.T, size int64) storage.StorageProvider {
		path := filepath.Join(dir, "disk")
		require.NoError(t, os.RemoveAll(path))
		return create(t, path, size)
	}, 513, 1<<20+513)
}
