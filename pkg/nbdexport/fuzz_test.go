package nbdexport

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// fuzzServer serves one side of a pipe and returns the other.
func fuzzServer(t *testing.T, d *disk) *rawClient {
	s := NewServer(Options{})
	require.NoError(t, s.AddExport(Export{Name: "disk", Backend: d}))
	server, client := net.Pipe()
	s.accept(context.Background(), server)
	t.Cleanup(func() {
		client.Close()
		require.NoError(t, s.Close())
		require.Zero(t, s.budget.used.Load(), "memory charged is not given back")
	})
	require.NoError(t, client.SetDeadline(time.Now().Add(10*time.Second)))
	return &rawClient{t: t, Conn: client}
}

// Whatever an option says, it is answered by one final reply of a known type,
// and the next option is understood.
func FuzzOptions(f *testing.F) {
	for _, data := range [][]byte{nil, infoData("disk", 1, 2, 3), infoData(""), metaData("disk", "base:", "silo:state"), metaData("x")} {
		for opt := range uint32(13) {
			f.Add(opt, data, uint8(opt))
		}
	}
	f.Fuzz(func(t *testing.T, opt uint32, data []byte, before uint8) {
		if opt == optExportName || len(data) > 100_000 {
			return
		}
		c := fuzzServer(t, newDisk(mib))
		c.greet(clientFixedNewstyle)
		if before&1 != 0 {
			c.outcome(optStructuredReply, nil)
		}
		if before&2 != 0 {
			c.outcome(optExtendedHeaders, nil)
		}
		rs := c.option(opt, data)
		last := rs[len(rs)-1]
		switch last.typ {
		case repAck:
			if opt == optGo {
				require.Equal(t, errInval, c.fuzzMode(before).do(1000, 0, 0, 0), "the transmission phase is not in step")
				return
			}
			if opt == optAbort {
				c.wantEnd()
				return
			}
			require.Contains(t, []uint32{
				optList, optInfo, optStructuredReply, optExtendedHeaders, optListMetaContext, optSetMetaContext,
			}, opt)
		case repErrUnsup:
			require.True(t, opt == 0 || opt == 4 || opt > optExtendedHeaders)
		case repErrInvalid, repErrUnknown, repErrTooBig, repErrPolicy, repErrExtHeaderReqd:
		default:
			t.Fatalf("option %d: reply %#x", opt, last.typ)
		}
		require.Equal(t, repErrUnsup, c.outcome(1<<20, data), "the next option was not understood")
	})
}

func (c *rawClient) fuzzMode(before uint8) *rawClient {
	switch {
	case before&2 != 0:
		c.mode = modeExtended
	case before&1 != 0:
		c.mode = modeStructured
	}
	return c
}

// Whatever a request says, it gets the error number that it deserves and the
// next one is understood.
func FuzzRequest(f *testing.F) {
	for typ := range uint16(9) {
		for mode := range uint8(3) {
			f.Add(mode, typ, uint16(0), uint64(0), uint64(512))
			f.Add(mode, typ, uint16(1), uint64(mib-1), uint64(2))
			f.Add(mode, typ, uint16(1<<typ), uint64(1<<63), uint64(1<<63))
			f.Add(mode, typ, cmdFlagPayloadLen, uint64(0), uint64(12))
		}
	}
	const size = mib
	f.Fuzz(func(t *testing.T, m uint8, typ, flags uint16, off, length uint64) {
		mode := replyMode(m % 3)
		if mode != modeExtended {
			length = uint64(uint32(length))
		}
		payload := typ == cmdWrite || mode == modeExtended && flags&cmdFlagPayloadLen != 0
		if typ == cmdDisc || payload && length > 4*size {
			return
		}
		d := newDisk(size)
		for i := range d.b {
			d.b[i] = byte(i>>9) | 1
		}
		before := bytes.Clone(d.b)
		c := fuzzServer(t, d)
		if mode == modeSimple {
			c.enter("disk", mode)
		} else {
			c.enter("disk", mode, contextAllocation)
		}
		c.cookie = off ^ length
		head, body := packRequest(mode, typ, flags, c.cookie, off, length), []byte(nil)
		if payload {
			body = bytes.Repeat([]byte{0xee}, int(length))
		}
		sent := make(chan error, 1)
		go func() { // the server may answer before it has taken all
			_, err := c.Write(append(head, body...))
			sent <- err
		}()
		want := wantErrno(mode, typ, flags, off, length, size, body)
		if typ == cmdRead {
			got, e := c.readReply(c.cookie, off, length)
			require.Equal(t, want, e)
			if e == ok {
				require.True(t, bytes.Equal(before[off:off+length], got))
			}
		} else {
			r := c.chunk(0)
			require.Equal(t, want, r.err)
			require.Equal(t, c.cookie, r.cookie)
		}
		require.NoError(t, <-sent)
		if want != ok || typ != cmdWrite && typ != cmdWriteZeroes {
			d.memory.mu.RLock()
			require.True(t, bytes.Equal(before, d.b), "the disk has changed")
			d.memory.mu.RUnlock()
		}
		got, e := c.read(0, size/2, 512)
		require.Equal(t, ok, e, "the next request was not understood")
		require.Len(t, got, 512)
	})
}

// wantErrno is what the specification has for a request, said another way than
// the server does.
func wantErrno(mode replyMode, typ, flags uint16, off, length, size uint64, body []byte) errno {
	flags &^= cmdFlagFUA
	if mode == modeExtended && typ == cmdWrite {
		flags &^= cmdFlagPayloadLen
	}
	inside := off <= size && length <= size-off
	switch typ {
	case cmdRead:
		if mode != modeSimple {
			flags &^= cmdFlagDF
		}
		if flags != 0 || !inside {
			return errInval
		}
		return ok
	case cmdFlush:
		if flags != 0 {
			return errInval
		}
		return ok
	case cmdTrim, cmdCache:
		if flags != 0 || !inside {
			return errInval
		}
		return ok
	case cmdWriteZeroes:
		flags &^= cmdFlagNoHole | cmdFlagFastZero
		fallthrough
	case cmdWrite:
		switch {
		case flags != 0:
			return errInval
		case !inside:
			return errNoSpace
		}
		return ok
	case cmdBlockStatus:
		if mode == modeSimple {
			return errInval
		}
		if mode == modeExtended && flags&cmdFlagPayloadLen != 0 {
			flags &^= cmdFlagPayloadLen
			if length != 12 || binary.BigEndian.Uint32(body[8:]) != 1 {
				return errInval
			}
			length = binary.BigEndian.Uint64(body)
			inside = off <= size && length <= size-off
		}
		if flags&^cmdFlagReqOne != 0 || !inside || length == 0 {
			return errInval
		}
		return ok
	}
	return errInval
}

// Whatever bytes come after the handshake, the server ends the connection or
// goes on, and gives everything back.
func FuzzStream(f *testing.F) {
	f.Add(uint8(0), packRequest(modeSimple, cmdRead, 0, 1, 0, 512))
	f.Add(uint8(2), packRequest(modeExtended, cmdWrite, 0, 1, 0, 1<<40))
	f.Add(uint8(1), append(packRequest(modeSimple, cmdWrite, 1, 1, 0, 4), packRequest(modeSimple, cmdDisc, 0, 0, 0, 0)...))
	f.Fuzz(func(t *testing.T, m uint8, b []byte) {
		c := fuzzServer(t, newDisk(mib)).enter("disk", replyMode(m%3))
		go func() {
			_, _ = c.Write(b) // fails when the server has ended it
			c.Close()
		}()
		_, _ = io.Copy(io.Discard, c)
	})
}
