package wire

import (
	"encoding/binary"
	"fmt"
	"math"
)

// DevInfo announces a device: it is the first packet that bears its id.
type DevInfo struct {
	Size      uint64 // bytes
	BlockSize uint32 // bytes
	Name      string // as the peer wrote it: any bytes; it must never become a path
	Schema    string
	// Extension is what a peer of ours says beyond Silo; nil from any other.
	Extension *Extension
}

// AppendBinary appends the packet; a name or schema over its limit is
// ErrTooLarge.
func (m *DevInfo) AppendBinary(b []byte) ([]byte, error) {
	if len(m.Name) > math.MaxUint16 {
		return b, fmt.Errorf("wire: DevInfo name of %d bytes: %w", len(m.Name), ErrTooLarge)
	}
	if len(m.Schema) > MaxSchema {
		return b, fmt.Errorf("wire: DevInfo schema of %d bytes: %w", len(m.Schema), ErrTooLarge)
	}
	start := len(b)
	b = append(b, byte(CommandDevInfo))
	b = binary.LittleEndian.AppendUint64(b, m.Size)
	b = binary.LittleEndian.AppendUint32(b, m.BlockSize)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(m.Name)))
	b = append(b, m.Name...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(m.Schema)))
	b = append(b, m.Schema...)
	if m.Extension == nil {
		return b, nil
	}
	b, err := m.Extension.append(b)
	if err == nil && m.Extension.Revision >= RevisionChecked {
		b = appendChecksum(b, start)
	}
	return b, err
}

// UnmarshalBinary decodes a whole packet. Bytes behind the schema that are no
// valid extension belong to somebody else and are ignored, as Silo does. What
// was an extension with a checksum and was changed on the way is ErrChecksum: it
// must not be taken for another disk, or for a plain peer's.
func (m *DevInfo) UnmarshalBinary(b []byte) error {
	is, matches := checksummed(b)
	if is && !matches {
		return &PacketError{Command: CommandDevInfo, Size: len(b), Err: ErrChecksum}
	}
	c := newCursor(b, CommandDevInfo)
	*m = DevInfo{Size: c.u64(), BlockSize: c.u32()}
	m.Name = string(c.bytes(int(c.u16())))
	m.Schema = string(c.bytes(c.count(1, MaxSchema)))
	if c.err != nil || len(c.b) == 0 {
		return c.done()
	}
	tail := c.b
	if matches {
		c.b = tail[:max(0, len(tail)-checksumField)]
	}
	ext := new(Extension)
	if ext.read(&c); c.err == nil {
		m.Extension = ext
	}
	if !matches && shouldBeChecksummed(tail) {
		return &PacketError{Command: CommandDevInfo, Size: len(b), Err: ErrChecksum}
	}
	return nil
}
