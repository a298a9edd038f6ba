package protocol

import (
	"fmt"
	"io"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// answers says which request a response belongs to.
func answers(response wire.Command) (request wire.Command, known bool) {
	switch response {
	case wire.CommandReadAtResponse, wire.CommandReadAtResponseErr:
		return wire.CommandReadAt, true
	case wire.CommandWriteAtResponse, wire.CommandWriteAtResponseErr:
		return wire.CommandWriteAt, true
	case wire.CommandEventResponse:
		return wire.CommandEvent, true
	case wire.CommandHashesResponse:
		return wire.CommandHashes, true
	case wire.CommandDirtyListResponse:
		return wire.CommandDirtyList, true
	case wire.CommandDevInfoResponse:
		return wire.CommandDevInfo, true
	}
	return 0, false
}

// readResponse reads an answer and hands it to whoever waits. One that nobody
// waits for is read past and counted: it may be late, for a waiter that has
// given up. One of the wrong kind says that the peer is confused.
func (p *ProtocolRW) readResponse(command wire.Command, h wire.Header) error {
	request, known := answers(command)
	if !known {
		return fmt.Errorf("%w 0x%02x", ErrUnknownCommand, byte(command))
	}
	c, ok := p.calls.take(h.Dev, h.ID)
	if !ok {
		if command == wire.CommandDevInfoResponse && p.check.on {
			return fmt.Errorf("an answer to a DevInfo that was not sent so: %w", ErrDamaged)
		}
		p.mu.Lock()
		p.stray++
		p.mu.Unlock()
		return p.discard(h.Length)
	}
	var err error
	if c.command != request {
		err = fmt.Errorf("%w: it answers a %s", ErrUnexpected, c.command)
	} else {
		err = p.finishCall(&c, command, h.Length)
	}
	if err != nil { // of the connection: the waiter gets it as the reason of the end
		p.end(fmt.Errorf("device %d: %s packet of %d bytes: %w", h.Dev, command, h.Length, err))
		c.finish(p.closedErr())
		return err
	}
	return nil
}

// finishCall reads the answer to c and completes c, unless it returns an error.
func (p *ProtocolRW) finishCall(c *call, command wire.Command, n uint32) error {
	if command == wire.CommandReadAtResponse {
		return p.finishRead(c, n)
	}
	var b []byte
	var err error
	if command == wire.CommandDevInfoResponse {
		b, err = p.readAll(n)
	} else {
		b, err = p.readSmall(n)
	}
	if err != nil {
		return err
	}
	switch command {
	case wire.CommandWriteAtResponse:
		var m wire.WriteAtResponse
		if err := m.UnmarshalBinary(b); err != nil {
			return err
		}
		switch done := int64(m.Bytes); {
		case done > c.length:
			return fmt.Errorf("%w: %d bytes written of %d", ErrUnexpected, done, c.length)
		case done < c.length:
			c.finish(&RemoteError{Op: "write", Off: c.off, Len: c.length, Done: done})
		default:
			c.finish(nil)
		}
		return nil
	case wire.CommandDevInfoResponse:
		var m wire.DevInfoResponse
		if err := m.UnmarshalBinary(b); err != nil {
			return err
		}
		if m.Extension.Refused != "" {
			p.end(&RefusedError{Dev: c.dev, Reason: OneLine(m.Extension.Refused), Peer: m.Extension})
			return p.closedErr()
		}
		c.to.peerAnswered(m.Extension)
		p.bond(c.dev, &m.Extension)
		c.finish(nil)
		return nil
	case wire.CommandWriteAtResponseErr:
		var m wire.WriteAtResponseErr
		if err := m.UnmarshalBinary(b); err != nil {
			return err
		}
		c.finish(&RemoteError{
			Op: "write", Off: c.off, Len: c.length,
			NoRoom: m.Reason == wire.ReasonNoRoom, Damaged: m.Reason == wire.ReasonDamaged,
		})
		return nil
	}
	if err := wire.DecodeBare(b, command); err != nil {
		return err
	}
	switch command {
	case wire.CommandReadAtResponseErr:
		c.finish(&RemoteError{Op: "read", Off: c.off, Len: c.length})
	default:
		c.finish(nil)
	}
	return nil
}

// finishRead reads the answer to a ReadAt. The data goes to memory of its own:
// the waiter may have left with the connection's end.
func (p *ProtocolRW) finishRead(c *call, n uint32) error {
	if n < wire.ReadAtResponseHead || int64(n) > wire.ReadAtResponseHead+c.length {
		return fmt.Errorf("%w: %d bytes were asked for", ErrUnexpected, c.length)
	}
	buf := newBuffer(int(n))
	if _, err := io.ReadFull(p.br, buf.b); err != nil {
		buf.free()
		return midPacket(err)
	}
	p.sumUp(buf.b)
	if err := p.verify(); err != nil {
		buf.free()
		return err
	}
	var m wire.ReadAtResponse
	if err := m.UnmarshalBinary(buf.b); err != nil {
		buf.free()
		return err
	}
	w := c.done.(*waiter)
	w.buf, w.data = buf, m.Data[:m.Bytes]
	if int64(m.Bytes) < c.length {
		c.finish(&RemoteError{Op: "read", Off: c.off, Len: c.length, Done: int64(m.Bytes)})
	} else {
		c.finish(nil)
	}
	return nil
}
