package wire

import (
	"encoding/binary"
	"fmt"
)

// HeaderSize is the number of bytes in front of each packet.
const HeaderSize = 12

// Header stands in front of each packet on the wire.
type Header struct {
	Dev    uint32 // device
	ID     uint32 // transaction: a response bears that of its request
	Length uint32 // bytes of the packet that follows
}

// AppendBinary appends the header's 12 bytes.
func (h Header) AppendBinary(b []byte) ([]byte, error) {
	return h.Append(b), nil
}

// Append is AppendBinary for callers that need no error: there is none.
func (h Header) Append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, h.Dev)
	b = binary.LittleEndian.AppendUint32(b, h.ID)
	return binary.LittleEndian.AppendUint32(b, h.Length)
}

// UnmarshalBinary decodes exactly 12 bytes.
func (h *Header) UnmarshalBinary(b []byte) error {
	if len(b) < HeaderSize {
		return fmt.Errorf("wire: header of %d bytes: %w", len(b), ErrShort)
	}
	if len(b) > HeaderSize {
		return fmt.Errorf("wire: header of %d bytes: %w", len(b), ErrTrailing)
	}
	h.Dev = binary.LittleEndian.Uint32(b)
	h.ID = binary.LittleEndian.Uint32(b[4:])
	h.Length = binary.LittleEndian.Uint32(b[8:])
	return nil
}
