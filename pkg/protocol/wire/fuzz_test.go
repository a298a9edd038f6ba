package wire

import (
	"bytes"
	"reflect"
	"testing"
)

// fuzzMessage checks that whatever is accepted encodes to the same bytes.
func fuzzMessage[M any, P interface {
	*M
	message
}](f *testing.F) {
	for _, version := range []string{"v0.1.5", "v0.2.21"} {
		for _, packet := range vectors(f, version) {
			f.Add(packet)
		}
	}
	for _, m := range allMessages() {
		if b, err := m.AppendBinary(nil); err == nil {
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		m := P(new(M))
		if m.UnmarshalBinary(in) != nil {
			return // refusing is fine; panicking or hanging is not
		}
		out, err := m.AppendBinary(nil)
		if err != nil {
			t.Fatalf("accepted %x, does not encode: %v", in, err)
		}
		if bytes.Equal(in, out) {
			return
		}
		// Only an extension has more than one way to say a thing: a field of zero is
		// the same as none, and junk behind the schema is nothing.
		again := P(new(M))
		if err := again.UnmarshalBinary(out); err != nil || !extensible(m) || !reflect.DeepEqual(m, again) {
			t.Fatalf("accepted %x, encodes as %x (%v)", in, out, err)
		}
	})
}

func extensible(m message) bool {
	switch m.(type) {
	case *DevInfo, *DevInfoResponse:
		return true
	}
	return false
}

func FuzzReadAt(f *testing.F)           { fuzzMessage[ReadAt](f) }
func FuzzReadAtResponse(f *testing.F)   { fuzzMessage[ReadAtResponse](f) }
func FuzzWriteAt(f *testing.F)          { fuzzMessage[WriteAt](f) }
func FuzzWriteAtResponse(f *testing.F)  { fuzzMessage[WriteAtResponse](f) }
func FuzzNeedAt(f *testing.F)           { fuzzMessage[NeedAt](f) }
func FuzzDontNeedAt(f *testing.F)       { fuzzMessage[DontNeedAt](f) }
func FuzzDirtyList(f *testing.F)        { fuzzMessage[DirtyList](f) }
func FuzzDevInfo(f *testing.F)          { fuzzMessage[DevInfo](f) }
func FuzzDevInfoResponse(f *testing.F)  { fuzzMessage[DevInfoResponse](f) }
func FuzzEvent(f *testing.F)            { fuzzMessage[Event](f) }
func FuzzHashes(f *testing.F)           { fuzzMessage[Hashes](f) }
func FuzzWriteAtWithMap(f *testing.F)   { fuzzMessage[WriteAtWithMap](f) }
func FuzzRemoveDev(f *testing.F)        { fuzzMessage[RemoveDev](f) }
func FuzzRemoveFromMap(f *testing.F)    { fuzzMessage[RemoveFromMap](f) }
func FuzzAlternateSources(f *testing.F) { fuzzMessage[AlternateSources](f) }

func FuzzAlive(f *testing.F)              { fuzzMessage[Alive](f) }
func FuzzWriteAtResponseErr(f *testing.F) { fuzzMessage[WriteAtResponseErr](f) }

func FuzzHeader(f *testing.F) {
	f.Add(make([]byte, HeaderSize))
	f.Fuzz(func(t *testing.T, in []byte) {
		var h Header
		if h.UnmarshalBinary(in) != nil {
			return
		}
		if out := h.Append(nil); !bytes.Equal(in, out) {
			t.Fatalf("accepted %x, encodes as %x", in, out)
		}
	})
}

func FuzzChecked(f *testing.F) {
	f.Add(AppendChecked(nil, Header{Dev: 1, ID: 2, Length: 2}, []byte{7, 4}))
	f.Fuzz(func(t *testing.T, in []byte) {
		var h Header
		if len(in) < HeaderSize+CheckedHead+1 || h.UnmarshalBinary(in[:HeaderSize]) != nil {
			return
		}
		inner, command, sum, err := OpenChecked(h, in[HeaderSize:])
		if err != nil {
			return // refusing is fine
		}
		packet := in[HeaderSize+CheckedHead:]
		if int64(inner.Length) > int64(len(packet)) || Checksum(0, packet[:inner.Length]) != sum {
			return
		}
		packet = packet[:inner.Length]
		out := AppendChecked(nil, inner, packet)
		if command != Command(packet[0]) || !bytes.HasPrefix(in, out) {
			t.Fatalf("accepted %x, encodes as %x", in, out)
		}
	})
}
