package record

import (
	"bytes"
	"hash/crc32"
	"testing"

	"github.com/stretchr/testify/require"
)

// written is a file to which so many records were written.
func written(last int64) []byte {
	var file []byte
	p := make([]byte, Size)
	for n := int64(1); n <= last; n++ {
		Fill(p, n)
		for _, off := range Places(n) {
			if need := off + Size; need > int64(len(file)) {
				file = append(file, make([]byte, need-int64(len(file)))...)
			}
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
	require.Equal(t, []int64{(Rings[0] - 1) * Size, (Rings[0] + Rings[1] - 1) * Size}, Places(Rings[1]))
}

func TestRecordCarriesItsSum(t *testing.T) {
	p := make([]byte, Size)
	Fill(p, 5)
	require.EqualValues(t, 5, number(p))
	require.Equal(t, crc32.Checksum(p[:Size-4], table), uint32(p[Size-4])|uint32(p[Size-3])<<8|uint32(p[Size-2])<<16|uint32(p[Size-1])<<24)
}

func TestWhatIsLostOrChangedIsFound(t *testing.T) {
	const last = 100
	hot := Places(last)[0]
	for _, test := range []struct {
		name   string
		damage func(file []byte)
		said   string
	}{
		{"a changed bit", func(file []byte) { file[Places(7)[1]+1000] ^= 1 }, "record 7 is not at 286720: what is there is no record"},
		{"the version before", func(file []byte) { Fill(file[hot:hot+Size], last-Rings[0]) }, "record 100 is not at 143360: record 36 is"},
		{"zeroes", func(file []byte) { clear(file[Places(last)[1]:]) }, "record 100 is not at 667648: what is there is no record"},
	} {
		file := written(last)
		test.damage(file)
		_, bad, said := verify(t, file, last)
		require.EqualValues(t, 1, bad, test.name)
		require.Equal(t, []string{test.said}, said, test.name)
	}
	_, _, err := Verify(bytes.NewReader(written(last-1)), last, 0, func(string) {})
	require.ErrorContains(t, err, "record 100, at ")
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
