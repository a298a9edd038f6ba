package faultdev

import (
	"bytes"
	"errors"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
	"github.com/silo-nbd/silo-nbd/pkg/storage/storagetest"
)

// plain hides what a store can do beyond storage.StorageProvider.
type plain struct{ storage.StorageProvider }

func TestDeviceWithoutFaultsPassesTheSuite(t *testing.T) {
	storagetest.Run(t, func(_ *testing.T, size int64) storage.StorageProvider {
		return FailAt(sources.NewMemoryStorage(int(size)), -1)
	}, 513, 65537)
	storagetest.Run(t, func(_ *testing.T, size int64) storage.StorageProvider {
		return FailAt(plain{sources.NewMemoryStorage(int(size))}, -1)
	}, 513, 65537)
}

// everything does one operation of each kind and returns their errors joined.
func everything(d *Device) error {
	p := []byte("abcdefgh")
	_, write := d.WriteAt(p, 0)
	_, read := d.ReadAt(p, 0)
	_, _, extent := d.ExtentAt(0)
	return errors.Join(write, read, d.ZeroAt(0, 8, false), d.TrimAt(0, 8), extent, d.Flush())
}

func TestEachOperationFailsOnce(t *testing.T) {
	for _, at := range []func(storage.StorageProvider, int) *Device{FailAt, FailFrom, ShortAt, LostAt} {
		n := 0
		for ; ; n++ {
			d := at(sources.NewMemoryStorage(4096), n)
			err := everything(d)
			require.Equal(t, 6, d.Ops())
			if !d.Fired() {
				require.NoError(t, err)
				break
			}
			require.ErrorIs(t, err, ErrInjected)
		}
		require.Equal(t, 6, n)
	}
}

func TestFailedWriteDoesNothingShortHalfAndLostAll(t *testing.T) {
	for _, c := range []struct {
		at   func(storage.StorageProvider, int) *Device
		n    int
		want string
	}{{FailAt, 0, "--------"}, {ShortAt, 4, "abcd----"}, {LostAt, 8, "abcdefgh"}} {
		store := sources.NewMemoryStorage(8)
		_, err := store.WriteAt([]byte("--------"), 0)
		require.NoError(t, err)
		n, err := c.at(store, 0).WriteAt([]byte("abcdefgh"), 0)
		require.EqualError(t, err, "faultdev: injected failure: operation 0, write of 8 bytes at 0")
		require.Equal(t, c.n, n)
		got := make([]byte, 8)
		_, err = store.ReadAt(got, 0)
		require.NoError(t, err)
		require.Equal(t, c.want, string(got))
	}
}

func TestFailFromNeverRecovers(t *testing.T) {
	d := FailFrom(sources.NewMemoryStorage(8), 1)
	require.NoError(t, d.Flush())
	require.False(t, d.Fired())
	for range 3 {
		require.ErrorIs(t, d.Flush(), ErrInjected)
	}
	require.True(t, d.Fired())
}

func TestFailKindAtCountsOneKind(t *testing.T) {
	d := FailKindAt(sources.NewMemoryStorage(8), Flush, 1)
	require.NoError(t, everything(d))
	require.ErrorIs(t, everything(d), ErrInjected)
	require.NoError(t, everything(d))
}

func TestNoSpaceAfterIsAFullDisk(t *testing.T) {
	d := NoSpaceAfter(sources.NewMemoryStorage(4096), 1000)
	_, err := d.WriteAt(make([]byte, 900), 0)
	require.NoError(t, err)
	n, err := d.WriteAt(bytes.Repeat([]byte{1}, 101), 0)
	require.ErrorIs(t, err, syscall.ENOSPC)
	require.Zero(t, n)
	require.True(t, d.Fired())
	require.ErrorIs(t, d.ZeroAt(0, 101, false), syscall.ENOSPC)
	require.NoError(t, d.ZeroAt(0, 4096, true), "a hole needs no space")
	require.NoError(t, d.ZeroAt(0, 100, false), "what fits is taken")
	require.NoError(t, d.Flush())
}

func TestHookSeesEveryOperation(t *testing.T) {
	var seen []Op
	d := New(sources.NewMemoryStorage(4096), func(op Op) error {
		seen = append(seen, op)
		return nil
	})
	require.NoError(t, everything(d))
	require.Equal(t, []Op{
		{0, Write, 0, 8, false}, {1, Read, 0, 8, false}, {2, Extent, 0, 0, false},
		{3, Zero, 0, 8, false}, {4, Trim, 0, 8, false}, {5, Flush, 0, 0, false},
	}, seen)
	require.EqualValues(t, 4096, d.Size())
	require.NoError(t, d.Close())
}
