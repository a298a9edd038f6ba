package wire

import "encoding/binary"

// MapEntry says where a piece of mapped memory lies.
type MapEntry struct {
	ID, Off uint64
}

// WriteAtWithMap writes mapped memory. We have no such store and refuse it.
type WriteAtWithMap struct {
	Off  int64
	Map  []MapEntry
	Data []byte // aliases the packet
}

// AppendBinary appends the packet.
func (m *WriteAtWithMap) AppendBinary(b []byte) ([]byte, error) {
	b = append(b, byte(CommandWriteAtWithMap))
	b = binary.LittleEndian.AppendUint64(b, uint64(m.Off))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(m.Map)))
	for _, e := range m.Map {
		b = binary.LittleEndian.AppendUint64(b, e.ID)
		b = binary.LittleEndian.AppendUint64(b, e.Off)
	}
	return append(b, m.Data...), nil
}

// UnmarshalBinary decodes a whole packet.
func (m *WriteAtWithMap) UnmarshalBinary(b []byte) error {
	c := newCursor(b, CommandWriteAtWithMap)
	m.Off = c.i64()
	m.Map = make([]MapEntry, c.count(16, MaxMapEntries))
	for i := range m.Map {
		m.Map[i] = MapEntry{ID: c.u64(), Off: c.u64()}
	}
	m.Data = c.rest()
	return c.done()
}
