package wire

import "encoding/binary"

// AlternateSource says where else the bytes of a range can be had.
type AlternateSource struct {
	Off, Length int64
	Sum         [HashSize]byte // SHA-256 of the range
	Location    []byte         // aliases the packet
}

// AlternateSources lists them. We fetch from nowhere else and ignore it.
type AlternateSources struct {
	Sources []AlternateSource
}

// AppendBinary appends the packet.
func (m *AlternateSources) AppendBinary(b []byte) ([]byte, error) {
	b = append(b, byte(CommandAlternateSources))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(m.Sources)))
	for i := range m.Sources {
		s := &m.Sources[i]
		b = binary.LittleEndian.AppendUint64(b, uint64(s.Off))
		b = binary.LittleEndian.AppendUint64(b, uint64(s.Length))
		b = append(b, s.Sum[:]...)
		b = binary.LittleEndian.AppendUint32(b, uint32(len(s.Location)))
		b = append(b, s.Location...)
	}
	return b, nil
}

// UnmarshalBinary decodes a whole packet.
func (m *AlternateSources) UnmarshalBinary(b []byte) error {
	c := newCursor(b, CommandAlternateSources)
	m.Sources = make([]AlternateSource, c.count(8+8+HashSize+4, MaxAlternateSources))
	for i := range m.Sources {
		s := &m.Sources[i]
		s.Off, s.Length = c.i64(), c.i64()
		copy(s.Sum[:], c.bytes(HashSize))
		s.Location = c.bytes(c.count(1, MaxLocation))
	}
	return c.done()
}
