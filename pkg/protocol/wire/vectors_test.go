package wire

import (
	"bytes"
	"crypto/sha256"
	"encoding"
	"encoding/hex"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// message is what every packet struct can do.
type message interface {
	AppendBinary(b []byte) ([]byte, error)
	encoding.BinaryUnmarshaler
}

// vector is a real packet of Silo.
type vector struct{ Name, Note, Hex string }

// vectors reads the packets of a version of Silo by name.
func vectors(t testing.TB, version string) map[string][]byte {
	t.Helper()
	b, err := os.ReadFile("testdata/silo-" + version + ".json")
	require.NoError(t, err)
	var list []vector
	require.NoError(t, json.Unmarshal(b, &list))
	packets := make(map[string][]byte, len(list))
	for _, v := range list {
		packet, err := hex.DecodeString(v.Hex)
		require.NoError(t, err, v.Name)
		packets[v.Name] = packet
	}
	require.NotEmpty(t, packets)
	return packets
}

var abc = sha256.Sum256([]byte("abc"))

// meanings says what each vector carries, for those that both versions share.
var meanings = map[string]message{
	"ReadAt":               &ReadAt{Off: 0x1122334455667788, Length: 0x0a0b0c0d},
	"ReadAt.neg":           &ReadAt{Off: -2, Length: -1},
	"ReadAtResponse":       &ReadAtResponse{Bytes: 5, Data: []byte{1, 2, 3, 4, 5}},
	"ReadAtResponse.short": &ReadAtResponse{Bytes: 2, Data: []byte{1, 2, 0, 0, 0}},
	"WriteAt.data":         &WriteAt{Off: 0x1122334455667788, Data: []byte{0xaa, 0xbb, 0xcc}},
	"WriteAt.data.empty":   &WriteAt{Off: 4096, Data: []byte{}},
	"WriteAtResponse":      &WriteAtResponse{Bytes: 0x10000},
	"NeedAt":               &NeedAt{Off: 65536, Length: 4096},
	"DontNeedAt":           &DontNeedAt{Off: 131072, Length: 8192},
	"DirtyList":            &DirtyList{BlockSize: 4096, Blocks: []uint32{1, 7, 100}},
	"DirtyList.empty":      &DirtyList{BlockSize: 4096, Blocks: []uint32{}},
	"DirtyList.truncated":  &DirtyList{BlockSize: 4096, Blocks: []uint32{5}},
	"DevInfo":              &DevInfo{Size: 0x12345678, BlockSize: 65536, Name: "disk0", Schema: "s=1"},
	"DevInfo.min":          &DevInfo{Size: 1024, BlockSize: 1024},
	"Event.PreLock":        &Event{Type: EventPreLock},
	"Event.PostLock":       &Event{Type: EventPostLock},
	"Event.PreUnlock":      &Event{Type: EventPreUnlock},
	"Event.PostUnlock":     &Event{Type: EventPostUnlock},
	"Event.Completed":      &Event{Type: EventCompleted},
	"Event.Custom":         &Event{Type: EventCustom, CustomType: 9, Payload: []byte{1, 2, 3}},
	"Event.Custom.empty":   &Event{Type: EventCustom, Payload: []byte{}},
	"Hashes":               &Hashes{Hashes: []Hash{{Block: 3, Sum: abc}}},
	"Hashes.empty":         &Hashes{Hashes: []Hash{}},
	"WriteAtWithMap":       &WriteAtWithMap{Off: 4096, Map: []MapEntry{{7, 9}}, Data: []byte{0xdd, 0xee}},
	"RemoveDev":            &RemoveDev{},
	"RemoveFromMap":        &RemoveFromMap{IDs: []uint64{1, 0x0102030405060708}},
	"AlternateSources": &AlternateSources{Sources: []AlternateSource{
		{Off: 4096, Length: 65536, Sum: abc, Location: []byte("s3 b d")}}},
	"AlternateSources.empty": &AlternateSources{Sources: []AlternateSource{}},
}

// bare lists the vectors that are a command byte and nothing else.
var bare = map[string]Command{
	"ReadAtResponseErr":  CommandReadAtResponseErr,
	"WriteAtResponseErr": CommandWriteAtResponseErr,
	"DirtyListResponse":  CommandDirtyListResponse,
	"EventResponse":      CommandEventResponse,
	"HashesResponse":     CommandHashesResponse,
}

// like returns an empty message of the type of m.
func like(m message) message {
	switch m.(type) {
	case *ReadAt:
		return new(ReadAt)
	case *ReadAtResponse:
		return new(ReadAtResponse)
	case *WriteAt:
		return new(WriteAt)
	case *WriteAtResponse:
		return new(WriteAtResponse)
	case *WriteAtResponseErr:
		return new(WriteAtResponseErr)
	case *Alive:
		return new(Alive)
	case *NeedAt:
		return new(NeedAt)
	case *DontNeedAt:
		return new(DontNeedAt)
	case *DirtyList:
		return new(DirtyList)
	case *DevInfo:
		return new(DevInfo)
	case *DevInfoResponse:
		return new(DevInfoResponse)
	case *Event:
		return new(Event)
	case *Hashes:
		return new(Hashes)
	case *WriteAtWithMap:
		return new(WriteAtWithMap)
	case *RemoveDev:
		return new(RemoveDev)
	case *RemoveFromMap:
		return new(RemoveFromMap)
	case *AlternateSources:
		return new(AlternateSources)
	}
	panic("no such message")
}

func TestVectorsDecodeAndEncodeToTheSameBytes(t *testing.T) {
	for _, version := range []string{"v0.1.5", "v0.2.21"} {
		for name, packet := range vectors(t, version) {
			t.Run(version+"/"+name, func(t *testing.T) {
				if command, ok := bare[name]; ok {
					require.NoError(t, DecodeBare(packet, command))
					return
				}
				want, ok := meanings[name]
				if !ok {
					require.True(t, coveredElsewhere(name), "no test knows this vector")
					return
				}
				got := like(want)
				require.NoError(t, got.UnmarshalBinary(packet))
				require.Equal(t, want, got)
				out, err := want.AppendBinary(nil)
				require.NoError(t, err)
				require.Equal(t, packet, out)
			})
		}
	}
}

// coveredElsewhere names the vectors of the other tests.
func coveredElsewhere(name string) bool {
	for _, prefix := range []string{"WriteAt.rle.", "WriteAt.hash", "WriteAt.gzip.", "WriteAt.zeroes.",
		"WriteAt.youalreadyhave", "DeviceGroupInfo", "frame.", "conversation."} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

func TestHashVectorsOfBothVersions(t *testing.T) {
	for _, v := range []struct {
		version, name string
		location      byte
	}{{"v0.1.5", "WriteAt.hash", 0}, {"v0.2.21", "WriteAt.hash", 1}, {"v0.2.21", "WriteAt.hash.base", 2}} {
		packet := vectors(t, v.version)[v.name]
		var m WriteAt
		require.NoError(t, m.UnmarshalBinary(packet))
		require.Equal(t, WriteAt{Type: WriteHash, Off: 4096, Length: 65536, Sum: abc, Location: v.location}, m)
		out, err := m.AppendBinary(nil)
		require.NoError(t, err)
		require.Equal(t, packet, out)
	}
}

// What later versions have and we do not is refused as such, so that the peer
// can be told no, and is not taken for a broken packet.
func TestLaterKindsAreRefusedCleanly(t *testing.T) {
	n := 0
	for name, packet := range vectors(t, "v0.2.21") {
		if strings.HasPrefix(name, "WriteAt.gzip") || strings.HasPrefix(name, "WriteAt.zeroes") ||
			strings.HasPrefix(name, "WriteAt.youalreadyhave") {
			n++
			require.ErrorIs(t, new(WriteAt).UnmarshalBinary(packet), ErrUnsupported, name)
		}
	}
	require.Greater(t, n, 20)
	require.ErrorIs(t, new(WriteAt).UnmarshalBinary([]byte{2, 6, 0, 0, 0, 0, 0, 0, 0, 0}), ErrInvalid)
}

func TestFrameVectors(t *testing.T) {
	packets := vectors(t, "v0.1.5")
	for name, want := range map[string]Header{
		"frame.auto":     {Dev: 0x01020304, ID: 1, Length: 2},
		"frame.auto2":    {Dev: 7, ID: 2, Length: 1},
		"frame.explicit": {Dev: 7, ID: 0xaabbccdd, Length: 1},
		"frame.empty":    {Dev: 7, ID: 3, Length: 0},
	} {
		frame := packets[name]
		var h Header
		require.NoError(t, h.UnmarshalBinary(frame[:HeaderSize]), name)
		require.Equal(t, want, h, name)
		require.Len(t, frame[HeaderSize:], int(h.Length), name)
		require.Equal(t, frame[:HeaderSize], h.Append(nil), name)
	}
	require.ErrorIs(t, new(Header).UnmarshalBinary(make([]byte, 11)), ErrShort)
	require.ErrorIs(t, new(Header).UnmarshalBinary(make([]byte, 13)), ErrTrailing)
}

// Every packet of the recorded conversations decodes.
func TestConversationVectorsDecode(t *testing.T) {
	for _, version := range []string{"v0.1.5", "v0.2.21"} {
		packets := vectors(t, version)
		n := 0
		for _, name := range []string{"conversation.src_to_dst", "conversation.dst_to_src"} {
			b := packets[name]
			for len(b) > 0 {
				var h Header
				require.NoError(t, h.UnmarshalBinary(b[:HeaderSize]))
				packet := b[HeaderSize : HeaderSize+h.Length]
				b = b[HeaderSize+h.Length:]
				m, ok := messageOf(Command(packet[0]))
				if !ok {
					require.NoError(t, DecodeBare(packet, Command(packet[0])))
				} else {
					require.NoError(t, m.UnmarshalBinary(packet))
				}
				n++
			}
		}
		require.Equal(t, 23, n)
	}
}

// messageOf returns an empty message of a command, if it is more than bare.
func messageOf(c Command) (message, bool) {
	for _, m := range allMessages() {
		b, err := m.AppendBinary(nil)
		if err == nil && Command(b[0]) == c {
			return like(m), true
		}
	}
	return nil, false
}

// allMessages is one of each kind, filled in.
func allMessages() []message {
	var list []message
	for _, name := range []string{"ReadAt", "ReadAtResponse", "WriteAt.data", "WriteAtResponse", "NeedAt",
		"DontNeedAt", "DirtyList", "DevInfo", "Event.Custom", "Event.PreLock", "Hashes", "WriteAtWithMap",
		"RemoveDev", "RemoveFromMap", "AlternateSources"} {
		list = append(list, meanings[name])
	}
	return append(list,
		&WriteAt{Type: WriteRunLength, Off: 8192, Data: AppendRLE(nil, []byte("aaaaaaaaab"))},
		&WriteAt{Type: WriteHash, Off: 8192, Length: 9, Sum: abc},
		&Alive{}, &WriteAtResponseErr{Reason: ReasonNoRoom},
		&DevInfoResponse{Extension: Extension{Revision: 1, MaxData: 1 << 20}},
		&DevInfoResponse{Extension: Extension{
			Revision: Revision, Live: true, Device: [16]byte{1}, Epoch: Epoch{Now: 3, Before: 2, Steps: 1}, Compare: true}})
}

// Every truncation of every packet is refused as short, unless what is left is
// itself a packet, which then encodes to those bytes.
func TestEveryTruncationIsRefused(t *testing.T) {
	for _, m := range allMessages() {
		full, err := m.AppendBinary(nil)
		require.NoError(t, err)
		for n := range full {
			got := like(m)
			err := got.UnmarshalBinary(full[:n:n])
			if err == nil { // the packet ends in data of any length
				out, encErr := got.AppendBinary(nil)
				require.NoError(t, encErr)
				require.Equal(t, full[:n], out, "%T cut to %d", m, n)
				continue
			}
			require.True(t, errorsIsAny(err, ErrShort, ErrInvalid), "%T cut to %d: %v", m, n, err)
			if n > 0 {
				require.Contains(t, err.Error(), Command(full[0]).String(), "the error names the command")
			}
		}
	}
}

func TestTrailingBytesAreRefused(t *testing.T) {
	for _, name := range []string{"ReadAt", "WriteAtResponse", "NeedAt", "DontNeedAt", "DirtyList",
		"Event.PreLock", "RemoveDev", "RemoveFromMap", "AlternateSources"} {
		packet := append(bytes.Clone(vectors(t, "v0.1.5")[name]), 0)
		require.ErrorIs(t, like(meanings[name]).UnmarshalBinary(packet), ErrTrailing, name)
	}
	require.ErrorIs(t, DecodeBare([]byte{0x84, 0}, CommandWriteAtResponseErr), ErrTrailing)
	require.ErrorIs(t, new(Hashes).UnmarshalBinary(make34()), ErrShort)
}

func make34() []byte {
	b := make([]byte, 34)
	b[0] = byte(CommandHashes)
	return b
}

func TestWrongCommandIsRefused(t *testing.T) {
	for _, m := range allMessages() {
		b, err := m.AppendBinary(nil)
		require.NoError(t, err)
		b[0] ^= 0x40
		require.ErrorIs(t, like(m).UnmarshalBinary(b), ErrCommand, "%T", m)
	}
}
