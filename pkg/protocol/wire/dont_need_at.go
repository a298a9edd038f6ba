package wire

// DontNeedAt tells the source that a range need not be sent. It has no answer.
type DontNeedAt struct {
	Off    int64
	Length int32
}

// AppendBinary appends the packet.
func (m *DontNeedAt) AppendBinary(b []byte) ([]byte, error) {
	return appendRange(b, CommandDontNeedAt, m.Off, m.Length), nil
}

// UnmarshalBinary decodes a whole packet.
func (m *DontNeedAt) UnmarshalBinary(b []byte) error {
	c := newCursor(b, CommandDontNeedAt)
	m.Off, m.Length = c.i64(), c.i32()
	return c.done()
}
