package wire

import "encoding/binary"

// ReadAt asks for Length bytes at Off. The codec takes any value; whoever acts
// on it checks the range.
type ReadAt struct {
	Off    int64
	Length int32
}

// AppendBinary appends the packet.
func (m *ReadAt) AppendBinary(b []byte) ([]byte, error) {
	return appendRange(b, CommandReadAt, m.Off, m.Length), nil
}

// UnmarshalBinary decodes a whole packet.
func (m *ReadAt) UnmarshalBinary(b []byte) error {
	c := newCursor(b, CommandReadAt)
	m.Off, m.Length = c.i64(), c.i32()
	return c.done()
}

// appendRange appends the shape that ReadAt, NeedAt and DontNeedAt share.
func appendRange(b []byte, command Command, off int64, length int32) []byte {
	b = append(b, byte(command))
	b = binary.LittleEndian.AppendUint64(b, uint64(off))
	return binary.LittleEndian.AppendUint32(b, uint32(length))
}

// ReadAtResponse answers a ReadAt. Bytes of Data count; Silo sends its whole
// buffer, also when it has read less.
type ReadAtResponse struct {
	Bytes uint32
	Data  []byte // aliases the packet; at least Bytes long
}

// ReadAtResponseHead is the number of bytes in front of Data.
const ReadAtResponseHead = 5

// AppendBinary appends the packet.
func (m *ReadAtResponse) AppendBinary(b []byte) ([]byte, error) {
	b = append(b, byte(CommandReadAtResponse))
	b = binary.LittleEndian.AppendUint32(b, m.Bytes)
	return append(b, m.Data...), nil
}

// UnmarshalBinary decodes a whole packet.
func (m *ReadAtResponse) UnmarshalBinary(b []byte) error {
	c := newCursor(b, CommandReadAtResponse)
	m.Bytes = c.u32()
	m.Data = c.rest()
	if c.err == nil && uint64(m.Bytes) > uint64(len(m.Data)) {
		c.fail(ErrShort)
	}
	return c.done()
}
