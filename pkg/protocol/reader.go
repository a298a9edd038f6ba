package protocol

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// readPackets reads until the connection ends, and says why.
func (p *ProtocolRW) readPackets() error {
	for {
		b, err := p.br.Peek(wire.HeaderSize)
		if err != nil {
			if err == io.EOF && len(b) > 0 {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		var h wire.Header
		if err := h.UnmarshalBinary(b); err != nil {
			return err
		}
		p.skip(wire.HeaderSize)
		if err := p.readPacket(h); err != nil {
			return err
		}
		if p.own == nil {
			continue
		}
		if err := p.performOwn(); err != nil {
			return err
		}
	}
}

// readPacket reads one packet, of which only the header is gone.
func (p *ProtocolRW) readPacket(h wire.Header) error {
	if h.Length == 0 {
		return fmt.Errorf("device %d: packet of length 0", h.Dev)
	}
	b, err := p.br.Peek(1)
	if err != nil {
		return midPacket(err)
	}
	command := wire.Command(b[0])
	h, command, err = p.openChecked(h, command)
	if err != nil {
		return fmt.Errorf("device %d: packet of %d bytes: %w", h.Dev, h.Length, err)
	}
	limit := p.opts.maxLength(command)
	if limit == 0 {
		return fmt.Errorf("device %d: packet of %d bytes: %w 0x%02x (%s)", h.Dev, h.Length, ErrUnknownCommand, byte(command), command)
	}
	if int64(h.Length) > limit {
		return fmt.Errorf("device %d: %s packet of %d bytes: %w of %d bytes", h.Dev, command, h.Length, wire.ErrTooLarge, limit)
	}
	if err := p.dispatch(command, h); err != nil {
		if _, named := errors.AsType[*wire.PacketError](err); named {
			return fmt.Errorf("device %d: %w", h.Dev, err)
		}
		return fmt.Errorf("device %d: %s packet of %d bytes: %w", h.Dev, command, h.Length, err)
	}
	return nil
}

func (p *ProtocolRW) dispatch(command wire.Command, h wire.Header) error {
	if command.IsResponse() {
		return p.readResponse(command, h)
	}
	switch command {
	case wire.CommandDevInfo:
		b, err := p.readAll(h.Length)
		if err != nil {
			return err
		}
		var di wire.DevInfo
		if err := di.UnmarshalBinary(b); err != nil {
			return err
		}
		return p.announced(h, &di)
	case wire.CommandNeedAt, wire.CommandDontNeedAt:
		return p.readNeed(command, h)
	case wire.CommandAlive: // that it came is all that it says
		b, err := p.readSmall(h.Length)
		if err != nil {
			return err
		}
		return new(wire.Alive).UnmarshalBinary(b)
	case wire.CommandReadAt, wire.CommandWriteAt, wire.CommandWriteAtWithMap, wire.CommandDirtyList,
		wire.CommandEvent, wire.CommandHashes, wire.CommandRemoveDev, wire.CommandRemoveFromMap,
		wire.CommandAlternateSources:
		in, err := p.incoming(h.Dev)
		if err != nil {
			return err
		}
		return p.readRequest(in, command, h)
	}
	return fmt.Errorf("%w 0x%02x", ErrUnknownCommand, byte(command))
}

// readNeed reads a NeedAt or DontNeedAt, cuts the range at the device's end and
// hands on what is left of it. A plain peer may ask for the whole of a short
// last block; a range that is empty or outside means nothing and is let go.
func (p *ProtocolRW) readNeed(command wire.Command, h wire.Header) error {
	t, err := p.outgoing(h.Dev)
	if err != nil {
		return err
	}
	b, err := p.readSmall(h.Length)
	if err != nil {
		return err
	}
	var m wire.NeedAt
	if command == wire.CommandNeedAt {
		err = m.UnmarshalBinary(b)
	} else {
		d := (*wire.DontNeedAt)(&m)
		err = d.UnmarshalBinary(b)
	}
	if err != nil {
		return err
	}
	if m.Off < 0 || m.Length <= 0 || uint64(m.Off) >= t.size {
		return nil
	}
	length := min(int64(m.Length), int64(t.size)-m.Off)
	call := t.needAt.Load()
	if command == wire.CommandDontNeedAt {
		call = t.dontNeedAt.Load()
	}
	if call != nil {
		(*call)(m.Off, length)
	}
	return nil
}

// readRequest reads a request for a device of the peer's.
func (p *ProtocolRW) readRequest(in *incoming, command wire.Command, h wire.Header) error {
	switch command {
	case wire.CommandWriteAt:
		return p.readWriteAt(in, h)
	case wire.CommandWriteAtWithMap: // nobody here maps memory: no, without keeping its data
		return p.refuse(in, h, h.Length)
	case wire.CommandReadAt:
		b, err := p.readSmall(h.Length)
		if err != nil {
			return err
		}
		var m wire.ReadAt
		if err := m.UnmarshalBinary(b); err != nil {
			return err
		}
		return p.queueReadAt(in, h.ID, m)
	case wire.CommandRemoveFromMap, wire.CommandAlternateSources: // nothing here to forget or to fetch from
		return p.discard(h.Length)
	}
	return p.readControl(in, command, h)
}

// readWriteAt reads a WriteAt. Its data goes straight to the buffer from which
// it is written.
func (p *ProtocolRW) readWriteAt(in *incoming, h wire.Header) error {
	if in.checked && !p.check.on { // it comes again, with a checksum
		if err := p.discard(h.Length); err != nil {
			return err
		}
		return p.queueRefusal(in, commandRefused, h.ID, wire.ReasonDamaged)
	}
	if h.Length < wire.WriteAtHead {
		b, err := p.readSmall(h.Length)
		if err != nil {
			return err
		}
		return new(wire.WriteAt).UnmarshalBinary(b) // says what is missing
	}
	b, err := p.br.Peek(wire.WriteAtHead)
	if err != nil {
		return midPacket(err)
	}
	n := h.Length - wire.WriteAtHead
	switch t := wire.WriteType(b[1]); t {
	case wire.WriteData:
		off := int64(binary.LittleEndian.Uint64(b[2:]))
		p.sumUp(b) // with the rest it tells, later, whether the offset is what was sent
		p.skip(wire.WriteAtHead)
		if !in.contains(off, int64(n)) || n > maxData {
			return p.refuse(in, h, n)
		}
		j := job{command: wire.CommandWriteAt, id: h.ID, off: off, length: int64(n)}
		if err := p.readData(in, &j, int(n)); err != nil {
			return err
		}
		return in.push(j)
	case wire.WriteRunLength:
		return p.readRunLength(in, h)
	case wire.WriteHash, wire.WriteAlreadyHave, wire.WriteGzip, wire.WriteZeroes:
		return p.refuse(in, h, h.Length) // no other source to have it from, or later than 0.1.5
	default:
		reason, err := p.discardData(h.Length)
		if reason == wire.ReasonDamaged {
			return p.queueRefusal(in, commandRefused, h.ID, reason)
		}
		return cmp.Or(err, fmt.Errorf("%w: WriteAt of %s", wire.ErrInvalid, t))
	}
}

// readRunLength reads a WriteAt of run-length data, which stays as it is until
// it is applied.
func (p *ProtocolRW) readRunLength(in *incoming, h wire.Header) error {
	j := job{command: wire.CommandWriteAt, id: h.ID, rle: true}
	if err := p.readData(in, &j, int(h.Length)); err != nil {
		return err
	}
	if j.damagedData() {
		in.drop(&j)
		return p.queueRefusal(in, commandRefused, h.ID, wire.ReasonDamaged)
	}
	j.checksum.on = false
	var m wire.WriteAt
	if err := m.UnmarshalBinary(j.buf.b); err != nil {
		in.drop(&j)
		return err
	}
	j.off, j.tokens = m.Off, m.Data
	j.length, _ = wire.RLELen(m.Data, wire.MaxRunLength) // was checked just now
	if !in.contains(j.off, j.length) {
		in.drop(&j)
		return p.queueRefusal(in, commandRefused, h.ID, wire.ReasonUnknown)
	}
	if !zeroRun(m.Data) { // it is expanded by the piece
		charge := j.charge + bufferCost(int(min(j.length, in.pieceSize())))
		p.budget.release(&in.account, j.charge)
		j.charge = charge
		if !p.budget.acquire(&in.account, j.charge) {
			j.charge = 0
			in.drop(&j)
			return p.closedErr()
		}
	}
	return in.push(j)
}

// readData waits until there is memory for n bytes, the last of the packet, and
// reads them.
func (p *ProtocolRW) readData(in *incoming, j *job, n int) error {
	j.charge = bufferCost(n)
	if !p.budget.acquire(&in.account, j.charge) {
		j.charge = 0
		return p.closedErr()
	}
	j.buf = newBuffer(n)
	if _, err := io.ReadFull(p.br, j.buf.b); err != nil {
		in.drop(j)
		return midPacket(err)
	}
	if p.check.on {
		j.checksum = checksum{on: true, sum: p.check.sum, want: p.check.want}
	}
	return nil
}

func (p *ProtocolRW) queueReadAt(in *incoming, id uint32, m wire.ReadAt) error {
	if m.Length < 0 || m.Length > maxData || !in.contains(m.Off, int64(m.Length)) {
		return p.queueRefusal(in, commandReadRefused, id, wire.ReasonUnknown)
	}
	j := job{command: wire.CommandReadAt, id: id, off: m.Off, length: int64(m.Length)}
	j.charge = bufferCost(int(m.Length))
	if !p.budget.acquire(&in.account, j.charge) {
		return p.closedErr()
	}
	j.buf = newBuffer(int(m.Length))
	return in.push(j)
}

// refuse lets the last n bytes of the packet go and answers it with an error.
func (p *ProtocolRW) refuse(in *incoming, h wire.Header, n uint32) error {
	reason, err := p.discardData(n)
	if err != nil {
		return err
	}
	return p.queueRefusal(in, commandRefused, h.ID, reason)
}

// queueRefusal queues a refusal behind what came before, as it has its place in
// memory too.
func (p *ProtocolRW) queueRefusal(in *incoming, answer wire.Command, id uint32, reason wire.Reason) error {
	j := job{command: answer, id: id, charge: minCharge, reason: reason}
	j.checksum.on = p.check.on
	if !p.budget.acquire(&in.account, j.charge) {
		return p.closedErr()
	}
	return in.push(j)
}

// readControl reads an event, a list, or RemoveDev.
func (p *ProtocolRW) readControl(in *incoming, command wire.Command, h wire.Header) error {
	j := job{command: command, id: h.ID, charge: bufferCost(int(h.Length))}
	if h.Length > readBuffer {
		j.charge *= 2 // as it came, and decoded
	}
	if !p.budget.acquire(&in.account, j.charge) {
		return p.closedErr()
	}
	b, err := p.readAll(h.Length)
	if err == nil {
		j.message, err = in.decode(command, b)
	}
	if err != nil {
		in.drop(&j)
		return err
	}
	if command == wire.CommandRemoveDev {
		in.removed = true
	}
	return in.push(j)
}
