package protocol

import (
	"errors"
	"io"
)

// readAll reads the n bytes of a whole packet into memory of their own, which
// grows only as they come.
func (p *ProtocolRW) readAll(n uint32) ([]byte, error) {
	b := make([]byte, 0, min(n, firstRead))
	for {
		got, err := io.ReadFull(p.br, b[len(b):cap(b)])
		b = b[:len(b)+got]
		if err != nil {
			return nil, midPacket(err)
		}
		if uint32(len(b)) == n {
			p.sumUp(b)
			return b, p.verify()
		}
		grown := make([]byte, len(b), min(int64(n), 2*int64(len(b))))
		copy(grown, b)
		b = grown
	}
}

// readSmall reads the n bytes of a whole packet, at most maxSmall, which are good
// until the next read.
func (p *ProtocolRW) readSmall(n uint32) ([]byte, error) {
	b, err := p.br.Peek(int(n))
	if err != nil {
		return nil, midPacket(err)
	}
	p.scratch = append(p.scratch[:0], b...)
	p.skip(int(n))
	p.sumUp(p.scratch)
	return p.scratch, p.verify()
}

// skip lets go of bytes that Peek has shown.
func (p *ProtocolRW) skip(n int) {
	_, _ = p.br.Discard(n) // cannot fail: they are in the buffer
}

// discard lets go of the last n bytes of a packet.
func (p *ProtocolRW) discard(n uint32) error {
	for n > 0 && p.check.on {
		b, err := p.br.Peek(int(min(n, readBuffer)))
		if err != nil {
			return midPacket(err)
		}
		p.sumUp(b)
		p.skip(len(b))
		n -= uint32(len(b))
	}
	if _, err := p.br.Discard(int(n)); err != nil {
		return midPacket(err)
	}
	return p.verify()
}

// closedErr is what the reader returns when it was woken because the connection
// ended; the reason is stored already.
func (p *ProtocolRW) closedErr() error {
	<-p.done
	return p.err
}

// midPacket makes an end of the stream inside a packet an unexpected one.
func midPacket(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
