// Package storagetest holds the acceptance suite that every store passes.
package storagetest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// Sizes are the sizes that Run tries unless it is told others, in bytes: less
// than a sector, less than a block, a short last sector, a short last block.
var Sizes = []int64{1, 511, 512, 4096, 65536, 65537, 300_001, 1<<20 + 513}

// Run holds what open returns against the contract of storage.StorageProvider
// and of the optional interfaces that it implements. What open returns may
// hold anything; Run closes it. Nothing else may write to it.
func Run(t *testing.T, open func(t *testing.T, size int64) storage.StorageProvider, sizes ...int64) {
	if len(sizes) == 0 {
		sizes = Sizes
	}
	claims := []struct {
		name  string
		check func(t *testing.T, s storage.StorageProvider, size int64)
	}{
		{"SizeIsWhatWasAskedFor", testSize},
		{"ReadsGiveWhatWasWritten", testModel},
		{"RangesOutsideAreRefusedWhole", testRanges},
		{"ZeroingFastZeroesOrChangesNothing", testFastZero},
		{"ReadsEndWithEOF", testEOF},
		{"ExtentsCoverTheDiskAndHolesAreZero", testExtents},
		{"ConcurrentOperationsKeepToTheirRange", testConcurrent},
		{"OverlappingWritesLeaveOneInEachSector", testOverlap},
		{"NothingWorksAfterClose", testClosed},
	}
	for _, size := range sizes {
		for _, c := range claims {
			t.Run(fmt.Sprintf("%s/%d", c.name, size), func(t *testing.T) {
				s := open(t, size)
				t.Cleanup(func() { _ = s.Close() }) // the second Close of most; testClosed looks at the first
				c.check(t, s, size)
			})
		}
	}
}

func testSize(t *testing.T, s storage.StorageProvider, size int64) {
	require.EqualValues(t, size, s.Size())
}

// fill gives the store known bytes and returns them.
func fill(t *testing.T, s storage.StorageProvider, seed byte) []byte {
	t.Helper()
	model := make([]byte, s.Size())
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(model) // never fails
	n, err := s.WriteAt(model, 0)
	require.NoError(t, err)
	require.Equal(t, len(model), n)
	return model
}

func requireContent(t *testing.T, s storage.StorageProvider, model []byte) {
	t.Helper()
	got := make([]byte, len(model))
	n, err := s.ReadAt(got, 0)
	if !errors.Is(err, io.EOF) { // which io.ReaderAt allows at the very end
		require.NoError(t, err)
	}
	require.Equal(t, len(model), n)
	if !bytes.Equal(model, got) {
		at := 0
		for model[at] == got[at] {
			at++
		}
		require.Failf(t, "content differs", "first at %d of %d: want %#x, got %#x", at, len(model), model[at], got[at])
	}
}

// testModel runs random operations against the store and a byte slice.
func testModel(t *testing.T, s storage.StorageProvider, size int64) {
	model := fill(t, s, 1)
	requireContent(t, s, model)
	content := rand.NewChaCha8([32]byte{7})
	r := rand.New(content)
	for range 200 {
		off, length := randomRange(r, size)
		part := model[off : off+length]
		switch op := r.IntN(6); op {
		case 0, 1:
			_, _ = content.Read(part) // never fails
			n, err := s.WriteAt(part, off)
			require.NoError(t, err)
			require.EqualValues(t, length, n)
		case 2, 3:
			if z, ok := s.(storage.Zeroer); ok {
				clear(part)
				require.NoError(t, z.ZeroAt(off, length, op == 2))
			}
		case 4:
			if tr, ok := s.(storage.Trimmer); ok {
				require.NoError(t, tr.TrimAt(off, length))
				// What it reads as is not defined, what is around it is.
				_, err := s.WriteAt(part, off)
				require.NoError(t, err)
			}
		}
		got := make([]byte, length)
		n, err := s.ReadAt(got, off)
		if !errors.Is(err, io.EOF) || off+length < size {
			require.NoError(t, err)
		}
		require.EqualValues(t, length, n)
		require.True(t, bytes.Equal(part, got), "%d bytes at %d", length, off)
	}
	requireContent(t, s, model)
	require.NoError(t, s.Flush())
	requireContent(t, s, model)
}

// randomRange is a range inside size bytes, often at the edges of sectors,
// pages and the disk.
func randomRange(r *rand.Rand, size int64) (off, length int64) {
	a, b := r.Int64N(size+1), r.Int64N(size+1)
	grain := []int64{1, 1, 512, 4096, 65536}[r.IntN(5)]
	a, b = a/grain*grain, min(size, (b+grain-1)/grain*grain)
	if r.IntN(8) == 0 {
		b = size
	}
	if a > b {
		a, b = b, a
	}
	if r.IntN(2) == 0 {
		b = min(b, a+r.Int64N(10000))
	}
	return a, b - a
}

