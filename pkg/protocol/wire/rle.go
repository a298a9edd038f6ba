package wire

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// Token is one step of run-length data: literal bytes, or a run of one byte.
type Token struct {
	Literal []byte // aliases the packet; nil for a run
	Run     int64  // length of the run in bytes
	Value   byte   // the byte that is repeated
}

// Len is the number of bytes that the token stands for.
func (t Token) Len() int64 {
	if t.Literal != nil {
		return int64(len(t.Literal))
	}
	return t.Run
}

// RLE walks through run-length data without expanding it, so that a run costs
// no memory, however long.
type RLE struct {
	b    []byte
	left int64
	err  error
}

// NewRLE walks through tokens, which may stand for at most limit bytes.
func NewRLE(tokens []byte, limit int64) RLE {
	return RLE{b: tokens, left: limit}
}

// Next returns the next token, or false at the end or at the first error.
func (r *RLE) Next() (Token, bool) {
	if len(r.b) == 0 || r.err != nil {
		return Token{}, false
	}
	t, n := binary.Uvarint(r.b)
	if n == 0 {
		return r.fail(fmt.Errorf("%w: a run-length token is cut off", ErrShort))
	}
	if n < 0 {
		return r.fail(fmt.Errorf("%w: a run-length token of more than 64 bits", ErrTooLarge))
	}
	r.b = r.b[n:]
	length := t >> 1
	if length > uint64(r.left) {
		return r.fail(fmt.Errorf("%w: run-length data stands for more bytes than it may", ErrTooLarge))
	}
	if t&1 == 0 {
		if length > uint64(len(r.b)) {
			return r.fail(fmt.Errorf("%w: run-length literal is cut off", ErrShort))
		}
		lit := r.b[:length:length]
		r.b = r.b[length:]
		r.left -= int64(length)
		return Token{Literal: lit}, true
	}
	if len(r.b) == 0 {
		return r.fail(fmt.Errorf("%w: run without its byte", ErrShort))
	}
	v := r.b[0]
	r.b = r.b[1:]
	r.left -= int64(length)
	return Token{Run: int64(length), Value: v}, true
}

func (r *RLE) fail(err error) (Token, bool) {
	r.err = err
	return Token{}, false
}

// Err says why Next stopped before the end, if it did.
func (r *RLE) Err() error {
	return r.err
}

// RLELen checks tokens from end to end and returns how many bytes they stand
// for, at most limit.
func RLELen(tokens []byte, limit int64) (int64, error) {
	r := NewRLE(tokens, limit)
	for {
		if _, ok := r.Next(); !ok {
			return limit - r.left, r.err
		}
	}
}

// ExpandRLE appends the bytes that tokens stand for, at most limit, to dst.
func ExpandRLE(dst, tokens []byte, limit int64) ([]byte, error) {
	if _, err := RLELen(tokens, limit); err != nil { // before anything is allocated
		return dst, err
	}
	r := NewRLE(tokens, limit)
	for {
		t, ok := r.Next()
		if !ok {
			return dst, r.err
		}
		if t.Literal != nil {
			dst = append(dst, t.Literal...)
			continue
		}
		start := len(dst)
		dst = append(dst, make([]byte, t.Run)...)
		Fill(dst[start:], t.Value)
	}
}

// Fill sets every byte of p to v.
func Fill(p []byte, v byte) {
	if v == 0 {
		clear(p)
		return
	}
	if len(p) == 0 {
		return
	}
	p[0] = v
	for n := 1; n < len(p); n *= 2 {
		copy(p[n:], p[:n])
	}
}

// minRun is the shortest run that Silo writes as one; at the very end of the
// data it wants a byte more.
const minRun = 4

// AppendRLE appends the tokens that Silo writes for p.
func AppendRLE(b, p []byte) []byte {
	lit := 0 // where the literal bytes not yet written start
	for i := 0; i < len(p); {
		n := runLen(p[i:])
		if n < minRun || n == minRun && i+n == len(p) {
			i += n
			continue
		}
		b = appendLiteral(b, p[lit:i])
		b = binary.AppendUvarint(b, uint64(n)<<1|1)
		b = append(b, p[i])
		i += n
		lit = i
	}
	return appendLiteral(b, p[lit:])
}

func appendLiteral(b, p []byte) []byte {
	if len(p) == 0 {
		return b
	}
	b = binary.AppendUvarint(b, uint64(len(p))<<1)
	return append(b, p...)
}

// runLen is how often the first byte of p is repeated at its start.
func runLen(p []byte) int {
	n := 1
	for n < len(p) && p[n] == p[0] {
		n++
		if n == 64 { // long runs at the speed of memory: p equals itself moved by one
			for n+64 <= len(p) && bytes.Equal(p[n:n+64], p[n-64:n]) {
				n += 64
			}
		}
	}
	return n
}
