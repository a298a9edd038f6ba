package wire

// NeedAt asks the source to send a range before all others. It has no answer.
type NeedAt struct {
	Off    int64
	Length int32
}

// AppendBinary appends the packet.
func (m *NeedAt) AppendBinary(b []byte) ([]byte, error) {
	return appendRange(b, CommandNeedAt, m.Off, m.Length), nil
}

// UnmarshalBinary decodes a whole packet.
func (m *NeedAt) UnmarshalBinary(b []byte) error {
	c := newCursor(b, CommandNeedAt)
	m.Off, m.Length = c.i64(), c.i32()
	return c.done()
}
