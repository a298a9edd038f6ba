package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func errorsIsAny(err error, targets ...error) bool {
	for _, t := range targets {
		if errors.Is(err, t) {
			return true
		}
	}
	return false
}

// A count decides no allocation: claiming four billion elements costs nothing.
func TestCountsLargerThanThePacketAreRefused(t *testing.T) {
	for _, v := range []struct {
		m    message
		head []byte // up to the count
	}{
		{new(DirtyList), []byte{5, 0, 16, 0, 0}},
		{new(RemoveFromMap), []byte{0x0b}},
		{new(AlternateSources), []byte{0x0c}},
		{new(WriteAtWithMap), []byte{9, 0, 0, 0, 0, 0, 0, 0, 0}},
	} {
		for _, count := range []uint32{1, 1 << 20, 1<<24 + 1, 1 << 29, 1 << 30, 1 << 31, math.MaxUint32} {
			packet := binary.LittleEndian.AppendUint32(bytes.Clone(v.head), count)
			allocs := testing.AllocsPerRun(1, func() {
				err := v.m.UnmarshalBinary(packet)
				require.True(t, errorsIsAny(err, ErrShort, ErrTooLarge), "%T with %d: %v", v.m, count, err)
			})
			require.Less(t, allocs, 50.0, "%T", v.m)
		}
	}
}

func TestDevInfoLengthsThatWrapAreRefused(t *testing.T) {
	head := []byte{6, 0, 4, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0}
	for _, tail := range [][]byte{
		{0xff, 0xff},                                 // name longer than the packet
		{0, 0, 0xff, 0xff, 0xff, 0xff},               // schema of 4 GiB
		{0, 0, 0xff, 0xff, 0xff, 0x7f},               // of 2 GiB - 1
		{0, 0, 1, 0, 0x10, 0},                        // over MaxSchema
		{1, 0, 'a', 0xf0, 0xff, 0xff, 0xff, 1, 2, 3}, // 32-bit wrap with the name
	} {
		err := new(DevInfo).UnmarshalBinary(append(bytes.Clone(head), tail...))
		require.True(t, errorsIsAny(err, ErrShort, ErrTooLarge), "%x: %v", tail, err)
	}
}

// P7: a name is bytes; what it must not become is the reader's business.
func TestAnyNameTravelsUnchanged(t *testing.T) {
	for _, name := range []string{"", "../../etc/passwd", "a/b", ".", "\x00", "\xff\xfe", "a\nb", strings.Repeat("n", math.MaxUint16)} {
		in := DevInfo{Size: 1, BlockSize: 1, Name: name}
		b, err := in.AppendBinary(nil)
		require.NoError(t, err)
		var out DevInfo
		require.NoError(t, out.UnmarshalBinary(b))
		require.Equal(t, in, out)
	}
	_, err := (&DevInfo{Name: strings.Repeat("n", math.MaxUint16+1)}).AppendBinary(nil)
	require.ErrorIs(t, err, ErrTooLarge)
	_, err = (&DevInfo{Schema: strings.Repeat("s", MaxSchema+1)}).AppendBinary(nil)
	require.ErrorIs(t, err, ErrTooLarge)
}

func TestEventsWithNoMeaningAreRefused(t *testing.T) {
	require.ErrorIs(t, new(Event).UnmarshalBinary([]byte{7, 6}), ErrInvalid)
	require.ErrorIs(t, new(Event).UnmarshalBinary([]byte{7, 5}), ErrShort, "a custom event without its type")
	_, err := (&Event{Type: 6}).AppendBinary(nil)
	require.ErrorIs(t, err, ErrInvalid)
}

