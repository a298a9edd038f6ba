package wire

import "encoding/binary"

// RemoveFromMap forgets pieces of mapped memory. We have none and ignore it.
type RemoveFromMap struct {
	IDs []uint64
}

// AppendBinary appends the packet.
func (m *RemoveFromMap) AppendBinary(b []byte) ([]byte, error) {
	b = append(b, byte(CommandRemoveFromMap))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(m.IDs)))
	for _, id := range m.IDs {
		b = binary.LittleEndian.AppendUint64(b, id)
	}
	return b, nil
}

// UnmarshalBinary decodes a whole packet.
func (m *RemoveFromMap) UnmarshalBinary(b []byte) error {
	c := newCursor(b, CommandRemoveFromMap)
	m.IDs = make([]uint64, c.count(8, MaxMapEntries))
	for i := range m.IDs {
		m.IDs[i] = c.u64()
	}
	return c.done()
}
