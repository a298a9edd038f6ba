package nbdexport

import (
	"math/bits"
	"sync"
)

// Buffers come in powers of two, from 4 KiB to maxPayload.
const (
	minBufferShift = 12
	maxBufferShift = 25
)

// buffer is pooled memory; b is all of it.
type buffer struct {
	b     []byte
	class int
}

var bufferPools [maxBufferShift - minBufferShift + 1]sync.Pool

func bufferClass(n int) int {
	if n <= 1<<minBufferShift {
		return 0
	}
	return bits.Len(uint(n-1)) - minBufferShift
}

// bufferSize is what a buffer for n bytes takes. n is at most maxPayload.
func bufferSize(n int) int { return 1 << (minBufferShift + bufferClass(n)) }

// newBuffer is a buffer of at least n bytes, with whatever was in it before.
func newBuffer(n int) *buffer {
	class := bufferClass(n)
	if b, is := bufferPools[class].Get().(*buffer); is {
		return b
	}
	return &buffer{b: make([]byte, 1<<(minBufferShift+class)), class: class}
}

func (b *buffer) free() { bufferPools[b.class].Put(b) }
