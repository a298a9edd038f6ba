package wire

// RemoveDev says that no more packets of the device follow. It has no answer.
type RemoveDev struct{}

// AppendBinary appends the packet.
func (m *RemoveDev) AppendBinary(b []byte) ([]byte, error) {
	return append(b, byte(CommandRemoveDev)), nil
}

// UnmarshalBinary decodes a whole packet.
func (m *RemoveDev) UnmarshalBinary(b []byte) error {
	return DecodeBare(b, CommandRemoveDev)
}
