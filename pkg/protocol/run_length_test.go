package protocol

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// recorder notes in which pieces a store is written.
type recorder struct {
	*sources.MemoryStorage
	ops   []string
	block int64
	split int // pieces that end inside a block, but not at the packet's end
	end   int64
}

func (r *recorder) note(op string, off, n int64) {
	r.ops = append(r.ops, fmt.Sprintf("%s %d+%d", op, off, n))
	if (off+n)%r.block != 0 && off+n != r.end {
		r.split++
	}
}

func (r *recorder) WriteAt(p []byte, off int64) (int, error) {
	r.note("write", off, int64(len(p)))
	return r.MemoryStorage.WriteAt(p, off)
}

func (r *recorder) ZeroAt(off, n int64, punch bool) error {
	r.note("zero", off, n)
	return r.MemoryStorage.ZeroAt(off, n, punch)
}

// apply runs tokens over a store full of 0xee and returns what is there then.
func apply(t *testing.T, store storage.StorageProvider, block uint32, off int64, tokens []byte) []byte {
	t.Helper()
	n, err := wire.RLELen(tokens, wire.MaxRunLength)
	require.NoError(t, err)
	in := &incoming{store: store, block: block, size: store.Size()}
	in.zeroer, _ = store.(storage.Zeroer)
	require.NoError(t, in.writeRunLength(&job{off: off, length: n, tokens: tokens}))
	return content(t, store)
}

// Run-length data becomes what it stands for, whatever the pieces, on stores
// with and without zeroes of their own; and no block is cut.
func TestRunLengthDataIsAppliedInWholeBlocks(t *testing.T) {
	const size = 3 << 20
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range 18 {
		block := []int64{512, 4096, 65536, 3 << 19, 1 << 20, 2 << 20}[i%6]
		var tokens, want []byte
		off := rnd.Int64N(size / 4)
		if i%2 == 0 {
			off = off / block * block
		}
		for range rnd.IntN(8) {
			n := []int64{0, 1, 5, 511, 4096, block, 1 << 20, 1<<20 + 1, rnd.Int64N(1 << 21)}[rnd.IntN(9)]
			n = min(n, size-off-int64(len(want)))
			switch rnd.IntN(3) {
			case 0:
				v := byte(rnd.UintN(256))
				tokens = append(binary.AppendUvarint(tokens, uint64(n)<<1|1), v)
				want = append(want, fill(int(n), v)...)
			case 1:
				tokens = append(binary.AppendUvarint(tokens, uint64(n)<<1|1), 0)
				want = append(want, make([]byte, n)...)
			default:
				lit := make([]byte, n)
				for i := range lit {
					lit[i] = byte(rnd.UintN(256))
				}
				tokens = append(binary.AppendUvarint(tokens, uint64(n)<<1), lit...)
				want = append(want, lit...)
			}
		}
		model := fill(size, 0xee)
		copy(model[off:], want)
		for _, bare := range []bool{false, true} {
			r := &recorder{MemoryStorage: sources.NewMemoryStorage(size), block: block, end: off + int64(len(want))}
			_, err := r.MemoryStorage.WriteAt(fill(size, 0xee), 0)
			require.NoError(t, err)
			var store storage.StorageProvider = r
			if bare {
				store = plain{r}
			}
			got := apply(t, store, uint32(block), off, tokens)
			require.True(t, bytes.Equal(model, got), "round %d, block %d, at %d: %v", i, block, off, r.ops)
			if off%block == 0 && chunk%block == 0 {
				require.Zero(t, r.split, "block %d: %v", block, r.ops)
			}
		}
	}
}

// A run of zeroes is one call of a store that can make zeroes.
func TestAZeroRunIsOneCall(t *testing.T) {
	for _, off := range []int64{0, 4096, 1<<20 + 512} {
		tokens := append(binary.AppendUvarint(nil, (3<<20)<<1|1), 0)
		r := &recorder{MemoryStorage: sources.NewMemoryStorage(8 << 20), block: 4096}
		apply(t, r, 4096, off, tokens)
		require.Equal(t, []string{fmt.Sprintf("zero %d+%d", off, 3<<20)}, r.ops)
		require.True(t, zeroRun(tokens))
	}
	require.False(t, zeroRun(nil))
	require.False(t, zeroRun([]byte{9, 1}))
	require.False(t, zeroRun([]byte{2, 0}))
	require.False(t, zeroRun([]byte{9, 0, 9, 0}))
}

// From end to end: a hole of a gibibyte is a few bytes on the wire.
func TestAHoleTravelsAsAFewBytes(t *testing.T) {
	raw, p, _ := source(t)
	to := NewToProtocol(4<<30, 1, p)
	require.NoError(t, to.SendDevInfo("d", 65536, ""))
	raw.next()
	done := make(chan error, 1)
	go func() { done <- to.ZeroAt(65536, 2<<30, true) }()
	for i := range int64(2) {
		got := raw.next()
		require.Equal(t, cat([]byte{2, 2}, le64(65536+i<<30), []byte{0x81, 0x80, 0x80, 0x80, 0x08, 0}), got.body)
		raw.mustSend(1, got.id, written(1<<30))
	}
	require.NoError(t, <-done)
}

// Buffers begin on a page and cost at most a quarter more than they hold, from
// where pages are small beside it.
func TestBuffersArePagesAndCostLittle(t *testing.T) {
	last := 0
	for n := 0; n <= maxData+maxSmall; n += 1 + n/3 {
		class, size := sizeClass(n)
		require.GreaterOrEqual(t, size, n)
		require.Zero(t, size%page)
		require.Less(t, class, classes)
		require.GreaterOrEqual(t, class, last)
		last = class
		if n >= 16*page {
			require.LessOrEqual(t, size, n+n/4+page)
		}
		buf := newBuffer(n)
		require.Len(t, buf.b, n)
		require.Equal(t, size, cap(buf.b))
		if n > 0 {
			require.Zero(t, address(buf.b)%page, "%d bytes", n)
		}
		buf.free()
	}
	for n := 1; n <= 16<<20; n += page / 2 { // the class's size is the class's own
		class, size := sizeClass(n)
		again, same := sizeClass(size)
		require.Equal(t, class, again)
		require.Equal(t, size, same)
	}
	big := newBuffer(32 << 20)
	big.free()
	(*buffer)(nil).free()
}
