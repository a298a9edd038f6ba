package verify

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// memory is a side in memory which counts what is read of it.
type memory struct {
	data  []byte
	reads atomic.Int64
	fail  error
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	if m.fail != nil {
		return 0, m.fail
	}
	n, err := bytes.NewReader(m.data).ReadAt(p, off)
	m.reads.Add(int64(n))
	return n, err
}
func (m *memory) Size() int64  { return int64(len(m.data)) }
func (m *memory) Close() error { return nil }

// holey is memory whose zero bytes are all holes.
type holey struct{ memory }

func (h *holey) ExtentAt(off int64) (int64, bool, error) {
	hole := h.data[off] == 0
	end := off
	for end < h.Size() && (h.data[end] == 0) == hole {
		end++
	}
	return end, hole, nil
}

func random(n int) []byte {
	b := make([]byte, n)
	rnd := rand.NewChaCha8([32]byte{1})
	rnd.Read(b)
	return b
}

func TestEqualDisksAreEqual(t *testing.T) {
	for _, size := range []int{0, 1, BlockSize - 1, BlockSize, bufferSize + 1, 5*bufferSize + 77} {
		data := random(size)
		r, err := Compare(t.Context(), &memory{data: data}, &memory{data: bytes.Clone(data)}, Options{})
		require.NoError(t, err)
		require.True(t, r.Equal())
		require.EqualValues(t, size, r.Compared)
		require.EqualValues(t, -1, r.First)
	}
}

func TestFirstDifferenceIsTheFirst(t *testing.T) {
	const size = 5*bufferSize + 77
	for _, off := range []int{0, 1, 77, BlockSize - 1, BlockSize, bufferSize, 3*bufferSize + 5, size - 1} {
		a := random(size)
		b := bytes.Clone(a)
		b[off] ^= 0xff
		b[size-1] ^= 0x01 // another one behind it, or the same again
		r, err := Compare(t.Context(), &memory{data: a}, &memory{data: b}, Options{})
		require.NoError(t, err)
		require.False(t, r.Equal())
		require.EqualValues(t, off, r.First)
		require.Equal(t, a[off], r.A)
		require.Equal(t, b[off], r.B)
		want := int64(2)
		if off/BlockSize == (size-1)/BlockSize {
			want = 1
		}
		require.Equal(t, want, r.Differing)
	}
}

func TestAnotherSizeIsADifference(t *testing.T) {
	data := random(3 * BlockSize)
	r, err := Compare(t.Context(), &memory{data: data}, &memory{data: data[:BlockSize]}, Options{})
	require.NoError(t, err)
	require.False(t, r.Equal())
	require.Zero(t, r.Differing)
	require.EqualValues(t, BlockSize, r.Compared)
}

func TestHolesAreComparedAsZeroes(t *testing.T) {
	for seed := range uint64(12) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		size := 1 + rnd.IntN(3*bufferSize)
		mk := func() []byte {
			b := make([]byte, size)
			for range 4 { // a few runs of data, at any edge
				start := rnd.IntN(size)
				for i := start; i < min(size, start+rnd.IntN(4*BlockSize)); i++ {
					b[i] = 1
				}
			}
			return b
		}
		a, b := mk(), mk()
		if seed%3 == 0 {
			b = bytes.Clone(a)
		}
		want, err := Compare(t.Context(), &memory{data: a}, &memory{data: b}, Options{Workers: 1})
		require.NoError(t, err)
		got, err := Compare(t.Context(), &holey{memory{data: a}}, &holey{memory{data: b}}, Options{})
		require.NoError(t, err)
		require.Equal(t, want, got)
		require.Equal(t, bytes.Equal(a, b), got.Equal())
		half, err := Compare(t.Context(), &memory{data: a}, &holey{memory{data: b}}, Options{})
		require.NoError(t, err)
		require.Equal(t, want, half)
	}
}

func TestSharedHolesAreNotRead(t *testing.T) {
	data := make([]byte, 16<<20)
	data[10<<20] = 1
	a, b := &holey{memory{data: data}}, &holey{memory{data: data}}
	r, err := Compare(t.Context(), a, b, Options{})
	require.NoError(t, err)
	require.True(t, r.Equal())
	require.LessOrEqual(t, a.reads.Load(), int64(bufferSize))
}

func TestReadErrorsAreReported(t *testing.T) {
	good, bad := &memory{data: random(10 * bufferSize)}, &memory{data: make([]byte, 10*bufferSize), fail: syscall.EIO}
	_, err := Compare(t.Context(), good, bad, Options{})
	require.ErrorIs(t, err, syscall.EIO)
	require.ErrorContains(t, err, "the second disk")
	_, err = Compare(t.Context(), bad, good, Options{})
	require.ErrorContains(t, err, "the first disk")
}

// shrinking says that it is longer than it is.
type shrinking struct{ memory }

func (*shrinking) Size() int64 { return 2 * bufferSize }

func TestShrinkingDiskIsAnError(t *testing.T) {
	_, err := Compare(t.Context(), &memory{data: make([]byte, 2*bufferSize)}, &shrinking{memory{data: make([]byte, bufferSize)}}, Options{})
	require.ErrorContains(t, err, "did it shrink?")
	require.NotErrorIs(t, err, io.EOF)
}

func TestCancelStopsComparing(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	cancel(why)
	_, err := Compare(ctx, &memory{data: random(10 * bufferSize)}, &memory{data: random(10 * bufferSize)}, Options{})
	require.ErrorIs(t, err, why)
}

func TestSparseFiles(t *testing.T) {
	dir := t.TempDir()
	open := func(name string, size int64, data map[int64]string) Side {
		f, err := os.Create(filepath.Join(dir, name))
		require.NoError(t, err)
		require.NoError(t, f.Truncate(size))
		for off, s := range data {
			_, err := f.WriteAt([]byte(s), off)
			require.NoError(t, err)
		}
		require.NoError(t, f.Close())
		s, err := Open(t.Context(), f.Name(), nil)
		require.NoError(t, err)
		t.Cleanup(func() { s.Close() })
		return s
	}
	const size = 1 << 40 // only possible if holes are skipped
	a := open("a", size, map[int64]string{5 << 30: "x", size - 1: "z"})
	b := open("b", size, map[int64]string{5 << 30: "x", size - 1: "z", 7 << 30: "\000"}) // data that is zero
	c := open("c", size, map[int64]string{5 << 30: "x", size - 1: "y"})
	r, err := Compare(t.Context(), a, b, Options{})
	require.NoError(t, err)
	require.True(t, r.Equal())
	r, err = Compare(t.Context(), b, c, Options{})
	require.NoError(t, err)
	require.EqualValues(t, size-1, r.First)
	require.EqualValues(t, 1, r.Differing)
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	for name, want := range map[string]string{
		dir:                     "neither a regular file nor a block device",
		"/dev/null":             "neither a regular file nor a block device",
		filepath.Join(dir, "x"): "no such file",
		"nbd+unix:///a?socket=" + filepath.Join(dir, "x"): "no such file",
		"nbd://":        "names no host",
		"nbds://host/a": "wants TLS",
	} {
		_, err := Open(t.Context(), name, nil)
		require.ErrorContains(t, err, want)
	}
}
