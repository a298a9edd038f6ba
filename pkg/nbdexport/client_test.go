package nbdexport

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// rawClient speaks to a server byte by byte, so that a test can also say what
// no client would.
type rawClient struct {
	t testing.TB
	net.Conn
	mode   replyMode
	size   uint64
	flags  uint16
	cookie uint64
}

// newTestServer serves exports on a unix socket for the time of the test.
func newTestServer(t testing.TB, o Options, exports ...Export) (*Server, string) {
	t.Helper()
	s := NewServer(o)
	for _, e := range exports {
		require.NoError(t, s.AddExport(e))
	}
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	require.NoError(t, err)
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	t.Cleanup(func() {
		require.NoError(t, s.Close())
		require.ErrorIs(t, <-served, ErrServerClosed)
	})
	return s, path
}

// dialRaw connects and does nothing else.
func dialRaw(t testing.TB, path string) *rawClient {
	t.Helper()
	nc, err := net.Dial("unix", path)
	require.NoError(t, err)
	return newRawClient(t, nc)
}

func newRawClient(t testing.TB, nc net.Conn) *rawClient {
	t.Cleanup(func() { nc.Close() })
	return newLooseClient(t, nc)
}

// newLooseClient is a client that the test closes: t remembers nothing of it.
func newLooseClient(t testing.TB, nc net.Conn) *rawClient {
	t.Helper()
	require.NoError(t, nc.SetDeadline(time.Now().Add(20*time.Second)))
	return &rawClient{t: t, Conn: nc}
}

// pipeClient is a client over an in-memory pipe, for tests with a fake clock.
func pipeClient(t testing.TB, s *Server) *rawClient {
	server, client := net.Pipe()
	s.accept(context.Background(), server)
	t.Cleanup(func() { client.Close() })
	return &rawClient{t: t, Conn: client}
}

// pass lets time pass inside a synctest bubble: by its clock, at once.
func pass(d time.Duration) { <-time.After(d) }

func (c *rawClient) send(parts ...any) {
	c.t.Helper()
	_, err := c.Write(pack(parts...))
	require.NoError(c.t, err)
}

// pack makes bytes of numbers, strings and bytes.
func pack(parts ...any) []byte {
	var b []byte
	for _, p := range parts {
		switch p := p.(type) {
		case string:
			b = append(b, p...)
		case []byte:
			b = append(b, p...)
		case errno:
			b = binary.BigEndian.AppendUint32(b, uint32(p))
		default:
			var err error
			if b, err = binary.Append(b, binary.BigEndian, p); err != nil {
				panic(fmt.Sprintf("%T: %v", p, err))
			}
		}
	}
	return b
}

func (c *rawClient) recv(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	_, err := io.ReadFull(c, b)
	require.NoError(c.t, err)
	return b
}

func (c *rawClient) u16() uint16 { c.t.Helper(); return binary.BigEndian.Uint16(c.recv(2)) }
func (c *rawClient) u32() uint32 { c.t.Helper(); return binary.BigEndian.Uint32(c.recv(4)) }
func (c *rawClient) u64() uint64 { c.t.Helper(); return binary.BigEndian.Uint64(c.recv(8)) }

// wantEnd wants the server to end the connection without another byte.
func (c *rawClient) wantEnd() {
	c.t.Helper()
	n, err := c.Read(make([]byte, 1))
	require.Zero(c.t, n, "the server sent something where it should have ended the connection")
	require.Error(c.t, err)
	require.NotErrorIs(c.t, err, os.ErrDeadlineExceeded, "the server did not end the connection")
}

// greet goes through the greeting.
func (c *rawClient) greet(clientFlags uint32) {
	c.t.Helper()
	require.Equal(c.t, magicInit, c.u64())
	require.Equal(c.t, magicOption, c.u64())
	require.Equal(c.t, flagFixedNewstyle|flagNoZeroes, c.u16())
	c.send(clientFlags)
}

// optionReply is one reply to an option.
type optionReply struct {
	typ  uint32
	data []byte
}

// option sends an option and returns its replies, the final one last.
func (c *rawClient) option(opt uint32, data []byte) []optionReply {
	c.t.Helper()
	c.send(magicOption, opt, uint32(len(data)), data)
	return c.replies(opt)
}

func (c *rawClient) replies(opt uint32) []optionReply {
	c.t.Helper()
	var all []optionReply
	for {
		require.Equal(c.t, magicOptionReply, c.u64())
		require.Equal(c.t, opt, c.u32())
		r := optionReply{typ: c.u32()}
		r.data = c.recv(int(c.u32()))
		all = append(all, r)
		if r.typ == repAck || r.typ&(1<<31) != 0 {
			return all
		}
	}
}

// outcome is the type of the final reply to an option.
func (c *rawClient) outcome(opt uint32, data []byte) uint32 {
	c.t.Helper()
	rs := c.option(opt, data)
	return rs[len(rs)-1].typ
}

func infoData(name string, wanted ...uint16) []byte {
	return pack(uint32(len(name)), name, uint16(len(wanted)), wanted)
}

func metaData(name string, queries ...string) []byte {
	b := pack(uint32(len(name)), name, uint32(len(queries)))
	for _, q := range queries {
		b = append(b, pack(uint32(len(q)), q)...)
	}
	return b
}

