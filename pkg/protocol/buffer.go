package protocol

import (
	"math/bits"
	"sync"
)

// Buffers for data are pooled by size, four sizes to a doubling, in whole pages
// of 4 KiB, and begin on a page, as direct I/O wants them.
const (
	pageBits = 12
	page     = 1 << pageBits
	classes  = 4 * (24 - pageBits + 1) // to 16 MiB and a little over
)

var bufferPools [classes]sync.Pool

// buffer is pooled memory for received data. b has the length that was asked
// for; its capacity is what it costs.
type buffer struct {
	b     []byte
	class int
}

// sizeClass returns the class of n bytes and the bytes that it has.
func sizeClass(n int) (class, size int) {
	pages := max(1, (n+page-1)>>pageBits)
	if pages <= 4 {
		return pages - 1, pages << pageBits
	}
	// pages-1 lies in [2^k, 2^(k+1)); its two bits below the top one are the step.
	k := bits.Len(uint(pages-1)) - 1
	step := (pages - 1) >> (k - 2) & 3
	class = 4*(k-1) + step
	return class, (4 + step + 1) << (k - 2) << pageBits
}

// bufferCost is what a buffer for n bytes counts against the memory.
func bufferCost(n int) int64 {
	_, size := sizeClass(n)
	return int64(size)
}

// newBuffer returns a buffer of n bytes with any content.
func newBuffer(n int) *buffer {
	class, size := sizeClass(n)
	if class >= classes { // nothing that is pooled is this large
		return &buffer{b: make([]byte, n), class: class}
	}
	if buf, ok := bufferPools[class].Get().(*buffer); ok {
		buf.b = buf.b[:n]
		return buf
	}
	// The runtime aligns what is a multiple of a page to a page.
	return &buffer{b: make([]byte, size)[:n], class: class}
}

// free gives it back. Nobody may use it any more.
func (buf *buffer) free() {
	if buf != nil && buf.class < classes {
		bufferPools[buf.class].Put(buf)
	}
}
