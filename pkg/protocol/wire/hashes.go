package wire

import (
	"encoding/binary"
	"fmt"
)

// HashSize is the number of bytes of a SHA-256.
const HashSize = 32

// Hash is the SHA-256 of one block of the source.
type Hash struct {
	Block uint32
	Sum   [HashSize]byte
}

// Hashes tells the destination what the blocks should hold.
type Hashes struct {
	Hashes []Hash
}

// AppendBinary appends the packet; it fails with ErrTooLarge over MaxHashes.
func (m *Hashes) AppendBinary(b []byte) ([]byte, error) {
	if len(m.Hashes) > MaxHashes {
		return b, fmt.Errorf("wire: Hashes of %d blocks: %w", len(m.Hashes), ErrTooLarge)
	}
	b = append(b, byte(CommandHashes))
	for i := range m.Hashes {
		b = binary.LittleEndian.AppendUint32(b, m.Hashes[i].Block)
		b = append(b, m.Hashes[i].Sum[:]...)
	}
	return b, nil
}

// UnmarshalBinary decodes a whole packet.
func (m *Hashes) UnmarshalBinary(b []byte) error {
	c := newCursor(b, CommandHashes)
	m.Hashes = nil
	n := len(c.b) / (4 + HashSize)
	if n > MaxHashes {
		c.fail(fmt.Errorf("%w: %d hashes, limit %d", ErrTooLarge, n, MaxHashes))
		return c.done()
	}
	if len(c.b)%(4+HashSize) != 0 {
		c.fail(ErrShort) // the last one is cut off
		return c.done()
	}
	m.Hashes = make([]Hash, n)
	for i := range m.Hashes {
		m.Hashes[i].Block = c.u32()
		copy(m.Hashes[i].Sum[:], c.bytes(HashSize))
	}
	return c.done()
}
