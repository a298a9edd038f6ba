package wire

import (
	"bytes"
	"math"
	"testing"

	"github.com/stretchr/testify/require"
)

// rleInputs is what Silo was given when it wrote the vectors.
func rleInputs() map[string][]byte {
	zero := func(n int) []byte { return make([]byte, n) }
	cat := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	raw := make([]byte, 100)
	for i := range raw {
		raw[i] = byte(i + 1)
	}
	return map[string][]byte{
		"empty": {}, "1zero": zero(1), "3zero": zero(3), "4zero": zero(4), "5zero": zero(5), "64zero": zero(64),
		"4096zero": zero(4096), "65536zero": zero(65536),
		"4x07mid": {7, 7, 7, 7, 1}, "4x07end": {1, 7, 7, 7, 7}, "raw3": {1, 2, 3},
		"mixed": cat([]byte{0x1a}, zero(4), []byte{1, 2, 0, 0, 0}, []byte{4, 4, 4, 4, 4},
			[]byte{0, 0, 9, 9, 5, 0x17}, bytes.Repeat([]byte{8}, 8), zero(1)),
		"tail12zero": cat([]byte{1, 2, 3}, zero(12)),
		"gap11":      cat([]byte{1}, zero(11), []byte{2}),
		"gap12":      cat([]byte{1}, zero(12), []byte{2}),
		"raw100":     raw,
	}
}

func TestRunLengthVectors(t *testing.T) {
	for _, version := range []string{"v0.1.5", "v0.2.21"} {
		packets := vectors(t, version)
		for name, data := range rleInputs() {
			packet, ok := packets["WriteAt.rle."+name]
			require.True(t, ok, name)
			var m WriteAt
			require.NoError(t, m.UnmarshalBinary(packet), name)
			require.Equal(t, WriteRunLength, m.Type)
			require.Equal(t, int64(4096), m.Off)
			got, err := ExpandRLE(nil, m.Data, MaxRunLength)
			require.NoError(t, err, name)
			require.True(t, bytes.Equal(data, got), "%s expands to %x", name, got)
			require.Equal(t, packet, AppendRLE(AppendWriteAtHead(nil, WriteRunLength, 4096), data), "%s: what we write", name)
		}
	}
}

func TestZeroRunIsOneToken(t *testing.T) {
	for _, n := range []int64{1, 4, 4096, 1 << 20, MaxRunLength} {
		b := AppendZeroRun(nil, 512, n)
		require.LessOrEqual(t, len(b), 16)
		var m WriteAt
		require.NoError(t, m.UnmarshalBinary(b))
		r := NewRLE(m.Data, MaxRunLength)
		tok, ok := r.Next()
		require.True(t, ok)
		require.Equal(t, Token{Run: n}, tok)
		_, ok = r.Next()
		require.False(t, ok)
		require.NoError(t, r.Err())
	}
}

// P1: a few bytes that stand for very many cost nothing.
func TestRunLengthBombIsRefusedBeforeMemoryIsTaken(t *testing.T) {
	for name, v := range map[string]struct {
		tokens []byte
		want   error
	}{
		"run of 1 GiB and 1":   {[]byte{0x83, 0x80, 0x80, 0x80, 0x08, 0}, ErrTooLarge},
		"two runs over 1 GiB":  {[]byte{0x81, 0x80, 0x80, 0x80, 0x08, 0, 3, 0}, ErrTooLarge},
		"run of 2^63":          {[]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0}, ErrTooLarge},
		"literal of 2^62":      {[]byte{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f}, ErrTooLarge},
		"varint of 11 bytes":   {[]byte{0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 1}, ErrTooLarge},
		"varint over 64 bits":  {[]byte{0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 2}, ErrTooLarge},
		"unterminated varint":  {[]byte{0x80, 0x80}, ErrShort},
		"run without its byte": {[]byte{9}, ErrShort},
		"literal cut off":      {[]byte{6, 1, 2}, ErrShort},
	} {
		packet := append(AppendWriteAtHead(nil, WriteRunLength, 0), v.tokens...)
		require.ErrorIs(t, new(WriteAt).UnmarshalBinary(packet), v.want, name)
		dst, err := ExpandRLE(nil, v.tokens, MaxRunLength)
		require.ErrorIs(t, err, v.want, name)
		require.Zero(t, cap(dst), name)
	}
	_, err := ExpandRLE(nil, []byte{11, 7}, 4)
	require.ErrorIs(t, err, ErrTooLarge, "the caller's limit counts")
}

func TestRunLengthOfAnyDataExpandsToIt(t *testing.T) {
	for _, n := range []int{0, 1, 63, 64, 65, 127, 128, 129, 4096} {
		for _, tail := range [][]byte{nil, {1}, {0, 1}, bytes.Repeat([]byte{5}, 200)} {
			data := append(make([]byte, n), tail...)
			tokens := AppendRLE(nil, data)
			got, err := ExpandRLE(nil, tokens, int64(len(data)))
			require.NoError(t, err)
			require.True(t, bytes.Equal(data, got), "%d zeroes and %d", n, len(tail))
		}
	}
	length, err := RLELen([]byte{0, 1, 9, 0}, math.MaxInt64)
	require.NoError(t, err, "tokens that stand for nothing do no harm")
	require.Zero(t, length)
}

func FuzzRLE(f *testing.F) {
	for _, data := range rleInputs() {
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		tokens := AppendRLE(nil, data)
		got, err := ExpandRLE(nil, tokens, int64(len(data)))
		if err != nil || !bytes.Equal(got, data) {
			t.Fatalf("%x becomes %x and then %x (%v)", data, tokens, got, err)
		}
		// And as tokens themselves: whatever they are, they stay inside the limit.
		got, err = ExpandRLE(nil, data, 1<<16)
		if len(got) > 1<<16 {
			t.Fatalf("%d bytes (%v)", len(got), err)
		}
	})
}
