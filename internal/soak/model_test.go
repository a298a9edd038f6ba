package soak

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
)

const testSectors = 9 // the last one is short

// testModel is a model of a disk of noise, and a copy of it.
func testModel(t *testing.T) (*model, []byte) {
	t.Helper()
	base := make([]byte, testSectors*sector-100)
	noise := rand.NewChaCha8([32]byte{1})
	_, _ = noise.Read(base) // never fails
	return newModel(7, bytes.NewReader(base), int64(len(base))), bytes.Clone(base)
}

// put is a write of sectors that was answered, or not; it returns what flushed
// wants.
func put(t *testing.T, m *model, disk []byte, lo, hi int64, of uint32, answered bool) map[int64]uint64 {
	t.Helper()
	require.True(t, m.lock(lo, hi))
	p := m.write(lo, hi, of)
	off, _ := m.bounds(lo)
	_, end := m.bounds(hi - 1)
	if p == nil {
		clear(disk[off:end])
	} else {
		require.Len(t, p, int(end-off))
		copy(disk[off:end], p)
	}
	if !answered {
		return nil
	}
	return m.wrote(lo, hi)
}

func look(t *testing.T, m *model, disk []byte) error {
	t.Helper()
	require.True(t, m.lock(0, testSectors))
	defer m.unlock(0, testSectors)
	return m.read(0, testSectors, disk)
}

func TestModelWantsWhatWasAnswered(t *testing.T) {
	m, disk := testModel(t)
	require.NoError(t, look(t, m, disk))
	before := bytes.Clone(disk)
	put(t, m, disk, 2, 5, firstRecord, true)
	put(t, m, disk, 8, 9, firstRecord, true)
	put(t, m, disk, 4, 6, zeroes, true)
	require.NoError(t, look(t, m, disk))
	require.ErrorContains(t, look(t, m, before), "sector 2 holds the source's bytes: want record 2")
	expected := bytes.Clone(before)
	m.apply(expected, 0)
	require.Equal(t, disk, expected)
	disk[0]++
	require.ErrorContains(t, look(t, m, disk), "sector 0 holds something else")
}

// A kill undoes nothing that was answered; of a write that was not, all or nothing may
// be there. (fault F2, trap I9)
func TestModelForgivesAKillOnlyWhatWasNotAnswered(t *testing.T) {
	m, disk := testModel(t)
	empty := bytes.Clone(disk)
	put(t, m, disk, 1, 2, firstRecord, true)
	covers := m.flushing()
	flushedDisk := bytes.Clone(disk)
	put(t, m, disk, 1, 2, firstRecord, true) // while the flush runs
	m.flushed(covers)
	before := bytes.Clone(disk)
	put(t, m, disk, 3, 4, zeroes, false)
	require.False(t, m.lock(3, 4), "nobody knows what it holds")
	m.died()
	require.Equal(t, [][2]int64{{1, 2}}, m.flushedRuns())
	require.False(t, m.exact())
	require.ErrorContains(t, m.compare(0, testSectors, empty, false), "sector 1 holds the source's bytes: want record 3")
	require.ErrorContains(t, m.compare(0, testSectors, flushedDisk, false), "sector 1 holds record 2: want record 3")
	require.NoError(t, m.compare(0, testSectors, disk, false))
	require.NoError(t, look(t, m, before))
	require.True(t, m.exact())
	require.ErrorContains(t, look(t, m, disk), "sector 3 holds zeroes: want the source's bytes", "what was seen once stays")
	m.died()
	require.NoError(t, look(t, m, before), "and outlives a kill")
}

func TestModelKnowsATornRecord(t *testing.T) {
	m, disk := testModel(t)
	through := put(t, m, disk, 0, 2, firstRecord, true)
	m.flushed(through)
	disk[300]++
	require.ErrorContains(t, look(t, m, disk), "sector 0 holds what looks like record 2 of sector 0 (seed 7), and is not whole")
}