func TestExtensionRoundTrip(t *testing.T) {
	for _, ext := range []Extension{
		{Revision: 1},
		{Revision: 7, MaxData: 1 << 20, Window: 3 << 20, Live: true},
		{Revision: 1, Identity: Identity{UUID: [16]byte{1, 15: 2}, Generation: 1 << 60}},
		{Revision: 2, Refused: "another disk"},
		{Revision: 2, Live: true, Device: [16]byte{3, 15: 4}},
		{Revision: 4, Live: true, Device: [16]byte{3, 15: 4}, Epoch: Epoch{Now: 1 << 63, Before: 7, Steps: 9}},
		{Revision: 4, Device: [16]byte{3}, Epoch: Epoch{Now: 5}, Hold: true},
		{Revision: 4, Epoch: Epoch{Steps: 1}, Compare: true, Clone: true, Unknown: []Field{{Type: 12, Value: []byte{1}}}},
		{Revision: 1, Unknown: []Field{{Type: 19, Value: []byte{}}, {Type: 77, Value: []byte("later")}}},
	} {
		in := DevInfo{Size: 10, BlockSize: 5, Name: "n", Schema: "s", Extension: &ext}
		b, err := in.AppendBinary(nil)
		require.NoError(t, err)
		var out DevInfo
		require.NoError(t, out.UnmarshalBinary(b))
		require.Equal(t, in, out)

		b, err = (&DevInfoResponse{Extension: ext}).AppendBinary(nil)
		require.NoError(t, err)
		var answer DevInfoResponse
		require.NoError(t, answer.UnmarshalBinary(b))
		require.Equal(t, ext, answer.Extension)
		for n := range b {
			err := new(DevInfoResponse).UnmarshalBinary(b[:n:n])
			if err != nil {
				require.True(t, errorsIsAny(err, ErrShort, ErrInvalid), "%v", err)
			}
		}
	}
}

// An old peer may leave anything behind the schema. It is no extension then, and
// no error.
func TestJunkBehindTheSchemaIsNoExtension(t *testing.T) {
	plain, err := (&DevInfo{Size: 10, BlockSize: 5, Name: "n", Schema: "s"}).AppendBinary(nil)
	require.NoError(t, err)
	revision := []byte{1, 0, 4, 0, 1, 0, 0, 0}
	for name, junk := range map[string][]byte{
		"one byte":          {0},
		"text":              []byte("hello, world"),
		"no revision":       {2, 0, 4, 0, 1, 0, 0, 0},
		"revision 0":        {1, 0, 4, 0, 0, 0, 0, 0},
		"revision cut off":  {1, 0, 4, 0, 1, 0, 0},
		"revision of 2":     {1, 0, 2, 0, 1, 0},
		"revision twice":    append(bytes.Clone(revision), revision...),
		"wrong order":       append(bytes.Clone(revision), 9, 0, 0, 0, 3, 0, 0, 0),
		"length wraps":      append(bytes.Clone(revision), 9, 0, 0xff, 0xff, 1),
		"live with a value": append(bytes.Clone(revision), 3, 0, 1, 0, 1),
		"device of zeroes":  append(bytes.Clone(revision), append([]byte{7, 0, 16, 0}, make([]byte, 16)...)...),
		"epoch of zeroes":   append(bytes.Clone(revision), append([]byte{8, 0, 20, 0}, make([]byte, 20)...)...),
		"epoch cut short":   append(bytes.Clone(revision), append([]byte{8, 0, 19, 0}, bytes.Repeat([]byte{1}, 19)...)...),
		"hold with a value": append(bytes.Clone(revision), 9, 0, 1, 0, 1),
		"clone, then hold":  append(bytes.Clone(revision), 11, 0, 0, 0, 9, 0, 0, 0),
		"too long":          append(bytes.Clone(revision), make([]byte, MaxExtension)...),
	} {
		var m DevInfo
		require.NoError(t, m.UnmarshalBinary(append(bytes.Clone(plain), junk...)), name)
		require.Nil(t, m.Extension, name)
		require.Equal(t, "s", m.Schema, name)
		err := new(DevInfoResponse).UnmarshalBinary(append([]byte{0xfd}, junk...))
		require.Error(t, err, "in an answer, %s is an error", name)
	}
	for _, ext := range []Extension{{}, {Revision: 1, Unknown: []Field{{Type: 2}}}, {Revision: 1, Unknown: []Field{{Type: 0xffff}}}, {Revision: 1, Unknown: []Field{{Type: 19, Value: make([]byte, 1<<16)}}}} {
		_, err := (&DevInfoResponse{Extension: ext}).AppendBinary(nil)
		require.ErrorIs(t, err, ErrInvalid)
	}
}

