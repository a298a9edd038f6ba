package migrate

import "fmt"

// span is a half-open range of block numbers.
type span struct{ from, to int64 }

func (s span) len() int64 { return s.to - s.from }

// geometry is how a disk of size bytes divides into blocks; the last one may
// be short.
type geometry struct {
	size, blockSize int64
	blocks          int64
}

func newGeometry(size, blockSize int64) (geometry, error) {
	switch {
	case blockSize < MinBlockSize || blockSize > MaxBlockSize || blockSize&(blockSize-1) != 0:
		return geometry{}, fmt.Errorf("block size %d: want a power of two from %d to %d", blockSize, MinBlockSize, MaxBlockSize)
	case size <= 0:
		return geometry{}, fmt.Errorf("a disk of %d bytes: there is nothing to move", size)
	}
	g := geometry{size: size, blockSize: blockSize, blocks: (size-1)/blockSize + 1}
	if g.blocks > 1<<32 {
		return geometry{}, fmt.Errorf("%d blocks of %d bytes: the protocol numbers blocks with 32 bits, take larger blocks", g.blocks, blockSize)
	}
	return g, nil
}

// touching returns the blocks that [off, off+length) touches. It is false for
// a range that is empty, negative or not wholly on the disk (trap M5).
func (g geometry) touching(off, length int64) (span, bool) {
	if !g.valid(off, length) {
		return span{}, false
	}
	return span{off / g.blockSize, (off+length-1)/g.blockSize + 1}, true
}

// inside returns the blocks that lie wholly in [off, off+length), the short
// last one too if the range reaches the end of the disk (trap M6). A range
// that goes past the end is cut there.
func (g geometry) inside(off, length int64) (span, bool) {
	if off < 0 || length <= 0 || off >= g.size {
		return span{}, false
	}
	end := g.size
	if length < g.size-off {
		end = off + length
	}
	s := span{(off + g.blockSize - 1) / g.blockSize, end / g.blockSize}
	if end == g.size {
		s.to = g.blocks
	}
	return s, s.from < s.to
}

func (g geometry) valid(off, length int64) bool {
	return off >= 0 && length > 0 && off < g.size && length <= g.size-off
}

// bytes returns the byte range of s; the end is the disk's for the last block.
func (g geometry) bytes(s span) (off, length int64) {
	off = s.from * g.blockSize
	return off, min(s.to*g.blockSize, g.size) - off
}
