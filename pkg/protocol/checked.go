package protocol

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// Checked packets (wire.CommandChecked) go to peers that are known to take them:
// that have announced it in a DevInfo, or have sent one. From then on every packet
// goes so, in the order in which packets get the socket, those that wait for it
// too. And who has received one takes no other any more, so that no change of
// bytes turns a checked packet into a plain one.

// ErrDamaged is wire.ErrChecksum: bytes were changed on the way. A damaged
// WriteAt is refused and counted; any other packet ends the connection. At the
// source a RemoteError is one when the peer says that the data is to be sent again.
var ErrDamaged = wire.ErrChecksum

// checking is what a connection knows of checked packets.
type checking struct {
	legal   atomic.Bool   // we have announced that we take them, or the peer that it does
	damaged atomic.Uint64 // WriteAts that were refused because of their checksum

	// Used by the goroutine that reads alone:
	must bool   // one has come, so nothing else may
	on   bool   // the packet that is being read is one
	sum  uint32 // of what was read of it
	want uint32 // of all of it
}

// allow is called when both sides are about to know that we take checked packets.
func (p *ProtocolRW) allow() {
	p.check.legal.Store(true)
}

// takesChecked says whether the peer that announces di takes checked packets.
func takesChecked(di *wire.DevInfo) bool {
	return !Unchecked && di.Extension != nil && di.Extension.Revision >= wire.RevisionChecked
}

// openChecked looks at the packet behind h, of which only the header is gone. Of a
// checked one it takes the checksums, and returns the header as it is of one that
// is not.
func (p *ProtocolRW) openChecked(h wire.Header, first wire.Command) (wire.Header, wire.Command, error) {
	c := &p.check
	c.on = first == wire.CommandChecked && c.legal.Load()
	if !c.on {
		if c.must {
			return h, first, fmt.Errorf("a packet without a checksum behind others that had one: %w", ErrDamaged)
		}
		return h, first, nil
	}
	if h.Length <= wire.CheckedHead {
		return h, first, fmt.Errorf("too short for its checksums: %w", ErrDamaged)
	}
	b, err := p.br.Peek(wire.CheckedHead + 1)
	if err != nil {
		return h, first, midPacket(err)
	}
	h, command, want, err := wire.OpenChecked(h, b)
	if err != nil {
		return h, first, err
	}
	p.skip(wire.CheckedHead)
	c.sum, c.want = 0, want
	if !c.must {
		c.must = true
		p.sender.check()
	}
	return h, command, nil
}

// sumUp counts bytes of a packet that were read into its checksum.
func (p *ProtocolRW) sumUp(b []byte) {
	if p.check.on {
		p.check.sum = wire.Checksum(p.check.sum, b)
	}
}

// verify is called when a packet was read to its end, and before it means
// anything.
func (p *ProtocolRW) verify() error {
	if p.check.on && p.check.sum != p.check.want {
		return ErrDamaged
	}
	return nil
}

// discardData lets go of the rest of a WriteAt that is refused, and says why if it
// was damaged.
func (p *ProtocolRW) discardData(n uint32) (wire.Reason, error) {
	err := p.discard(n)
	if errors.Is(err, ErrDamaged) {
		return wire.ReasonDamaged, nil
	}
	return wire.ReasonUnknown, err
}

// checksum is that of a packet that was received, for the one who takes it to the
// store.
type checksum struct {
	on        bool
	sum, want uint32 // sum lacks what is in the job's buffer
}

func (j *job) damagedData() bool {
	return j.checksum.on && wire.Checksum(j.checksum.sum, j.buf.b) != j.checksum.want
}

// noteDamage counts a WriteAt that is refused because of its checksum.
func (in *incoming) noteDamage() {
	in.p.check.damaged.Add(1)
	if h, ok := in.store.(DamageHandler); ok {
		h.HandleDamage()
	}
}

// wrap returns b, which is whole packets, as checked ones. The right to write is
// held.
func (s *sender) wrap(b []byte) []byte {
	s.batch = slices.Grow(s.batch[:0], 2*len(b)) // each is 13 bytes at least and gets 9 more
	for len(b) > 0 {
		var h wire.Header
		_ = h.UnmarshalBinary(b[:wire.HeaderSize]) // cannot fail: so long are headers
		end := wire.HeaderSize + h.Length
		s.batch = wire.AppendChecked(s.batch, h, b[wire.HeaderSize:end])
		b = b[end:]
	}
	return s.batch
}

// check makes all packets that get the socket from now on checked ones.
func (s *sender) check() {
	s.wanted.Store(true)
}
