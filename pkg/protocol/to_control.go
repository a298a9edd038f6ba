package protocol

import (
	"context"
	"fmt"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// SendEvent tells the destination and waits until it has acted on it.
func (t *ToProtocol) SendEvent(ctx context.Context, ev *wire.Event) error {
	packet, err := ev.AppendBinary(nil)
	if err != nil {
		return err
	}
	if len(packet) > maxEvent {
		return fmt.Errorf("protocol: event of %d bytes: %w", len(packet), wire.ErrTooLarge)
	}
	return t.roundTrip(ctx, wire.CommandEvent, packet)
}

// SendDirtyList takes back blocks that were sent and waits until the
// destination has forgotten them. blockSize is in bytes. A long list goes as
// several packets, one after the other.
func (t *ToProtocol) SendDirtyList(ctx context.Context, blockSize uint32, blocks []uint32) error {
	for {
		n := min(len(blocks), maxDirtyBlocks)
		m := wire.DirtyList{BlockSize: blockSize, Blocks: blocks[:n]}
		packet, err := m.AppendBinary(nil)
		if err != nil {
			return err
		}
		if err := t.roundTrip(ctx, wire.CommandDirtyList, packet); err != nil {
			return err
		}
		if blocks = blocks[n:]; len(blocks) == 0 {
			return nil
		}
	}
}

// SendHashes tells the destination what blocks should hold and waits for its
// answer. A long list goes as several packets, one after the other.
func (t *ToProtocol) SendHashes(ctx context.Context, hashes []wire.Hash) error {
	for {
		n := min(len(hashes), maxHashes)
		m := wire.Hashes{Hashes: hashes[:n]}
		packet, err := m.AppendBinary(nil)
		if err != nil {
			return err
		}
		if err := t.roundTrip(ctx, wire.CommandHashes, packet); err != nil {
			return err
		}
		if hashes = hashes[n:]; len(hashes) == 0 {
			return nil
		}
	}
}

// RemoveDev tells the destination that nothing more comes for the device. It
// has no answer: nil says that it was handed to a connection that still lives.
func (t *ToProtocol) RemoveDev() error {
	if err := t.ready(); err != nil {
		return err
	}
	packet, err := new(wire.RemoveDev).AppendBinary(nil)
	if err != nil {
		return err
	}
	if err := t.p.send(PriorityUrgent, t.dev, t.p.calls.id(), packet, nil); err != nil {
		return err
	}
	return t.p.unheard()
}

// roundTrip sends a request and waits for its answer, as long as ctx lets it.
func (t *ToProtocol) roundTrip(ctx context.Context, command wire.Command, packet []byte) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := t.ready(); err != nil {
		return err
	}
	w := t.p.newWaiter()
	defer t.p.freeWaiter(w)
	c := call{command: command, dev: t.dev, to: t, done: w}
	id, err := t.p.calls.add(c) // before sending: the answer can beat send's return
	if err != nil {
		return err
	}
	sendErr := t.p.send(PriorityUrgent, t.dev, id, packet[:1], packet[1:])
	if sendErr == nil {
		select {
		case err := <-w.answer:
			return err
		case <-ctx.Done():
			sendErr = context.Cause(ctx)
		}
	}
	if _, mine := t.p.calls.take(t.dev, id); !mine {
		<-w.answer // somebody is about to complete it, or has
	}
	return sendErr
}
