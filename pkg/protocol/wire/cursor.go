package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// What can be wrong with a packet. They come wrapped in a PacketError.
var (
	// ErrShort says that the packet ends before what it announces.
	ErrShort = errors.New("packet is too short")
	// ErrTrailing says that bytes are left after the last field.
	ErrTrailing = errors.New("bytes left over at the end of the packet")
	// ErrTooLarge says that a length or count is over its limit.
	ErrTooLarge = errors.New("length or count over the limit")
	// ErrCommand says that the packet bears another command, or one unknown.
	ErrCommand = errors.New("unexpected command")
	// ErrInvalid says that a field has a value with no meaning.
	ErrInvalid = errors.New("field value with no meaning")
	// ErrUnsupported says that the packet belongs to a version or part of the
	// protocol that is not taken here; a peer may be told no and go on.
	ErrUnsupported = errors.New("kind of packet that is not supported")
)

// cursor reads a packet from front to back. The first bad read sticks; later
// ones return zero, so that decoding is straight-line code with one check.
type cursor struct {
	b    []byte
	want Command
	size int // of the whole packet, for the error
	err  error
}

func newCursor(b []byte, want Command) cursor {
	c := cursor{b: b, want: want, size: len(b)}
	if got := Command(c.u8()); c.err == nil && got != want {
		c.fail(fmt.Errorf("%w: %s", ErrCommand, got))
	}
	return c
}

func (c *cursor) fail(err error) {
	if c.err == nil {
		c.err = &PacketError{Command: c.want, Size: c.size, Err: err}
	}
	c.b = nil
}

// PacketError says which packet could not be decoded, and why.
type PacketError struct {
	Command Command // that was expected
	Size    int     // bytes of the packet
	Err     error   // one of those above, or wrapping one
}

// Error names the command and the length.
func (e *PacketError) Error() string {
	return fmt.Sprintf("wire: %s packet of %d bytes: %v", e.Command, e.Size, e.Err)
}

// Unwrap is the reason.
func (e *PacketError) Unwrap() error { return e.Err }

// bytes takes n bytes, which alias the packet.
func (c *cursor) bytes(n int) []byte {
	if c.err != nil {
		return nil
	}
	if n < 0 || n > len(c.b) {
		c.fail(ErrShort)
		return nil
	}
	p := c.b[:n:n]
	c.b = c.b[n:]
	return p
}

// rest takes all that is left.
func (c *cursor) rest() []byte {
	return c.bytes(len(c.b))
}

func (c *cursor) u8() byte {
	if p := c.bytes(1); p != nil {
		return p[0]
	}
	return 0
}

func (c *cursor) u16() uint16 {
	if p := c.bytes(2); p != nil {
		return binary.LittleEndian.Uint16(p)
	}
	return 0
}

func (c *cursor) u32() uint32 {
	if p := c.bytes(4); p != nil {
		return binary.LittleEndian.Uint32(p)
	}
	return 0
}

func (c *cursor) u64() uint64 {
	if p := c.bytes(8); p != nil {
		return binary.LittleEndian.Uint64(p)
	}
	return 0
}

func (c *cursor) i64() int64 { return int64(c.u64()) }
func (c *cursor) i32() int32 { return int32(c.u32()) }

// count reads a u32 that announces so many elements of at least size bytes
// each. It never returns more than the limit, nor more than there are bytes
// for, so it may decide an allocation.
func (c *cursor) count(size, limit int) int {
	n := c.u32()
	switch {
	case c.err != nil:
		return 0
	case uint64(n) > uint64(limit):
		c.fail(fmt.Errorf("%w: count %d, limit %d", ErrTooLarge, n, limit))
		return 0
	case uint64(n)*uint64(size) > uint64(len(c.b)):
		c.fail(ErrShort)
		return 0
	}
	return int(n)
}

// done returns the first error, or ErrTrailing if bytes are left.
func (c *cursor) done() error {
	if c.err == nil && len(c.b) > 0 {
		c.fail(fmt.Errorf("%w: %d", ErrTrailing, len(c.b)))
	}
	return c.err
}
