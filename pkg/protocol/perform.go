package protocol

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// perform takes one request to the store and answers it.
func (in *incoming) perform(j *job) {
	switch j.command {
	case wire.CommandWriteAt:
		n, err := in.write(j)
		in.drop(j) // before the answer, which may have to wait for the socket
		var b [5]byte
		switch {
		case err == nil:
			b[0] = byte(wire.CommandWriteAtResponse)
			binary.LittleEndian.PutUint32(b[1:], uint32(n))
			in.answer(j, b[:])
		case in.reasons && errors.Is(err, ErrNoRoom):
			in.answer(j, append(b[:0], byte(wire.CommandWriteAtResponseErr), byte(wire.ReasonNoRoom)))
		case in.reasons && errors.Is(err, ErrDamaged):
			in.answer(j, append(b[:0], byte(wire.CommandWriteAtResponseErr), byte(wire.ReasonDamaged)))
		default:
			in.answer(j, append(b[:0], byte(wire.CommandWriteAtResponseErr)))
		}
	case wire.CommandReadAt:
		in.read(j)
	case commandRefused, commandReadRefused:
		if j.reason == wire.ReasonDamaged && j.checksum.on {
			in.noteDamage()
		}
		in.drop(j)
		b := [2]byte{byte(j.command), byte(j.reason)}
		if j.reason == wire.ReasonUnknown || !in.reasons {
			in.answer(j, b[:1])
		} else {
			in.answer(j, b[:])
		}
	default:
		in.control(j)
	}
}

// answer sends a short answer with the others that wait for the socket. An
// error means that the connection has ended, and it has its reason.
func (in *incoming) answer(j *job, packet []byte) {
	_ = in.p.outbox.send(in.dev, j.id, packet, false)
	in.answered(false)
}

// write applies a WriteAt. Why a store fails is its owner's to tell: the peer
// hears only that it did, and whether sending it again can help.
func (in *incoming) write(j *job) (n int64, err error) {
	switch {
	case j.damagedData():
		in.noteDamage()
		return 0, ErrDamaged
	case j.rle:
		return j.length, in.writeRunLength(j)
	case j.length == 0:
		return 0, nil
	}
	written, err := in.store.WriteAt(j.buf.b, j.off)
	return int64(written), err
}

// read answers a ReadAt from the store.
func (in *incoming) read(j *job) {
	n, err := in.store.ReadAt(j.buf.b, j.off)
	if n < len(j.buf.b) || err != nil && err != io.EOF { // io.EOF beside all the bytes is none
		in.drop(j)
		in.answer(j, []byte{byte(wire.CommandReadAtResponseErr)})
		return
	}
	var first [wire.ReadAtResponseHead]byte
	first[0] = byte(wire.CommandReadAtResponse)
	binary.LittleEndian.PutUint32(first[1:], uint32(n))
	_ = in.p.send(PriorityUrgent, in.dev, j.id, first[:], j.buf.b) // an error is the connection's end
	in.drop(j)
	in.answered(false)
}

// control hands an event or a list to the store and answers it.
func (in *incoming) control(j *job) {
	defer in.drop(j)
	var err error
	var answer wire.Command
	switch m := j.message.(type) {
	case *wire.Event:
		reply := in.eventAnswer(j, m.Type)
		if h, ok := in.store.(EventHandler); ok {
			h.HandleEvent(m, reply)
		} else {
			reply(nil)
		}
		return
	case *wire.DirtyList:
		answer = wire.CommandDirtyListResponse
		if h, ok := in.store.(DirtyListHandler); ok {
			err = h.HandleDirtyList(m.BlockSize, m.Blocks)
		}
	case *wire.Hashes:
		answer = wire.CommandHashesResponse
		if h, ok := in.store.(HashesHandler); ok {
			err = h.HandleHashes(m.Hashes)
		}
	case *wire.RemoveDev:
		if h, ok := in.store.(RemoveDevHandler); ok {
			h.HandleRemoveDev()
		}
		in.answered(true)
		return
	}
	if err != nil { // the protocol knows no other way to say no
		in.p.end(fmt.Errorf("device %d: %s: %w", in.dev, j.command, err))
		return
	}
	in.drop(j)                                                     // before the answer, as for a write
	_ = in.p.outbox.send(in.dev, j.id, []byte{byte(answer)}, true) // an error is the connection's end
	in.answered(true)
}

// eventAnswer makes the function that answers an event, once. What the event
// counts against the memory is the answer's to give back: until then its handler
// may keep it.
func (in *incoming) eventAnswer(j *job, t wire.EventType) func(error) {
	var given atomic.Bool
	id, charge := j.id, j.charge
	j.charge = 0
	return func(err error) {
		if given.Swap(true) {
			return
		}
		in.p.budget.release(&in.account, charge)
		if err != nil {
			in.p.end(fmt.Errorf("device %d: event %s: %w", in.dev, t, err))
			return
		}
		_ = in.p.outbox.send(in.dev, id, []byte{byte(wire.CommandEventResponse)}, true) // an error is the connection's end
		in.answered(true)
	}
}

// decode decodes an event or a list, and checks that its blocks exist.
func (in *incoming) decode(command wire.Command, b []byte) (any, error) {
	switch command {
	case wire.CommandEvent:
		m := new(wire.Event)
		return m, m.UnmarshalBinary(b)
	case wire.CommandDirtyList:
		if err := in.checkCount(b); err != nil {
			return nil, err
		}
		m := new(wire.DirtyList)
		if err := m.UnmarshalBinary(b); err != nil {
			return nil, err
		}
		if m.BlockSize == 0 {
			return nil, fmt.Errorf("%w: block size 0", wire.ErrInvalid)
		}
		for _, block := range m.Blocks {
			if err := in.checkBlock(block, m.BlockSize); err != nil {
				return nil, err
			}
		}
		return m, nil
	case wire.CommandHashes:
		m := new(wire.Hashes)
		if err := m.UnmarshalBinary(b); err != nil {
			return nil, err
		}
		for i := range m.Hashes {
			if err := in.checkBlock(m.Hashes[i].Block, in.block); err != nil {
				return nil, err
			}
		}
		return m, nil
	}
	m := new(wire.RemoveDev)
	return m, m.UnmarshalBinary(b)
}

// checkCount refuses a dirty list of more blocks than the device has, before memory is
// taken for them. The rest of the packet is checked when it is decoded.
func (in *incoming) checkCount(b []byte) error {
	const fixed = 1 + 4 + 4 // command, block size, number of blocks
	if len(b) < fixed {
		return nil
	}
	size, count := uint64(binary.LittleEndian.Uint32(b[1:])), uint64(binary.LittleEndian.Uint32(b[5:]))
	if size != 0 && count > (in.size+size-1)/size {
		return fmt.Errorf("%w: a list of %d blocks of %d bytes for a device of %d bytes", wire.ErrInvalid, count, size, in.size)
	}
	return nil
}

func (in *incoming) checkBlock(block, blockSize uint32) error {
	if uint64(block)*uint64(blockSize) >= in.size {
		return fmt.Errorf("%w: block %d of %d bytes lies outside the device of %d bytes", wire.ErrInvalid, block, blockSize, in.size)
	}
	return nil
}
