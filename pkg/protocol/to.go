package protocol

import (
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// ToProtocol is a device at the source: what is written to it travels to the
// destination. Its methods may be called from any goroutine, SendDevInfo before
// all others that send.
type ToProtocol struct {
	p    *ProtocolRW
	dev  uint32
	size uint64
	err  error // why it cannot be used: set once by NewToProtocol

	announced  atomic.Bool // the DevInfo has the socket: what is sent from now on comes behind it
	window     window
	needAt     atomic.Pointer[func(off, length int64)]
	dontNeedAt atomic.Pointer[func(off, length int64)]

	peer      wire.Extension // written before peerKnown is closed
	peerKnown chan struct{}
}

var (
	_ storage.StorageProvider = (*ToProtocol)(nil)
	_ storage.Zeroer          = (*ToProtocol)(nil)
)

// NewToProtocol makes the source's end of a device of size bytes under the id
// dev, which the source chooses. An id that is in use is reported by the first
// call that sends.
func NewToProtocol(size uint64, dev uint32, p Protocol) *ToProtocol {
	t := &ToProtocol{p: p.connection(), dev: dev, size: size, peerKnown: make(chan struct{})}
	t.window.init()
	t.err = t.p.register(t)
	return t
}

// SendDevInfo announces the device as plain Silo does, without an extension.
// blockSize is in bytes.
func (t *ToProtocol) SendDevInfo(name string, blockSize uint32, schema string) error {
	return t.SendDevInfoExt(&DevInfo{BlockSize: blockSize, Name: name, Schema: schema})
}

// SendDevInfoExt announces the device with all that di holds; its size is the
// device's, whatever di says. With an extension, a peer that knows it answers:
// see PeerKnown. A peer that takes checked packets, as we do from revision
// wire.RevisionChecked on, refuses data that was sent before it had said anything:
// it is to be sent again.
func (t *ToProtocol) SendDevInfoExt(di *DevInfo) error {
	if t.err != nil {
		return t.err
	}
	m := *di
	m.Size = t.size
	packet, err := m.AppendBinary(nil)
	if err != nil {
		return err
	}
	if err := t.p.announce(t); err != nil {
		return err
	}
	if takesChecked(&m) {
		t.p.allow()
	}
	id := uint32(0)
	if m.Extension == nil {
		id = t.p.calls.id()
	} else {
		id, err = t.p.calls.add(call{dev: t.dev, to: t, command: wire.CommandDevInfo, done: ignored{}})
		if err != nil {
			return err
		}
	}
	return t.p.sendMarked(PriorityUrgent, t.dev, id, packet, nil, &t.announced)
}

// ready says why nothing but a DevInfo can be sent, or nil.
func (t *ToProtocol) ready() error {
	if t.err != nil {
		return t.err
	}
	if !t.announced.Load() {
		if err := t.p.Err(); err != nil {
			return err
		}
		return fmt.Errorf("protocol: device %d: SendDevInfo comes first", t.dev)
	}
	return nil
}

// ignored is the completion of what nobody waits for.
type ignored struct{}

// Complete does nothing.
func (ignored) Complete(error) {}

// PeerKnown is closed when the peer has answered an extended DevInfo. A plain
// Silo peer never does.
func (t *ToProtocol) PeerKnown() <-chan struct{} {
	return t.peerKnown
}

// Peer is what the peer said about itself; ok is false as long as it has not.
func (t *ToProtocol) Peer() (ext wire.Extension, ok bool) {
	select {
	case <-t.peerKnown:
		return t.peer, true
	default:
		return wire.Extension{}, false
	}
}

// peerAnswered runs on the reader; a call is answered once, so this is too.
func (t *ToProtocol) peerAnswered(ext wire.Extension) {
	t.peer = ext
	t.window.resize(int64(ext.Window))
	close(t.peerKnown)
}

// HandleNeedAt sets what is called when the destination wants a range first.
// The range is in bytes, inside the device and never empty. It is called on the
// goroutine that reads and must not block. Set it before SendDevInfo.
func (t *ToProtocol) HandleNeedAt(f func(off, length int64)) {
	t.needAt.Store(handler(f))
}

// HandleDontNeedAt sets what is called when the destination does not want a
// range any more, as HandleNeedAt.
func (t *ToProtocol) HandleDontNeedAt(f func(off, length int64)) {
	t.dontNeedAt.Store(handler(f))
}

func handler(f func(off, length int64)) *func(off, length int64) {
	if f == nil {
		return nil
	}
	return &f
}

// start registers a call and sends its packet, of which the payload is not
// copied. The call completes exactly once, unless an error is returned.
func (t *ToProtocol) start(pri Priority, c call, first, payload []byte) error {
	c.dev, c.to = t.dev, t
	if c.window > 0 && !t.window.acquire(c.window) {
		return t.p.closedErr()
	}
	id, err := t.p.calls.add(c) // before sending: the answer can beat send's return
	if err != nil {
		return err
	}
	if err := t.p.send(pri, t.dev, id, first, payload); err != nil {
		if _, mine := t.p.calls.take(t.dev, id); mine {
			return err
		}
		// It was completed by the end of the connection, so the caller hears of it there.
	}
	return nil
}

// StartWrite sends p to be written at off and returns when it was handed to the
// socket; p may then be used again. c is completed when the answer has come:
// nil, a *RemoteError, or why the connection ended; it is not if StartWrite
// returns an error. A plain Silo destination wants one aligned block. Bulk data
// waits here while the peer has as much of the device as it said it takes.
func (t *ToProtocol) StartWrite(pri Priority, p []byte, off int64, c Completion) error {
	if err := t.checkWrite(off, int64(len(p)), maxData); err != nil {
		return err
	}
	var head [wire.WriteAtHead]byte
	first := wire.AppendWriteAtHead(head[:0], wire.WriteData, off)
	return t.start(pri, t.writeCall(pri, off, int64(len(p)), bufferCost(len(p)), c), first, p)
}

// StartZero sends a few bytes that stand for length zeroes at off, at most
// 1 GiB. A plain Silo destination expands them, so to it: one aligned block.
func (t *ToProtocol) StartZero(pri Priority, off, length int64, c Completion) error {
	if err := t.checkWrite(off, length, maxZeroRun); err != nil {
		return err
	}
	var packet [maxSmall]byte
	first := wire.AppendZeroRun(packet[:0], off, length)
	return t.start(pri, t.writeCall(pri, off, length, minCharge, c), first, nil)
}

// writeCall is the call of a write of length bytes. cost is what it takes of the
// peer's memory, which is rounded up there as bufferCost does.
func (t *ToProtocol) writeCall(pri Priority, off, length, cost int64, c Completion) call {
	w := call{command: wire.CommandWriteAt, off: off, length: length, done: c}
	if pri == PriorityBulk {
		w.window = cost
	}
	return w
}

func (t *ToProtocol) checkWrite(off, length, limit int64) error {
	if err := t.ready(); err != nil {
		return err
	}
	if length <= 0 || length > limit {
		return fmt.Errorf("protocol: write of %d bytes: want 1 to %d", length, limit)
	}
	if err := storage.CheckRange(off, length, t.size); err != nil {
		return fmt.Errorf("protocol: write %d bytes at %d: %w", length, off, err)
	}
	return nil
}

// waiter waits for one answer.
type waiter struct {
	answer chan error // capacity 1: the reader never waits for us
	buf    *buffer    // of a read
	data   []byte     // of a read: part of buf
}

// Complete hands over the answer.
func (w *waiter) Complete(err error) {
	w.answer <- err
}

func (p *ProtocolRW) newWaiter() *waiter {
	if w, ok := p.waiters.Get().(*waiter); ok {
		return w
	}
	return &waiter{answer: make(chan error, 1)}
}

// freeWaiter gives it back; its answer has been taken, or never comes.
func (p *ProtocolRW) freeWaiter(w *waiter) {
	w.buf.free()
	w.buf, w.data = nil, nil
	p.waiters.Put(w)
}

// errFlush is what Flush returns.
var errFlush = fmt.Errorf("protocol: the protocol knows no flush: %w", errors.ErrUnsupported)
