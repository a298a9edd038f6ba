package protocol

import (
	"errors"
	"fmt"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// The store that a factory returns may implement these beside storage.Zeroer.
// Events, lists and RemoveDev of a device are handed over in the order in which
// they came, on a goroutine of the device: each after all earlier WriteAts are
// in the store, and later ones start when the handler has returned.
type (
	// EventHandler acts on events. It calls answer exactly once, at any time and
	// on any goroutine; an error ends the connection. Without it every event is
	// answered at once.
	EventHandler interface {
		HandleEvent(ev *wire.Event, answer func(error))
	}
	// DirtyListHandler forgets blocks that the source takes back; they exist on
	// the device. blockSize is in bytes. An error ends the connection.
	DirtyListHandler interface {
		HandleDirtyList(blockSize uint32, blocks []uint32) error
	}
	// HashesHandler compares or keeps hashes of blocks, which exist on the device.
	// An error ends the connection.
	HashesHandler interface {
		HandleHashes(hashes []wire.Hash) error
	}
	// DamageHandler hears of each WriteAt that was changed on the way. It was refused,
	// so that it comes again.
	DamageHandler interface {
		HandleDamage()
	}
	// RemoveDevHandler hears that nothing more comes for the device.
	RemoveDevHandler interface {
		HandleRemoveDev()
	}
	// Describer tells an extended source about the device that its disk comes to:
	// it sets Device, Epoch, Live and Compare of ext. It is called once, when the
	// factory has returned.
	Describer interface {
		Describe(ext *wire.Extension)
	}
)

// FromProtocol is a device at the destination: what arrives for it goes to a
// store. A store's failure to write is answered to the source, and the
// connection lives.
type FromProtocol struct {
	p       *ProtocolRW
	dev     uint32
	factory func(di *DevInfo) storage.StorageProvider
	in      *incoming
}

// NewFromProtocol takes what arrives for dev. When the device's DevInfo is there
// factory is called, once and on a goroutine of the device: it may block and may
// send. The store is the caller's to close, after the connection's Close. A nil
// store refuses the device, which ends the connection; so does an id that has a
// user already.
func NewFromProtocol(dev uint32, factory func(di *DevInfo) storage.StorageProvider, p Protocol) *FromProtocol {
	f := &FromProtocol{p: p.connection(), dev: dev, factory: factory}
	if err := f.p.expect(f); err != nil {
		f.p.end(err)
	}
	return f
}

// errNotAnnounced is what asking for a range of a device says before its DevInfo.
var errNotAnnounced = errors.New("the device's DevInfo has not come")

// NeedAt asks the source to send length bytes at off before all others. The
// range lies in the device and is not empty. It returns when the request is on
// its way; there is no answer but the data.
func (f *FromProtocol) NeedAt(off, length int64) error {
	return f.sendRanges(wire.CommandNeedAt, off, length)
}

// DontNeedAt tells the source that it need not send length bytes at off, as
// NeedAt.
func (f *FromProtocol) DontNeedAt(off, length int64) error {
	return f.sendRanges(wire.CommandDontNeedAt, off, length)
}

// sendRanges splits a range at what the wire can say, on a block.
func (f *FromProtocol) sendRanges(command wire.Command, off, length int64) error {
	in := f.in
	if in == nil {
		return f.p.closedErr() // its id was refused, which ended the connection
	}
	di := in.announcedInfo()
	if di == nil {
		return fmt.Errorf("protocol: %s on device %d: %w", command, f.dev, errNotAnnounced)
	}
	if err := storage.CheckRange(off, length, di.Size); err != nil || length == 0 {
		return fmt.Errorf("protocol: %s of %d bytes at %d: %w", command, length, off, storage.ErrOutOfRange)
	}
	block := max(1, min(int64(di.BlockSize), maxRange))
	for length > 0 {
		n := length
		if n > maxRange {
			n = (off+maxRange)/block*block - off
		}
		var packet [maxSmall]byte
		b := packet[:0]
		var err error
		if command == wire.CommandNeedAt {
			b, err = (&wire.NeedAt{Off: off, Length: int32(n)}).AppendBinary(b)
		} else {
			b, err = (&wire.DontNeedAt{Off: off, Length: int32(n)}).AppendBinary(b)
		}
		if err != nil {
			return err
		}
		if err := f.p.outbox.send(f.dev, f.p.calls.id(), b, false); err != nil {
			return err
		}
		off += n
		length -= n
	}
	return nil
}
