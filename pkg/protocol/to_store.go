package protocol

import (
	"fmt"
	"io"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// WriteAt sends b as urgent data and waits until the peer has written it. More
// than 16 MiB go as several packets. An answer that says less or no is a
// *RemoteError.
func (t *ToProtocol) WriteAt(b []byte, off int64) (int, error) {
	if err := storage.CheckRange(off, int64(len(b)), t.size); err != nil {
		return 0, fmt.Errorf("protocol: write %d bytes at %d: %w", len(b), off, err)
	}
	done := 0
	for done < len(b) {
		part := b[done:min(len(b), done+maxData)]
		err := t.wait(func(w *waiter) error {
			return t.StartWrite(PriorityUrgent, part, off+int64(done), w)
		})
		if err != nil {
			return done, err
		}
		done += len(part)
	}
	return done, nil
}

// ReadAt asks the peer for bytes of its store. A plain Silo source never takes
// it; our destination and Silo's do.
func (t *ToProtocol) ReadAt(b []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("protocol: read %d bytes at %d: %w", len(b), off, storage.ErrOutOfRange)
	}
	if uint64(off) >= t.size && len(b) > 0 {
		return 0, io.EOF
	}
	var end error
	if left := int64(t.size) - off; int64(len(b)) > left {
		b, end = b[:left], io.EOF
	}
	done := 0
	for done < len(b) {
		part := b[done:min(len(b), done+maxData)]
		n, err := t.readPart(part, off+int64(done))
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, end
}

func (t *ToProtocol) readPart(b []byte, off int64) (int, error) {
	if err := t.ready(); err != nil {
		return 0, err
	}
	m := wire.ReadAt{Off: off, Length: int32(len(b))}
	packet, err := m.AppendBinary(nil)
	if err != nil {
		return 0, err
	}
	n := 0
	w := t.p.newWaiter()
	defer t.p.freeWaiter(w)
	c := call{command: wire.CommandReadAt, off: off, length: int64(len(b)), done: w}
	if err := t.start(PriorityUrgent, c, packet, nil); err != nil {
		return 0, err
	}
	err = <-w.answer // comes at the connection's end at the latest
	n = copy(b, w.data)
	return n, err
}

// wait starts a request and waits for its answer.
func (t *ToProtocol) wait(start func(*waiter) error) error {
	w := t.p.newWaiter()
	defer t.p.freeWaiter(w)
	if err := start(w); err != nil {
		return err
	}
	return <-w.answer // comes at the connection's end at the latest
}

// ZeroAt makes the range read as zeroes at the peer and waits until it does. It
// costs a few bytes for each GiB. What punch asks for does not travel.
func (t *ToProtocol) ZeroAt(off, length int64, _ bool) error {
	if err := storage.CheckRange(off, length, t.size); err != nil {
		return fmt.Errorf("protocol: zero %d bytes at %d: %w", length, off, err)
	}
	for length > 0 {
		n := min(length, maxZeroRun)
		err := t.wait(func(w *waiter) error { return t.StartZero(PriorityUrgent, off, n, w) })
		if err != nil {
			return err
		}
		off += n
		length -= n
	}
	return nil
}

// Size is the device's size in bytes.
func (t *ToProtocol) Size() uint64 {
	return t.size
}

// Flush fails with errors.ErrUnsupported: the protocol cannot ask for it. What
// was sent is on stable storage when the event Completed has been answered.
func (t *ToProtocol) Flush() error {
	return errFlush
}

// Close does nothing: the connection belongs to who made it, and RemoveDev
// tells the peer.
func (t *ToProtocol) Close() error {
	return nil
}