func testRanges(t *testing.T, s storage.StorageProvider, size int64) {
	model := fill(t, s, 2)
	for _, c := range []struct{ off, length int64 }{
		{size, 1}, {size - 1, 2}, {0, size + 1}, {size + 1, 1}, {size + 1<<40, 512},
		{-1, 1}, {-512, 1024}, {math.MinInt64, 1}, {math.MaxInt64, 1}, {math.MaxInt64 - 10, 512},
	} {
		n, err := s.WriteAt(make([]byte, c.length), c.off)
		require.ErrorIs(t, err, storage.ErrOutOfRange, "write of %d at %d", c.length, c.off)
		require.Zero(t, n)
		if z, ok := s.(storage.Zeroer); ok {
			require.ErrorIs(t, z.ZeroAt(c.off, c.length, true), storage.ErrOutOfRange, "zero of %d at %d", c.length, c.off)
			require.ErrorIs(t, z.ZeroAt(c.off, c.length, false), storage.ErrOutOfRange, "zero of %d at %d", c.length, c.off)
		}
		if tr, ok := s.(storage.Trimmer); ok {
			require.ErrorIs(t, tr.TrimAt(c.off, c.length), storage.ErrOutOfRange, "trim of %d at %d", c.length, c.off)
		}
	}
	if z, ok := s.(storage.Zeroer); ok {
		require.ErrorIs(t, z.ZeroAt(0, -1, true), storage.ErrOutOfRange)
		require.ErrorIs(t, z.ZeroAt(size, math.MaxInt64, false), storage.ErrOutOfRange)
	}
	if tr, ok := s.(storage.Trimmer); ok {
		require.ErrorIs(t, tr.TrimAt(0, -1), storage.ErrOutOfRange)
	}
	_, err := s.ReadAt(make([]byte, 1), -1)
	require.Error(t, err)
	require.NotErrorIs(t, err, io.EOF)

	// Nothing is a range, too, and costs nothing.
	for _, off := range []int64{0, size / 2, size} {
		n, err := s.WriteAt(nil, off)
		require.NoError(t, err)
		require.Zero(t, n)
		if off < size {
			_, err = s.ReadAt(nil, off)
			require.NoError(t, err)
		}
		if z, ok := s.(storage.Zeroer); ok {
			require.NoError(t, z.ZeroAt(off, 0, true))
			require.NoError(t, z.ZeroAt(off, 0, false))
		}
		if tr, ok := s.(storage.Trimmer); ok {
			require.NoError(t, tr.TrimAt(off, 0))
		}
	}
	requireContent(t, s, model)
}

func testFastZero(t *testing.T, s storage.StorageProvider, size int64) {
	z, ok := s.(storage.FastZeroer)
	if !ok {
		return // it does not say that it can
	}
	model := fill(t, s, 8)
	r := rand.New(rand.NewChaCha8([32]byte{8}))
	for i := range 50 {
		off, length := randomRange(r, size)
		punch := i%2 == 0
		switch err := z.ZeroFastAt(off, length, punch); {
		case err == nil:
			clear(model[off : off+length])
		case z.CanZeroFast() && punch:
			require.NoError(t, err, "%d bytes at %d", length, off)
		default:
			require.ErrorIs(t, err, errors.ErrUnsupported)
		}
		requireContent(t, s, model)
	}
	require.ErrorIs(t, z.ZeroFastAt(size-1, 2, true), storage.ErrOutOfRange)
	require.NoError(t, z.ZeroFastAt(size, 0, true))
	requireContent(t, s, model)
}

func testEOF(t *testing.T, s storage.StorageProvider, size int64) {
	model := fill(t, s, 3)
	for _, before := range []int64{0, 1, min(size, 511), min(size, 4096), size} {
		got := make([]byte, before+700)
		n, err := s.ReadAt(got, size-before)
		require.ErrorIs(t, err, io.EOF)
		require.EqualValues(t, before, n)
		require.True(t, bytes.Equal(model[size-before:], got[:n]))
		require.Equal(t, make([]byte, 700), got[before:], "what lies beyond the end is left alone")
	}
	for _, off := range []int64{size + 1, size + 1<<40, math.MaxInt64} {
		n, err := s.ReadAt(make([]byte, 1), off)
		require.ErrorIs(t, err, io.EOF)
		require.Zero(t, n)
	}
}

