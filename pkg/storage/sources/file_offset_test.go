package sources

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/storagetest"
)

// inMemory is a directory on a file system without a device.
func inMemory(t *testing.T) string {
	t.Helper()
	const shm = "/dev/shm"
	var st unix.Statfs_t
	require.NoError(t, unix.Statfs(shm, &st))
	require.EqualValues(t, unix.TMPFS_MAGIC, st.Type)
	dir, err := os.MkdirTemp(shm, "silo-nbd-test-")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	return dir
}

func TestFileInMemoryPassesTheSuite(t *testing.T) {
	storagetest.Run(t, func(t *testing.T, size int64) storage.StorageProvider {
		f := create(t, filepath.Join(inMemory(t), "disk"), size)
		return f
	})
}

// TestEveryOffsetIsReached: beyond 4 GiB, and across pages.
func TestEveryOffsetIsReached(t *testing.T) {
	for name, dir := range map[string]string{"device": t.TempDir(), "memory": inMemory(t)} {
		t.Run(name, func(t *testing.T) {
			const size = 9 << 30 // sparse
			f := create(t, filepath.Join(dir, "disk"), size)
			other, err := os.OpenFile(f.Path(), os.O_RDWR, 0)
			require.NoError(t, err)
			defer other.Close()
			for _, off := range []int64{0, 511, 1<<32 - 1000, 5<<30 + 3, size - 3<<20} {
				b, got := make([]byte, 3<<20), make([]byte, 3<<20)
				rand.NewChaCha8([32]byte{byte(off)}).Read(b)
				n, err := f.WriteAt(b, off)
				require.NoError(t, err)
				require.Equal(t, len(b), n)
				_, err = other.ReadAt(got, off)
				require.NoError(t, err)
				require.Equal(t, b, got)

				rand.NewChaCha8([32]byte{byte(off), 1}).Read(b)
				_, err = other.WriteAt(b, off)
				require.NoError(t, err)
				n, err = f.ReadAt(got, off)
				require.NoError(t, err)
				require.Equal(t, len(got), n)
				require.Equal(t, b, got)
			}
		})
	}
}

func TestWhatIsNotCachedIsRead(t *testing.T) {
	f := create(t, filepath.Join(t.TempDir(), "disk"), 8<<20)
	b, got := make([]byte, 8<<20), make([]byte, 8<<20)
	rand.NewChaCha8([32]byte{}).Read(b)
	_, err := f.WriteAt(b, 0)
	require.NoError(t, err)
	require.NoError(t, f.Flush())
	for _, dropped := range []struct{ off, length int64 }{{0, 8 << 20}, {1 << 20, 1 << 20}, {4096, 4096}} {
		require.NoError(t, control(f.raw, func(fd int) error {
			return unix.Fadvise(fd, dropped.off, dropped.length, unix.FADV_DONTNEED)
		}))
		clear(got)
		n, err := f.ReadAt(got, 0)
		require.NoError(t, err)
		require.Equal(t, len(got), n)
		require.Equal(t, b, got)
	}
}
