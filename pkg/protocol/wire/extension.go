package wire

import (
	"encoding/binary"
	"fmt"
)

// Revision is the revision of the extension that this package writes.
const Revision = 4

// What a peer can do that says it has this revision or a later one.
const (
	RevisionAlive  = 2 // it sends Alive every few seconds, and takes it
	RevisionReason = 2 // it takes a WriteAtResponseErr with a Reason
	// RevisionChecked: it takes checked packets, and sends them to a peer that takes
	// them. A DevInfo of it ends in a checksum.
	RevisionChecked = 3
	// RevisionEpoch: as a destination it tells the epoch of its device, and goes live
	// only when it is told PostLock; as a source it checks that epoch before it sends
	// anything.
	RevisionEpoch = 4
)

// The types of the extension's fields. Each is a u16 type, a u16 length and so
// many bytes of value.
const (
	fieldRevision = 1  // u32, always the first
	fieldMaxData  = 2  // u32
	fieldLive     = 3  // no value: there or not
	fieldWindow   = 4  // u32
	fieldIdentity = 5  // 16 bytes UUID, u64 generation
	fieldRefused  = 6  // text
	fieldDevice   = 7  // 16 bytes UUID
	fieldEpoch    = 8  // u64 now, u64 before, u32 steps
	fieldHold     = 9  // no value
	fieldCompare  = 10 // no value
	fieldClone    = 11 // no value
	lastField     = fieldClone
	// u32 CRC32C of the packet so far; behind all others and in DevInfo only
	fieldChecksum = 0xffff
)

// Extension is what we say beyond Silo: fields behind the schema in DevInfo,
// where an old peer does not look, and in the DevInfoResponse.
type Extension struct {
	Revision uint32 // of the extension, 1 or more; marks the bytes as ours
	MaxData  uint32 // bytes of the largest WriteAt that the sender of this takes; 0: one block
	Window   uint32 // bytes of a device's bulk data that it takes without having answered; 0: unknown
	// Live means in a DevInfo that the source is still being written, and in a
	// DevInfoResponse that the destination's device is live.
	Live bool
	// Identity is the source's disk, in DevInfo; zero if it has none.
	Identity Identity
	// Refused is why the destination does not take the device, in a
	// DevInfoResponse; empty if it does. Whose words these are nobody knows.
	Refused string
	// Device is the destination's device: in a DevInfoResponse the one that the
	// disk comes to, in a DevInfo the one that it was handed off to. Zero: it is
	// not known, and the disk was not handed off.
	Device [16]byte
	// Epoch is in a DevInfoResponse that of the destination's device. In a DevInfo
	// only Now is set: it is the last epoch that the source has confirmed of the
	// device that it met last. Zero: it is not known.
	Epoch Epoch
	// Hold means in a DevInfo of a frozen disk that the device stays in standby until
	// EventPostLock.
	Hold bool
	// Compare means in a DevInfoResponse that the destination has blocks of this disk
	// and another generation, and wants hashes of those that it claims before
	// anything else.
	Compare bool
	// Clone means in a DevInfo that the source serves a golden image: there is no
	// handoff, and the device is the owner of its own copy.
	Clone   bool
	Unknown []Field
}

// Epoch tells the states of one device apart, also those that were rolled back or
// copied. Now is 64 random bits, drawn anew on each connection; Before is the last
// one that the source had confirmed. Steps counts the changes that the source
// asked for and that cannot be undone; it never goes back.
type Epoch struct {
	Now, Before uint64
	Steps       uint32
}

// Identity says which disk a device is, and which of its contents: two with the
// same identity hold the same bytes.
type Identity struct {
	UUID       [16]byte
	Generation uint64
}

// String is the identity as people compare it.
func (i Identity) String() string {
	return fmt.Sprintf("%x generation %d", i.UUID, i.Generation)
}

// Field is one of a type that is not known here. It is kept and means nothing.
type Field struct {
	Type  uint16
	Value []byte // aliases the packet
}

// append writes the known fields by type, then the unknown ones.
func (e *Extension) append(b []byte) ([]byte, error) {
	if e.Revision == 0 {
		return b, fmt.Errorf("wire: extension revision 0: %w", ErrInvalid)
	}
	start := len(b)
	b = appendField32(b, fieldRevision, e.Revision)
	if e.MaxData != 0 {
		b = appendField32(b, fieldMaxData, e.MaxData)
	}
	if e.Live {
		b = appendFieldHead(b, fieldLive, 0)
	}
	if e.Window != 0 {
		b = appendField32(b, fieldWindow, e.Window)
	}
	if e.Identity != (Identity{}) {
		b = append(appendFieldHead(b, fieldIdentity, 24), e.Identity.UUID[:]...)
		b = binary.LittleEndian.AppendUint64(b, e.Identity.Generation)
	}
	if e.Refused != "" {
		if len(e.Refused) > MaxRefused {
			return b, fmt.Errorf("wire: refusal of %d bytes: %w", len(e.Refused), ErrTooLarge)
		}
		b = append(appendFieldHead(b, fieldRefused, len(e.Refused)), e.Refused...)
	}
	if e.Device != [16]byte{} {
		b = append(appendFieldHead(b, fieldDevice, 16), e.Device[:]...)
	}
	if e.Epoch != (Epoch{}) {
		b = appendFieldHead(b, fieldEpoch, 20)
		b = binary.LittleEndian.AppendUint64(b, e.Epoch.Now)
		b = binary.LittleEndian.AppendUint64(b, e.Epoch.Before)
		b = binary.LittleEndian.AppendUint32(b, e.Epoch.Steps)
	}
	for _, flag := range e.lateFlags() {
		if *flag.value {
			b = appendFieldHead(b, flag.field, 0)
		}
	}
	for _, f := range e.Unknown {
		if len(f.Value) > 0xffff || f.Type == 0 || f.Type <= lastField || f.Type == fieldChecksum {
			return b, fmt.Errorf("wire: extension field %d of %d bytes: %w", f.Type, len(f.Value), ErrInvalid)
		}
		b = append(appendFieldHead(b, f.Type, len(f.Value)), f.Value...)
	}
	if n := len(b) - start; n > MaxExtension {
		return b, fmt.Errorf("wire: extension of %d bytes: %w", n, ErrTooLarge)
	}
	return b, nil
}