func testExtents(t *testing.T, s storage.StorageProvider, size int64) {
	e, ok := s.(storage.Extenter)
	if !ok {
		t.Skip("the store is no Extenter")
	}
	model := fill(t, s, 4)
	if z, ok := s.(storage.Zeroer); ok && size > 1<<20 {
		clear(model[4096 : 900<<10])
		require.NoError(t, z.ZeroAt(4096, 900<<10-4096, true))
	}
	covered := int64(0)
	for covered < size {
		end, hole, err := e.ExtentAt(covered)
		require.NoError(t, err)
		require.Greater(t, end, covered)
		require.LessOrEqual(t, end, size)
		if hole {
			require.Equal(t, make([]byte, end-covered), model[covered:end], "a hole where there are bytes")
		}
		covered = end
	}
	requireContent(t, s, model)
	for _, off := range []int64{size, -1, math.MaxInt64} {
		_, _, err := e.ExtentAt(off)
		require.ErrorIs(t, err, storage.ErrOutOfRange)
	}
	off := size / 2
	_, err := s.WriteAt([]byte{1}, off)
	require.NoError(t, err)
	_, hole, err := e.ExtentAt(off)
	require.NoError(t, err)
	require.False(t, hole, "what was just written is no hole")
}

func testConcurrent(t *testing.T, s storage.StorageProvider, size int64) {
	model := fill(t, s, 5)
	const workers = 8
	share := size / workers
	var wg sync.WaitGroup
	for w := range int64(workers) {
		wg.Go(func() {
			content := rand.NewChaCha8([32]byte{8, byte(w)})
			r := rand.New(content)
			mine := model[w*share : (w+1)*share]
			for range 30 {
				off, length := randomRange(r, share)
				part := mine[off : off+length]
				if z, ok := s.(storage.Zeroer); ok && r.IntN(3) == 0 {
					clear(part)
					if err := z.ZeroAt(w*share+off, length, r.IntN(2) == 0); err != nil {
						t.Errorf("zero: %v", err)
					}
				} else {
					_, _ = content.Read(part) // never fails
					if _, err := s.WriteAt(part, w*share+off); err != nil {
						t.Errorf("write: %v", err)
					}
				}
				got := make([]byte, share)
				if _, err := s.ReadAt(got, w*share); err != nil && !errors.Is(err, io.EOF) {
					t.Errorf("read: %v", err)
				}
				if !bytes.Equal(mine, got) {
					t.Errorf("worker %d does not read what it wrote", w)
					return
				}
			}
			if err := s.Flush(); err != nil {
				t.Errorf("flush: %v", err)
			}
		})
	}
	wg.Wait()
	requireContent(t, s, model)
}

func testOverlap(t *testing.T, s storage.StorageProvider, size int64) {
	fill(t, s, 6)
	const workers, sector = 6, 512
	length := min(size, 256<<10) / sector * sector
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			p := make([]byte, length)
			for at := 0; at < len(p); at += 8 {
				binary.LittleEndian.PutUint64(p[at:], uint64(w+1))
			}
			for range 10 {
				if _, err := s.WriteAt(p, 0); err != nil {
					t.Errorf("write: %v", err)
				}
			}
		})
	}
	wg.Wait()
	got := make([]byte, length)
	_, err := s.ReadAt(got, 0)
	if !errors.Is(err, io.EOF) {
		require.NoError(t, err)
	}
	for at := 0; at < len(got); at += sector {
		one := got[at : at+sector]
		owner := binary.LittleEndian.Uint64(one)
		require.True(t, owner >= 1 && owner <= workers, "sector %d", at/sector)
		require.Equal(t, bytes.Repeat(one[:8], sector/8), one, "sector %d is a mixture", at/sector)
	}
}

func testClosed(t *testing.T, s storage.StorageProvider, _ int64) {
	fill(t, s, 7)
	require.NoError(t, s.Flush())
	require.NoError(t, s.Close())
	p := make([]byte, 1)
	_, err := s.ReadAt(p, 0)
	require.Error(t, err)
	require.NotErrorIs(t, err, io.EOF)
	_, err = s.WriteAt(p, 0)
	require.Error(t, err)
	require.Error(t, s.Flush())
	if z, ok := s.(storage.Zeroer); ok {
		require.Error(t, z.ZeroAt(0, 1, true))
		require.Error(t, z.ZeroAt(0, 1, false))
	}
	if tr, ok := s.(storage.Trimmer); ok {
		require.Error(t, tr.TrimAt(0, 1))
	}
	if e, ok := s.(storage.Extenter); ok {
		_, _, err := e.ExtentAt(0)
		require.Error(t, err)
	}
	require.NotPanics(t, func() { _ = s.Close() }) // whether it is an error is the store's own matter
}