func TestCommandsHaveNames(t *testing.T) {
	require.Equal(t, "WriteAt", CommandWriteAt.String())
	require.Equal(t, "command 0x7f", Command(0x7f).String())
	require.Equal(t, "event 9", EventType(9).String())
	require.Equal(t, "type 9", WriteType(9).String())
	require.True(t, CommandDevInfoResponse.IsResponse())
	require.False(t, CommandReadByHash.IsResponse())
}

// Of a DevInfo with a checksum no changed bit makes another disk, nor a plain
// peer's; nor does a part of it that is missing.
func TestChangedDevInfoIsRefused(t *testing.T) {
	for _, m := range []DevInfo{
		{Size: 1 << 20, BlockSize: 4096, Name: "d", Extension: &Extension{Revision: Revision}},
		{Size: 1 << 20, BlockSize: 4096, Name: "disk", Schema: "size = 1", Extension: &Extension{
			Revision: Revision, Live: true, Identity: Identity{UUID: [16]byte{1}, Generation: 2},
			Unknown: []Field{{Type: 99, Value: []byte{1}}},
		}},
	} {
		clean, err := m.AppendBinary([]byte("in front"))
		require.NoError(t, err)
		clean = clean[len("in front"):]
		var got DevInfo
		require.NoError(t, got.UnmarshalBinary(clean))
		require.Equal(t, m, got)
		for i := range 8 * len(clean) {
			b := bytes.Clone(clean)
			b[i/8] ^= 1 << (i % 8)
			require.Error(t, got.UnmarshalBinary(b), "bit %d", i)
		}
		plain := m
		plain.Extension = nil
		without, err := plain.AppendBinary(nil)
		require.NoError(t, err)
		for n := len(without) + 8; n < len(clean); n++ {
			require.ErrorIs(t, got.UnmarshalBinary(clean[:n]), ErrChecksum, "cut to %d", n)
		}
	}
}

// What a peer of an earlier revision sends needs no checksum.
func TestEarlierRevisionsHaveNoChecksum(t *testing.T) {
	for revision := range uint32(RevisionChecked) {
		in := DevInfo{Size: 1, BlockSize: 1, Extension: &Extension{Revision: revision + 1}}
		b, err := in.AppendBinary(nil)
		require.NoError(t, err)
		require.Len(t, b, 19+8+int(revision+1)/RevisionChecked*checksumField)
		var out DevInfo
		require.NoError(t, out.UnmarshalBinary(b))
		require.Equal(t, in, out)
	}
}

// Each changed bit of a checked packet's front is found before the packet is read.
func TestChangedFrontOfACheckedPacketIsRefused(t *testing.T) {
	clean := AppendChecked(nil, Header{Dev: 7, ID: 9, Length: 2}, []byte{7, 4})
	require.Len(t, clean, HeaderSize+CheckedHead+2)
	open := func(b []byte) (Header, Command, error) {
		var h Header
		require.NoError(t, h.UnmarshalBinary(b[:HeaderSize]))
		h, c, _, err := OpenChecked(h, b[HeaderSize:])
		return h, c, err
	}
	h, c, err := open(clean)
	require.NoError(t, err)
	require.Equal(t, Header{Dev: 7, ID: 9, Length: 2}, h)
	require.Equal(t, CommandEvent, c)
	for i := range 8 * (HeaderSize + CheckedHead + 1) {
		if i/8 == HeaderSize {
			continue // without its command it is no checked packet
		}
		b := bytes.Clone(clean)
		b[i/8] ^= 1 << (i % 8)
		_, _, err := open(b)
		require.ErrorIs(t, err, ErrChecksum, "bit %d", i)
	}
	for bit := range 8 {
		_, named := commandNames[CommandChecked^1<<bit]
		require.False(t, named, "one bit makes it another command")
	}
}
