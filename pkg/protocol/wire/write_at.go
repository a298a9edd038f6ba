package wire

import (
	"encoding/binary"
	"fmt"
)

// WriteType says how the data of a WriteAt is written down.
type WriteType byte

// The types, by their numbers on the wire.
const (
	WriteData        WriteType = 0
	WriteHash        WriteType = 1 // only the hash: the data is to be had elsewhere
	WriteRunLength   WriteType = 2
	WriteAlreadyHave WriteType = 3 // later than 0.1.5, like those below
	WriteGzip        WriteType = 4
	WriteZeroes      WriteType = 5
)

var writeTypeNames = [...]string{"data", "hash", "run length", "already have", "gzip", "zeroes"}

// String is the type's name, or its number if it has none.
func (t WriteType) String() string {
	if int(t) < len(writeTypeNames) {
		return writeTypeNames[t]
	}
	return fmt.Sprintf("type %d", byte(t))
}

// WriteAtHead is the number of bytes in front of the data: command, type and
// offset. With the frame's header it makes the head of a data packet.
const WriteAtHead = 10

// WriteAt writes data at Off.
type WriteAt struct {
	Type WriteType
	Off  int64
	// Data is the bytes to write, or with WriteRunLength the tokens that stand
	// for them (see RLE). A decoded one aliases the packet.
	Data []byte

	// Of WriteHash only:
	Length   int64
	Sum      [HashSize]byte
	Location byte // where it can be had; 0 if the packet does not say, as in 0.1.5
}

// AppendWriteAtHead appends what stands in front of the data.
func AppendWriteAtHead(b []byte, t WriteType, off int64) []byte {
	b = append(b, byte(CommandWriteAt), byte(t))
	return binary.LittleEndian.AppendUint64(b, uint64(off))
}

// AppendZeroRun appends a whole WriteAt packet that writes length zeroes at
// off: 12 to 16 bytes.
func AppendZeroRun(b []byte, off, length int64) []byte {
	b = AppendWriteAtHead(b, WriteRunLength, off)
	b = binary.AppendUvarint(b, uint64(length)<<1|1)
	return append(b, 0)
}

// AppendBinary appends the packet. Types later than 0.1.5 are not written.
func (m *WriteAt) AppendBinary(b []byte) ([]byte, error) {
	switch m.Type {
	case WriteData, WriteRunLength:
		b = AppendWriteAtHead(b, m.Type, m.Off)
		return append(b, m.Data...), nil
	case WriteHash:
		b = append(b, byte(CommandWriteAt), byte(m.Type))
		if m.Location != 0 {
			b = append(b, m.Location)
		}
		b = binary.LittleEndian.AppendUint64(b, uint64(m.Off))
		b = binary.LittleEndian.AppendUint64(b, uint64(m.Length))
		return append(b, m.Sum[:]...), nil
	}
	return b, fmt.Errorf("wire: WriteAt %s: %w", m.Type, ErrUnsupported)
}

// UnmarshalBinary decodes a whole packet. The tokens of a WriteRunLength are
// checked, and stand for at most MaxRunLength bytes. A type that only later
// versions know is ErrUnsupported; a number that none knows is ErrInvalid.
func (m *WriteAt) UnmarshalBinary(b []byte) error {
	c := newCursor(b, CommandWriteAt)
	*m = WriteAt{Type: WriteType(c.u8())}
	if c.err != nil {
		return c.done()
	}
	switch m.Type {
	case WriteData:
		m.Off = c.i64()
		m.Data = c.rest()
	case WriteRunLength:
		m.Off = c.i64()
		m.Data = c.rest()
		if c.err == nil {
			if _, err := RLELen(m.Data, MaxRunLength); err != nil {
				c.fail(err)
			}
		}
	case WriteHash:
		if len(c.b) == 1+8+8+HashSize { // later versions say where
			if m.Location = c.u8(); m.Location == 0 {
				c.fail(fmt.Errorf("%w: location 0", ErrInvalid))
			}
		}
		m.Off, m.Length = c.i64(), c.i64()
		copy(m.Sum[:], c.bytes(HashSize))
	case WriteAlreadyHave, WriteGzip, WriteZeroes:
		c.fail(fmt.Errorf("%w: %s", ErrUnsupported, m.Type))
	default:
		c.fail(fmt.Errorf("%w: %s", ErrInvalid, m.Type))
	}
	return c.done()
}

// WriteAtResponse says how many bytes were written.
type WriteAtResponse struct {
	Bytes uint32
}

// AppendBinary appends the packet.
func (m *WriteAtResponse) AppendBinary(b []byte) ([]byte, error) {
	b = append(b, byte(CommandWriteAtResponse))
	return binary.LittleEndian.AppendUint32(b, m.Bytes), nil
}

// UnmarshalBinary decodes a whole packet.
func (m *WriteAtResponse) UnmarshalBinary(b []byte) error {
	c := newCursor(b, CommandWriteAtResponse)
	m.Bytes = c.u32()
	return c.done()
}

// Reason is why a WriteAt was refused.
type Reason byte

const (
	// ReasonUnknown says nothing: Silo's only answer, and that to whoever has not
	// said that it reads more.
	ReasonUnknown Reason = 0
	// ReasonNoRoom says that there is no room for the data now, and may be later.
	ReasonNoRoom Reason = 1
	// ReasonDamaged says that the data was changed on the way, or had no checksum,
	// and is wanted again.
	ReasonDamaged Reason = 2
)

// WriteAtResponseErr says that a WriteAt was refused. Its reason is ours, for a
// peer of revision RevisionReason or later; others get the command byte alone.
type WriteAtResponseErr struct {
	Reason Reason
}

// AppendBinary appends the packet.
func (m *WriteAtResponseErr) AppendBinary(b []byte) ([]byte, error) {
	b = append(b, byte(CommandWriteAtResponseErr))
	if m.Reason != ReasonUnknown {
		b = append(b, byte(m.Reason))
	}
	return b, nil
}

// UnmarshalBinary decodes a whole packet. A reason that is not known is kept.
func (m *WriteAtResponseErr) UnmarshalBinary(b []byte) error {
	c := newCursor(b, CommandWriteAtResponseErr)
	m.Reason = ReasonUnknown
	if c.err == nil && len(c.b) > 0 {
		if m.Reason = Reason(c.u8()); m.Reason == ReasonUnknown {
			c.fail(fmt.Errorf("%w: reason 0", ErrInvalid))
		}
	}
	return c.done()
}
