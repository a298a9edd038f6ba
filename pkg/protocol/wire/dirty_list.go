package wire

import (
	"encoding/binary"
	"fmt"
)

// DirtyList says which blocks that were sent are not valid any more.
type DirtyList struct {
	BlockSize uint32 // bytes
	Blocks    []uint32
}

// AppendBinary appends the packet; it fails with ErrTooLarge over MaxDirtyBlocks.
func (m *DirtyList) AppendBinary(b []byte) ([]byte, error) {
	if len(m.Blocks) > MaxDirtyBlocks {
		return b, fmt.Errorf("wire: DirtyList of %d blocks: %w", len(m.Blocks), ErrTooLarge)
	}
	b = append(b, byte(CommandDirtyList))
	b = binary.LittleEndian.AppendUint32(b, m.BlockSize)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(m.Blocks)))
	for _, block := range m.Blocks {
		b = binary.LittleEndian.AppendUint32(b, block)
	}
	return b, nil
}

// UnmarshalBinary decodes a whole packet.
func (m *DirtyList) UnmarshalBinary(b []byte) error {
	c := newCursor(b, CommandDirtyList)
	m.BlockSize = c.u32()
	m.Blocks = make([]uint32, c.count(4, MaxDirtyBlocks)) // capped by the limit and by the bytes present
	for i := range m.Blocks {
		m.Blocks[i] = c.u32()
	}
	return c.done()
}