// flagField is a field without a value, which is there or not.
type flagField struct {
	field uint16
	value *bool
}

// lateFlags are the flags behind the epoch, by type.
func (e *Extension) lateFlags() [3]flagField {
	return [3]flagField{{fieldHold, &e.Hold}, {fieldCompare, &e.Compare}, {fieldClone, &e.Clone}}
}

func appendFieldHead(b []byte, t uint16, length int) []byte {
	b = binary.LittleEndian.AppendUint16(b, t)
	return binary.LittleEndian.AppendUint16(b, uint16(length))
}

func appendField32(b []byte, t uint16, v uint32) []byte {
	return binary.LittleEndian.AppendUint32(appendFieldHead(b, t, 4), v)
}

// read takes all that is left as an extension. Whatever is not one, in whole,
// fails the cursor.
func (e *Extension) read(c *cursor) {
	*e = Extension{}
	if len(c.b) > MaxExtension {
		c.fail(fmt.Errorf("%w: extension", ErrTooLarge))
		return
	}
	last := 0 // the types go up, so none comes twice and the bytes are canonical
	for c.err == nil && (len(c.b) > 0 || last == 0) {
		t, length := c.u16(), int(c.u16())
		value := cursor{b: c.bytes(length), want: c.want, size: c.size, err: c.err}
		switch {
		case c.err != nil:
			return
		case int(t) <= last || last == 0 && t != fieldRevision || t == fieldChecksum:
			c.fail(fmt.Errorf("%w: extension field %d out of order", ErrInvalid, t))
			return
		}
		last = int(t)
		e.readField(c, t, length, &value)
		if err := value.done(); err != nil {
			c.fail(fmt.Errorf("%w: length of extension field %d", ErrInvalid, t))
		}
	}
	if c.err == nil && e.Revision == 0 {
		c.fail(fmt.Errorf("%w: extension revision 0", ErrInvalid))
	}
}

// readField takes the value of a field of type t, and fails c if it means nothing.
func (e *Extension) readField(c *cursor, t uint16, length int, value *cursor) {
	zero := false // where zeroes are not a value
	switch t {
	case fieldRevision:
		e.Revision = value.u32()
	case fieldMaxData:
		e.MaxData = value.u32()
	case fieldLive:
		e.Live = true
	case fieldWindow:
		e.Window = value.u32()
	case fieldIdentity:
		copy(e.Identity.UUID[:], value.bytes(16))
		e.Identity.Generation = value.u64()
		zero = e.Identity == (Identity{})
	case fieldRefused:
		if length > MaxRefused {
			c.fail(fmt.Errorf("%w: refusal of %d bytes", ErrTooLarge, length))
		}
		e.Refused = string(value.rest())
	case fieldDevice:
		copy(e.Device[:], value.bytes(16))
		zero = e.Device == [16]byte{}
	case fieldEpoch:
		e.Epoch = Epoch{Now: value.u64(), Before: value.u64(), Steps: value.u32()}
		zero = e.Epoch == (Epoch{})
	case fieldHold, fieldCompare, fieldClone:
		*e.lateFlags()[t-fieldHold].value = true
	default:
		e.Unknown = append(e.Unknown, Field{Type: t, Value: value.rest()})
	}
	if zero {
		c.fail(fmt.Errorf("%w: extension field %d of zeroes", ErrInvalid, t))
	}
}

// checksumField is the number of bytes of a field with a checksum.
const checksumField = 8

// appendChecksum seals packet, which is the end of b.
func appendChecksum(b []byte, packet int) []byte {
	return appendField32(b, fieldChecksum, Checksum(0, b[packet:]))
}

// checksummed says whether packet ends in a field with a checksum, which no text
// does, and whether it matches.
func checksummed(packet []byte) (is, matches bool) {
	n := len(packet) - checksumField
	if n < 0 || [4]byte(packet[n:]) != [4]byte(appendFieldHead(nil, fieldChecksum, 4)) {
		return false, false
	}
	return true, binary.LittleEndian.Uint32(packet[n+4:]) == Checksum(0, packet[:n])
}

// shouldBeChecksummed says whether tail begins as an extension that ends in a
// checksum. With checksummed this finds damage at either of its ends.
func shouldBeChecksummed(tail []byte) bool {
	return len(tail) >= 8 && [4]byte(tail) == [4]byte(appendFieldHead(nil, fieldRevision, 4)) &&
		binary.LittleEndian.Uint32(tail[4:]) >= RevisionChecked
}

// DevInfoResponse answers a DevInfo that carried an extension.
type DevInfoResponse struct {
	Extension Extension
}

// AppendBinary appends the packet.
func (m *DevInfoResponse) AppendBinary(b []byte) ([]byte, error) {
	return m.Extension.append(append(b, byte(CommandDevInfoResponse)))
}

// UnmarshalBinary decodes a whole packet.
func (m *DevInfoResponse) UnmarshalBinary(b []byte) error {
	c := newCursor(b, CommandDevInfoResponse)
	m.Extension.read(&c)
	return c.done()
}
