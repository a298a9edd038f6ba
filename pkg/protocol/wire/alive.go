package wire

// Alive says that the sender is there, and nothing else. It is ours, for a peer
// of revision RevisionAlive or later, and has no answer.
type Alive struct{}

// AppendBinary appends the packet.
func (m *Alive) AppendBinary(b []byte) ([]byte, error) {
	return append(b, byte(CommandAlive)), nil
}

// UnmarshalBinary decodes a whole packet.
func (m *Alive) UnmarshalBinary(b []byte) error {
	return DecodeBare(b, CommandAlive)
}
