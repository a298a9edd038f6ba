package protocol

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"io"
	"net"
	"os"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// packet is what is on the wire, as the raw peer sees it.
type packet struct {
	dev, id uint32
	body    []byte
}

// rawPeer follows WIRE.md and nothing else: it writes and reads bytes by hand,
// and shares no code with what it tests.
type rawPeer struct {
	t    testing.TB
	conn net.Conn
	got  chan packet // closed when the connection ends
}

func newRawPeer(t testing.TB, conn net.Conn) *rawPeer {
	r := &rawPeer{t: t, conn: conn, got: make(chan packet, 4096)}
	go r.readLoop() // ends with the connection
	return r
}

func (r *rawPeer) readLoop() {
	defer close(r.got)
	var head [12]byte
	for {
		if _, err := io.ReadFull(r.conn, head[:]); err != nil {
			return
		}
		p := packet{
			dev:  binary.LittleEndian.Uint32(head[0:]),
			id:   binary.LittleEndian.Uint32(head[4:]),
			body: make([]byte, binary.LittleEndian.Uint32(head[8:])),
		}
		if _, err := io.ReadFull(r.conn, p.body); err != nil {
			return
		}
		r.got <- p
	}
}

// frame writes down a packet.
func frame(dev, id uint32, body []byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, dev)
	b = binary.LittleEndian.AppendUint32(b, id)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(body)))
	return append(b, body...)
}

// send writes a packet; the other side may have gone.
func (r *rawPeer) send(dev, id uint32, body []byte) error {
	_, err := r.conn.Write(frame(dev, id, body))
	return err
}

// mustSend writes a packet to a peer that is there.
func (r *rawPeer) mustSend(dev, id uint32, body []byte) {
	r.t.Helper()
	require.NoError(r.t, r.send(dev, id, body))
}

// next returns the next packet.
func (r *rawPeer) next() packet {
	r.t.Helper()
	p, ok := <-r.got
	require.True(r.t, ok, "the connection ended")
	return p
}

// expect wants the next packet to be this one.
func (r *rawPeer) expect(dev, id uint32, body []byte) {
	r.t.Helper()
	p := r.next()
	require.Equal(r.t, packet{dev, id, body}, p, "got %x", p.body)
}

func le32(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }
func le64(v int64) []byte  { return binary.LittleEndian.AppendUint64(nil, uint64(v)) }

func cat(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func devInfo(size int64, block uint32) []byte {
	return cat([]byte{6}, le64(size), le32(block), []byte{1, 0, 'd'}, le32(0))
}
func writeAt(off int64, data []byte) []byte { return cat([]byte{2, 0}, le64(off), data) }
func written(n int) []byte                  { return cat([]byte{0x83}, le32(uint32(n))) }
func ranged(cmd byte, off int64, n int32) []byte {
	return cat([]byte{cmd}, le64(off), le32(uint32(n)))
}

// fill returns n bytes of v.
func fill(n int, v byte) []byte { return bytes.Repeat([]byte{v}, n) }

// handle runs Handle, and Close at the end of the test.
func handle(t testing.TB, p *ProtocolRW) chan error {
	t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- p.Handle() }()
	t.Cleanup(func() { _ = p.Close() })
	return ended
}

// destination is a receiving connection, with a raw source on the other end.
func destination(t testing.TB, store storage.StorageProvider, opts ...Options) (*rawPeer, *ProtocolRW, chan error) {
	t.Helper()
	a, b := net.Pipe()
	factory := func(*DevInfo) storage.StorageProvider { return store }
	p := NewProtocolRW(t.Context(), b, b, func(p Protocol, dev uint32) {
		if store != nil {
			NewFromProtocol(dev, factory, p)
		}
	}, opts...)
	ended := handle(t, p)
	t.Cleanup(func() { _ = a.Close() })
	return newRawPeer(t, a), p, ended
}

// source is a sending connection, with a raw destination on the other end.
func source(t testing.TB, opts ...Options) (*rawPeer, *ProtocolRW, chan error) {
	t.Helper()
	a, b := net.Pipe()
	p := NewProtocolRW(t.Context(), b, b, nil, opts...)
	ended := handle(t, p)
	t.Cleanup(func() { _ = a.Close() })
	return newRawPeer(t, a), p, ended
}

// pair is two connections that speak to each other.
func pair(t testing.TB, newDevice func(p Protocol, dev uint32), opts ...Options) (src, dst *ProtocolRW) {
	t.Helper()
	a, b := net.Pipe()
	src = NewProtocolRW(t.Context(), a, a, nil, opts...)
	dst = NewProtocolRW(t.Context(), b, b, newDevice, opts...)
	handle(t, src)
	handle(t, dst)
	return src, dst
}

// gate is a store whose writes stop until it is opened.
type gate struct {
	*sources.MemoryStorage
	open chan struct{}
	once sync.Once
}

func newGate(size int) *gate {
	return &gate{MemoryStorage: sources.NewMemoryStorage(size), open: make(chan struct{})}
}

func (g *gate) WriteAt(p []byte, off int64) (int, error) {
	<-g.open
	return g.MemoryStorage.WriteAt(p, off)
}

func (g *gate) release() { g.once.Do(func() { close(g.open) }) }

// plain hides all that a store can do beyond the interface.
type plain struct{ storage.StorageProvider }

// completion waits for one answer.
type completion chan error

func newCompletion() completion         { return make(completion, 1) }
func (c completion) Complete(err error) { c <- err }

// content reads a whole store.
func content(t testing.TB, s storage.StorageProvider) []byte {
	t.Helper()
	b := make([]byte, s.Size())
	_, err := s.ReadAt(b, 0)
	if err != io.EOF {
		require.NoError(t, err)
	}
	return b
}

// vectors reads the real packets of a version of Silo.
func vectors(t testing.TB, version string) map[string][]byte {
	t.Helper()
	b, err := os.ReadFile("wire/testdata/silo-" + version + ".json")
	require.NoError(t, err)
	var list []struct{ Name, Hex string }
	require.NoError(t, json.Unmarshal(b, &list))
	m := make(map[string][]byte)
	for _, v := range list {
		m[v.Name], err = hex.DecodeString(v.Hex)
		require.NoError(t, err)
	}
	return m
}

// frames takes a stream apart.
func frames(t testing.TB, b []byte) []packet {
	t.Helper()
	var list []packet
	for len(b) > 0 {
		n := binary.LittleEndian.Uint32(b[8:])
		list = append(list, packet{binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:]), b[12 : 12+n]})
		b = b[12+n:]
	}
	return list
}

// keep is a factory of one store.
func keep(s storage.StorageProvider) func(*DevInfo) storage.StorageProvider {
	return func(*DevInfo) storage.StorageProvider { return s }
}
