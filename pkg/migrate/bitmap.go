package migrate

import "math/bits"

// bitmap is a fixed number of bits, one a block. It has no lock of its own.
type bitmap struct {
	words []uint64
	n     int64 // bits
}

func newBitmap(n int64) bitmap {
	return bitmap{words: make([]uint64, (n+63)/64), n: n}
}

func (b bitmap) get(i int64) bool { return b.words[i>>6]&(1<<(i&63)) != 0 }

func (b bitmap) set(i int64) { b.words[i>>6] |= 1 << (i & 63) }

func (b bitmap) clear(i int64) { b.words[i>>6] &^= 1 << (i & 63) }

// setAll sets every bit.
func (b bitmap) setAll() {
	for i := range b.words {
		b.words[i] = ^uint64(0)
	}
	if tail := b.n & 63; tail != 0 {
		b.words[len(b.words)-1] = 1<<tail - 1
	}
}

// setRange sets [from, to).
func (b bitmap) setRange(from, to int64) {
	for from < to {
		mask, next := wordMask(from, to)
		b.words[from>>6] |= mask
		from = next
	}
}

// clearRange clears [from, to) and returns how many bits of it were set.
func (b bitmap) clearRange(from, to int64) (cleared int64) {
	for from < to {
		mask, next := wordMask(from, to)
		w := &b.words[from>>6]
		cleared += int64(bits.OnesCount64(*w & mask))
		*w &^= mask
		from = next
	}
	return cleared
}

// next returns the first set bit at or after from, or -1.
func (b bitmap) next(from int64) int64 { return b.nextIn(from, b.n) }

// nextIn returns the first set bit of [from, to), or -1; to is at most the number of bits.
func (b bitmap) nextIn(from, to int64) int64 {
	if from >= to {
		return -1
	}
	w := b.words[from>>6] &^ (1<<(from&63) - 1)
	for i := from >> 6; ; {
		if w != 0 {
			if at := i<<6 + int64(bits.TrailingZeros64(w)); at < to {
				return at
			}
			return -1
		}
		if i++; i<<6 >= to {
			return -1
		}
		w = b.words[i]
	}
}

// runEnd returns the end of the run of set bits that begins at from, at most
// limit.
func (b bitmap) runEnd(from, limit int64) int64 {
	limit = min(limit, b.n)
	for from < limit {
		w := ^b.words[from>>6] &^ (1<<(from&63) - 1)
		if w != 0 {
			return min(limit, from&^63+int64(bits.TrailingZeros64(w)))
		}
		from = from&^63 + 64
	}
	return limit
}

// wordMask is the part of [from, to) that lies in from's word, and where the
// next word begins.
func wordMask(from, to int64) (mask uint64, next int64) {
	next = min(from&^63+64, to)
	mask = ^uint64(0) << (from & 63)
	if end := next & 63; end != 0 {
		mask &= 1<<end - 1
	}
	return mask, next
}

// clone returns a copy.
func (b bitmap) clone() bitmap {
	return bitmap{words: append([]uint64(nil), b.words...), n: b.n}
}
