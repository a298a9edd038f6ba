package protocol

import (
	"fmt"
	"io"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// zeroes is written where a store cannot make zeroes itself.
var zeroes [chunk]byte

// zeroRun says that the tokens are one run of zeroes, which is never expanded.
func zeroRun(tokens []byte) bool {
	r := wire.NewRLE(tokens, wire.MaxRunLength)
	t, ok := r.Next()
	if !ok || t.Literal != nil || t.Value != 0 {
		return false
	}
	_, more := r.Next()
	return !more
}

// writeRunLength applies run-length data piece by piece, so that what it stands
// for never lies in memory whole. A piece ends on a block, or a store that takes
// whole blocks only would see parts of one. Zeroes that fill whole pieces, or
// that reach to the end, go to the store as what they are.
func (in *incoming) writeRunLength(j *job) error {
	size := in.pieceSize()
	a := runLength{in: in, rle: wire.NewRLE(j.tokens, j.length), off: j.off, end: j.off + j.length, piece: size}
	defer a.free()
	for {
		t, ok := a.rle.Next()
		if !ok {
			break
		}
		if err := a.apply(t); err != nil {
			return err
		}
	}
	if err := a.rle.Err(); err != nil {
		return err
	}
	return a.flush()
}

// pieceSize is how many bytes are expanded at a time: whole blocks, about chunk.
func (in *incoming) pieceSize() int64 {
	block := int64(in.block)
	if block <= 0 || block > maxData {
		return chunk
	}
	return max(block, chunk/block*block)
}

// runLength is the state of one writeRunLength.
type runLength struct {
	in    *incoming
	rle   wire.RLE
	buf   *buffer // the piece that is being filled, from off on
	n     int64   // bytes of buf that are filled
	off   int64
	end   int64
	piece int64
}

func (a *runLength) free() {
	a.buf.free()
	a.buf = nil
}

// room is how many bytes the piece at off has in all.
func (a *runLength) room() int64 {
	return min(a.end, (a.off/a.piece+1)*a.piece) - a.off
}

func (a *runLength) apply(t wire.Token) error {
	left := t.Len()
	for left > 0 {
		if t.Literal == nil && t.Value == 0 && a.n == 0 && left >= a.room() {
			n := left
			if a.off+n < a.end {
				n = (a.off+n)/a.piece*a.piece - a.off
			}
			if err := a.zero(n); err != nil {
				return err
			}
			left -= n
			continue
		}
		if a.buf == nil {
			a.buf = newBuffer(int(min(a.piece, a.end-a.off)))
		}
		n := min(left, a.room()-a.n)
		dst := a.buf.b[a.n : a.n+n]
		if t.Literal != nil {
			start := t.Len() - left
			copy(dst, t.Literal[start:start+n])
		} else {
			wire.Fill(dst, t.Value)
		}
		a.n += n
		left -= n
		if a.n == a.room() {
			if err := a.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

// flush writes what is filled.
func (a *runLength) flush() error {
	if a.n == 0 {
		return nil
	}
	if err := a.write(a.buf.b[:a.n]); err != nil {
		return err
	}
	a.n = 0
	return nil
}

// zero makes n bytes from off on zero.
func (a *runLength) zero(n int64) error {
	if z := a.in.zeroer; z != nil {
		if err := z.ZeroAt(a.off, n, true); err != nil {
			return fmt.Errorf("zero %d bytes at %d: %w", n, a.off, err)
		}
		a.off += n
		return nil
	}
	for end := a.off + n; a.off < end; {
		if err := a.write(zeroes[:min(end-a.off, a.room(), chunk)]); err != nil {
			return err
		}
	}
	return nil
}

func (a *runLength) write(b []byte) error {
	n, err := a.in.store.WriteAt(b, a.off)
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("write %d bytes at %d: %w", len(b), a.off, err)
	}
	a.off += int64(len(b))
	return nil
}