// enter goes through the whole handshake and into the transmission phase.
func (c *rawClient) enter(name string, mode replyMode, contexts ...string) *rawClient {
	c.t.Helper()
	c.greet(clientFixedNewstyle | clientNoZeroes)
	c.mode = mode
	switch mode {
	case modeStructured:
		require.Equal(c.t, repAck, c.outcome(optStructuredReply, nil))
	case modeExtended:
		require.Equal(c.t, repAck, c.outcome(optExtendedHeaders, nil))
	}
	if contexts != nil {
		require.Equal(c.t, repAck, c.outcome(optSetMetaContext, metaData(name, contexts...)))
	}
	rs := c.option(optGo, infoData(name))
	require.Len(c.t, rs, 2)
	require.Equal(c.t, repAck, rs[1].typ)
	c.size = binary.BigEndian.Uint64(rs[0].data[2:])
	c.flags = binary.BigEndian.Uint16(rs[0].data[10:])
	return c
}

// request sends a request and returns its cookie.
func (c *rawClient) request(typ, flags uint16, off, length uint64, payload ...[]byte) uint64 {
	c.t.Helper()
	c.cookie++
	b := packRequest(c.mode, typ, flags, c.cookie, off, length)
	for _, p := range payload {
		b = append(b, p...)
	}
	c.send(b)
	return c.cookie
}

func packRequest(mode replyMode, typ, flags uint16, cookie, off, length uint64) []byte {
	if mode == modeExtended {
		return pack(magicExtendedRequest, flags, typ, cookie, off, length)
	}
	return pack(magicRequest, flags, typ, cookie, off, uint32(length))
}

// chunk is a reply of any form.
type chunk struct {
	cookie uint64
	flags  uint16 // of a structured reply; a simple reply counts as done
	typ    uint16
	err    errno
	data   []byte // of a structured chunk, or of a simple reply to a READ
}

// chunk reads one reply; n is the length of the data of a simple one.
func (c *rawClient) chunk(n int) chunk {
	c.t.Helper()
	var r chunk
	switch magic := c.u32(); magic {
	case magicSimpleReply:
		r.err = errno(c.u32())
		r.cookie, r.flags = c.u64(), replyFlagDone
		if r.err == ok {
			r.data = c.recv(n)
		}
		require.NotEqual(c.t, modeExtended, c.mode, "simple reply where extended headers were negotiated")
		return r
	case magicStructuredReply, magicExtendedReply:
		r.flags, r.typ, r.cookie = c.u16(), c.u16(), c.u64()
		var length uint64
		if c.mode == modeExtended {
			require.Equal(c.t, magicExtendedReply, magic)
			c.u64()
			length = c.u64()
		} else {
			require.Equal(c.t, modeStructured, c.mode)
			require.Equal(c.t, magicStructuredReply, magic)
			length = uint64(c.u32())
		}
		r.data = c.recv(int(length))
		if r.typ&(1<<15) != 0 {
			r.err = errno(binary.BigEndian.Uint32(r.data))
			require.NotEqual(c.t, ok, r.err)
		}
	default:
		require.Failf(c.t, "stream out of step", "reply magic %#x", magic)
	}
	return r
}

// status waits for the reply to a request without data.
func (c *rawClient) status(cookie uint64) errno {
	c.t.Helper()
	r := c.chunk(0)
	require.Equal(c.t, cookie, r.cookie)
	require.Equal(c.t, replyFlagDone, r.flags)
	return r.err
}

// do sends a request without reply data and waits for its reply.
func (c *rawClient) do(typ, flags uint16, off, length uint64, payload ...[]byte) errno {
	c.t.Helper()
	return c.status(c.request(typ, flags, off, length, payload...))
}

// write writes p with success wanted.
func (c *rawClient) write(off uint64, p []byte) {
	c.t.Helper()
	require.Equal(c.t, ok, c.do(cmdWrite, 0, off, uint64(len(p)), p))
}

// read reads and puts the chunks together.
func (c *rawClient) read(flags uint16, off, length uint64) ([]byte, errno) {
	c.t.Helper()
	return c.readReply(c.request(cmdRead, flags, off, length), off, length)
}

func (c *rawClient) readReply(cookie, off, length uint64) ([]byte, errno) {
	c.t.Helper()
	p, covered := make([]byte, min(length, 2*maxPayload)), uint64(0) // longer ones are refused
	for {
		r := c.chunk(int(length))
		require.Equal(c.t, cookie, r.cookie)
		if r.err != ok {
			return nil, r.err
		}
		switch {
		case c.mode == modeSimple:
			return r.data, ok
		case r.typ == replyOffsetData:
			at := binary.BigEndian.Uint64(r.data) - off
			covered += uint64(copy(p[at:], r.data[8:]))
		case r.typ == replyOffsetHole:
			covered += uint64(binary.BigEndian.Uint32(r.data[8:]))
		default:
			require.Equal(c.t, replyNone, r.typ)
		}
		if r.flags&replyFlagDone != 0 {
			require.Equal(c.t, length, covered, "a read has to be covered whole")
			return p, ok
		}
	}
}
