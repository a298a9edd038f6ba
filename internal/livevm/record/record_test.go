package record

import (
	"bytes"
	"fmt"
	"hash/crc32"
	"testing"

	"github.com/stretchr/testify/require"
)

// written is a file to which so many records were written.
func written(last int64) []byte {
	file := make([]byte, FileSize())
	p := make([]byte, Size)
	for n := int64(1); n <= last; n++ {
		Fill(p, n)
		for _, off := range Places(n) {
			copy(file[off:], p)
		}
	}
	return file
}

func verify(t *testing.T, file []byte, last int64) (places, bad int64, said []string) {
	places, bad, err := Verify(bytes.NewReader(file), last, 0, func(s string) { said = append(said, s) })
	require.NoError(t, err)
	return places, bad, said
}

func TestWhatWasWrittenIsFound(t *testing.T) {
	for _, last := range []int64{0, 1, 63, 64, 65, 200} {
		places, bad, said := verify(t, written(last), last)
		require.Equal(t, min(last, Rings[0])+min(last, Rings[1]), places)
		require.Zero(t, bad, "%v", said)
	}
}

func TestRingsLieOneBehindTheOtherAndGoRound(t *testing.T) {
	require.Equal(t, []int64{0, Rings[0] * Size}, Places(1))
	require.Equal(t, Places(1), Places(Rings[0]*Rings[1]+1))
	for ring, size := range Rings {
		used := make(map[int64]bool)
		for n := range size {
			off := Places(n + 1)[ring]
			require.True(t, off >= 0 && off < FileSize() && off%Size == 0)
			used[off] = true
		}
		require.Len(t, used, int(size), "each place once")
		far := Places(2)[ring] - Places(1)[ring]
		require.Greater(t, far, int64(64<<10), "the next lies in another block of the migration")
	}
}

func TestRecordCarriesItsSum(t *testing.T) {
	p := make([]byte, Size)
	Fill(p, 5)
	require.EqualValues(t, 5, number(p))
	require.Equal(t, crc32.Checksum(p[:Size-4], table), uint32(p[Size-4])|uint32(p[Size-3])<<8|uint32(p[Size-2])<<16|uint32(p[Size-1])<<24)
}

func TestWhatIsLostOrChangedIsFound(t *testing.T) {
	const last = 100
	at := func(n int64, ring int) string { return fmt.Sprintf("record %d is not at %d: ", n, Places(n)[ring]) }
	hot := Places(last)[0]
	for _, test := range []struct {
		name   string
		damage func(file []byte)
		said   string
	}{
		{"a changed bit", func(file []byte) { file[Places(7)[1]+1000] ^= 1 }, at(7, 1) + "what is there is no record"},
		{"the version before", func(file []byte) { Fill(file[hot:hot+Size], last-Rings[0]) }, at(100, 0) + "record 36 is"},
		{"zeroes", func(file []byte) { clear(file[Places(last)[1]:][:Size]) }, at(100, 1) + "what is there is no record"},
	} {
		file := written(last)
		test.damage(file)
		_, bad, said := verify(t, file, last)
		require.EqualValues(t, 1, bad, test.name)
		require.Equal(t, []string{test.said}, said, test.name)
	}
	_, _, err := Verify(bytes.NewReader(written(last)[:Places(7)[1]]), last, 0, func(string) {})
	require.ErrorContains(t, err, "at ")
}

func TestRecordThatWasUnderWayMayBeThere(t *testing.T) {
	file := written(101) // record 100 was the last that was named
	for next, want := range []int64{1, 0, 0} {
		_, bad, err := Verify(bytes.NewReader(file), 100, int64(next), func(string) {})
		require.NoError(t, err)
		require.Equal(t, want, bad, "with %d more", next)
	}
	Fill(file[Places(90)[0]:Places(90)[0]+Size], 101)
	_, bad, err := Verify(bytes.NewReader(file), 100, 1, func(string) {})
	require.NoError(t, err)
	require.EqualValues(t, 1, bad, "in the place of another")
}
