package sources

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/storagetest"
)

func TestMemoryStoragePassesTheSuite(t *testing.T) {
	storagetest.Run(t, func(_ *testing.T, size int64) storage.StorageProvider {
		return NewMemoryStorage(int(size))
	})
}

func TestNewMemoryStorageIsOneHoleOfZeroes(t *testing.T) {
	m := NewMemoryStorage(1<<20 + 1)
	end, hole, err := m.ExtentAt(5)
	require.NoError(t, err)
	require.True(t, hole)
	require.EqualValues(t, 1<<20+1, end)
	p := []byte{1, 2, 3}
	_, err = m.ReadAt(p, 1<<20-2)
	require.NoError(t, err)
	require.Equal(t, []byte{0, 0, 0}, p)
}

func TestMemoryHolesComeAndGo(t *testing.T) {
	m := NewMemoryStorage(10*memoryPage + 7)
	runs := func() (ends []int64) {
		for off := int64(0); off < m.size; {
			end, hole, err := m.ExtentAt(off)
			require.NoError(t, err)
			if hole {
				end = -end
			}
			ends = append(ends, end)
			off = max(end, -end)
		}
		return ends
	}
	_, err := m.WriteAt(make([]byte, 2*memoryPage), 3*memoryPage-1) // touches three pages
	require.NoError(t, err)
	require.Equal(t, []int64{-2 * memoryPage, 5 * memoryPage, -m.size}, runs())
	require.NoError(t, m.ZeroAt(2*memoryPage+1, 3*memoryPage, true)) // two whole pages and a part
	require.Equal(t, []int64{-2 * memoryPage, 3 * memoryPage, -m.size}, runs())
	require.NoError(t, m.ZeroAt(9*memoryPage, memoryPage+7, false)) // stays allocated
	require.Equal(t, []int64{-2 * memoryPage, 3 * memoryPage, -9 * memoryPage, m.size}, runs())
	require.NoError(t, m.TrimAt(9*memoryPage, memoryPage+7)) // with the short last page
	require.Equal(t, []int64{-2 * memoryPage, 3 * memoryPage, -m.size}, runs())
}

func TestMemoryStorageAllocatesOnlyOnTheFirstWrite(t *testing.T) {
	m := NewMemoryStorage(1 << 20)
	p := make([]byte, 64<<10)
	_, err := m.WriteAt(p, 0)
	require.NoError(t, err)
	require.Zero(t, testing.AllocsPerRun(100, func() {
		_, _ = m.WriteAt(p, 0) // asserted above
		_, _ = m.ReadAt(p, 0)  // inside the storage: it cannot fail
	}))
}

func TestNegativeMemoryIsAProgrammersError(t *testing.T) {
	require.Panics(t, func() { NewMemoryStorage(-1) })
}
