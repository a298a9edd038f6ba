package sources

import (
	"bytes"
	"io"
	"math/rand/v2"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// newPipe makes a pipe whose ends do not block.
func newPipe(t *testing.T) (r, w int) {
	var p [2]int
	require.NoError(t, unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK))
	t.Cleanup(func() {
		unix.Close(p[0])
		unix.Close(p[1])
	})
	_, err := unix.FcntlInt(uintptr(p[1]), unix.F_SETPIPE_SZ, 1<<20)
	require.NoError(t, err)
	return p[0], p[1]
}

func pipeInto(t *testing.T, w int, b []byte) {
	n, err := unix.Write(w, b)
	require.NoError(t, err)
	require.Equal(t, len(b), n)
}

func testSplice(t *testing.T, f *File) {
	r, w := newPipe(t)
	want := make([]byte, f.Size())
	random := rand.New(rand.NewPCG(1, 2))
	for n := range 100 {
		p := bytes.Repeat([]byte{byte(n), byte(n >> 4), 7}, 1+random.IntN(100<<10))
		off := random.IntN(len(want) - len(p))
		pipeInto(t, w, p)
		require.NoError(t, f.SpliceAt(r, int64(off), int64(len(p))))
		copy(want[off:], p)
	}
	got := make([]byte, len(want))
	_, err := f.ReadAt(got, 0)
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got), "not what was in the pipe")
}

func TestSpliceIsAWrite(t *testing.T) {
	testSplice(t, create(t, filepath.Join(t.TempDir(), "d"), 1<<20))
}

func TestSpliceOnTmpfsIsAWrite(t *testing.T) {
	testSplice(t, create(t, filepath.Join(mountTmpfs(t, "size=8m"), "d"), 1<<20))
}

func TestSpliceIntoABlockDeviceIsAWrite(t *testing.T) {
	f, err := OpenFile(loop(t, t.TempDir(), 1<<20), FileOptions{})
	require.NoError(t, err)
	defer f.Close()
	testSplice(t, f)
}

func TestSpliceWhereTheFileSystemHasNoneIsACopy(t *testing.T) {
	f := create(t, filepath.Join(t.TempDir(), "d"), 1<<20)
	r, w := newPipe(t)
	want := bytes.Repeat([]byte("silo"), 50000)
	pipeInto(t, w, want)
	for done := int64(0); done < int64(len(want)); {
		n, err := f.copyFrom(r, 5+done, int64(len(want))-done)
		require.NoError(t, err)
		require.Positive(t, n)
		done += n
	}
	got := make([]byte, len(want))
	_, err := f.ReadAt(got, 5)
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got))
}

// What is no pipe is refused by splice(2) as a file system is that has none.
func TestSpliceOfNoPipe(t *testing.T) {
	f := create(t, filepath.Join(t.TempDir(), "d"), 1<<20)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	pipeInto(t, fds[0], []byte("silo"))
	require.True(t, f.CanSplice())
	require.NoError(t, f.SpliceAt(fds[1], 3, 4), "it is copied")
	require.False(t, f.CanSplice(), "it does not save anything")
	got := make([]byte, 4)
	_, err = f.ReadAt(got, 3)
	require.NoError(t, err)
	require.Equal(t, "silo", string(got))
}

func TestSpliceSaysWhatIsWrong(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d")
	f := create(t, path, 1<<20)
	r, w := newPipe(t)
	pipeInto(t, w, []byte("silo"))
	require.ErrorIs(t, f.SpliceAt(r, 0, 8), io.ErrUnexpectedEOF, "it must not wait for more")
	require.ErrorIs(t, f.SpliceAt(r, 1<<20-1, 2), storage.ErrOutOfRange)
	require.ErrorIs(t, f.SpliceAt(r, -1, 1), storage.ErrOutOfRange)
	require.NoError(t, f.Close())
	require.ErrorIs(t, f.SpliceAt(r, 0, 1), ErrClosed)

	f, err := OpenFile(path, FileOptions{ReadOnly: true})
	require.NoError(t, err)
	defer f.Close()
	require.ErrorContains(t, f.SpliceAt(r, 0, 1), "opened for reading only")
}

func TestSpliceIntoAFullFileSystem(t *testing.T) {
	f := create(t, filepath.Join(mountTmpfs(t, "size=64k"), "d"), 1<<20)
	r, w := newPipe(t)
	pipeInto(t, w, make([]byte, 512<<10))
	require.ErrorIs(t, f.SpliceAt(r, 0, 512<<10), syscall.ENOSPC)
}
