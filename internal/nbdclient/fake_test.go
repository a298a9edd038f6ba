package nbdclient

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"io"
	"net"
	"testing"

	"github.com/stretchr/testify/require"
)

// fakeServer is the other end of a client under test: a script of the test
// plays the server byte by byte.
type fakeServer struct {
	t    *testing.T
	conn net.Conn
}

type fakeRequest struct {
	Flags, Type uint16
	Cookie      uint64
	Off         uint64
	Length      uint32
	Payload     []byte
}

// The answers of nbdkit 1.32 (memory plugin, 1 MiB) to what this client sends,
// as recorded from its socket.
const (
	recordedGreeting = "4e42444d41474943" + "49484156454f5054" + "0003"
	recordedExport   = "0003e889045565a9" + "00000007" + "00000003" + "0000000c" + "0000" + "0000000000100000" + "0ded"
	recordedBlocks   = "0003e889045565a9" + "00000007" + "00000003" + "0000000e" + "0003" + "00000001" + "00001000" + "ffffffff"
	recordedAck      = "0003e889045565a9" + "00000007" + "00000001" + "00000000"
)

func (s *fakeServer) send(h ...string) {
	for _, one := range h {
		b, err := hex.DecodeString(one)
		require.NoError(s.t, err)
		if _, err := s.conn.Write(b); err != nil {
			return // the client has gone, which its own result shows
		}
	}
}

// options reads the client's flags and its first option.
func (s *fakeServer) option() []byte {
	b := make([]byte, 4+16)
	if _, err := io.ReadFull(s.conn, b); err != nil {
		return nil
	}
	data := make([]byte, binary.BigEndian.Uint32(b[16:]))
	if _, err := io.ReadFull(s.conn, data); err != nil {
		return nil
	}
	return append(b, data...)
}

func (s *fakeServer) handshake() []byte {
	s.send(recordedGreeting)
	b := s.option()
	s.send(recordedExport, recordedBlocks, recordedAck)
	return b
}

func (s *fakeServer) request() (fakeRequest, bool) {
	b := make([]byte, 28)
	if _, err := io.ReadFull(s.conn, b); err != nil {
		return fakeRequest{}, false
	}
	r := fakeRequest{
		Flags: binary.BigEndian.Uint16(b[4:]), Type: binary.BigEndian.Uint16(b[6:]),
		Cookie: binary.BigEndian.Uint64(b[8:]), Off: binary.BigEndian.Uint64(b[16:]), Length: binary.BigEndian.Uint32(b[24:]),
	}
	if !bytes.Equal(b[:4], []byte{0x25, 0x60, 0x95, 0x13}) {
		s.t.Errorf("request starts with %x", b[:4])
	}
	if r.Type == cmdWrite {
		r.Payload = make([]byte, r.Length)
		if _, err := io.ReadFull(s.conn, r.Payload); err != nil {
			return fakeRequest{}, false
		}
	}
	return r, true
}

func (s *fakeServer) reply(cookie uint64, errno uint32, data []byte) {
	b := binary.BigEndian.AppendUint32(nil, replyMagic)
	b = binary.BigEndian.AppendUint32(b, errno)
	b = binary.BigEndian.AppendUint64(b, cookie)
	if _, err := s.conn.Write(append(b, data...)); err != nil {
		return // the client has gone, which its own result shows
	}
}

// against connects a client with a server that plays the script.
func against(t *testing.T, script func(*fakeServer)) (*Client, error) {
	t.Helper()
	ours, theirs := net.Pipe()
	played := make(chan struct{})
	go func() {
		defer close(played)
		defer theirs.Close()
		script(&fakeServer{t, theirs})
	}()
	c, err := New(t.Context(), ours, "a")
	t.Cleanup(func() {
		if c != nil {
			c.Close()
		}
		<-played
	})
	return c, err
}
