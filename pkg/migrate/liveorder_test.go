package migrate

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// newLiveTestOrder is an order for 8 blocks of 4 KiB.
func newLiveTestOrder() (*order, *dirt) {
	geo := geometry{size: 8 * 4096, blockSize: 4096, blocks: 8}
	d := newDirt(geo)
	return newLiveOrder(geo, d, make(chan struct{}, 1)), d
}

// takeRuns takes the background's runs, in order, until there are none.
func takeRuns(o *order) (runs []span) {
	for {
		b, _, ok := o.peekBulk()
		if !ok {
			return runs
		}
		s, ok := o.takeBulk(b, 8)
		if !ok {
			return runs
		}
		runs = append(runs, s)
	}
}

// Trap M13: what is dirty and may be at the destination is not sent, neither by
// the background, in the middle of a run, nor for somebody who asks, until the
// destination has forgotten it.
func TestBlockThatMayBeHeldIsListedBeforeItIsSent(t *testing.T) {
	t.Run("before the claims are in", func(t *testing.T) {
		o, d := newLiveTestOrder()
		d.mark(2*4096, 2*4096)
		require.Equal(t, []span{{0, 2}, {4, 8}}, takeRuns(o))
		require.Equal(t, int64(2), d.count.Load(), "not sent, so not clean")
		require.Equal(t, []uint32{2, 3}, o.collect(false))
	})
	t.Run("claimed", func(t *testing.T) {
		o, d := newLiveTestOrder()
		d.mark(2*4096, 4096)
		o.drop(0, 6*4096)
		o.learned()
		require.Equal(t, []span{{6, 8}}, takeRuns(o))
		o.ask(2*4096, 4096)
		_, ok := o.nextUrgent(8)
		require.False(t, ok, "also when somebody waits for it")
		require.True(t, o.takeAsked(), "who is told of it")
		list := o.collect(true)
		require.Equal(t, []uint32{2}, list)
		o.listed(list)
		s, ok := o.nextUrgent(8)
		require.True(t, ok)
		require.Equal(t, span{2, 3}, s)
		require.Zero(t, d.count.Load(), "clean, before it is read")
	})
	t.Run("known not to be there", func(t *testing.T) {
		o, d := newLiveTestOrder()
		d.mark(2*4096, 4096)
		o.learned()
		require.Equal(t, []span{{0, 8}}, takeRuns(o))
		require.Zero(t, d.count.Load())
	})
}

// A block that becomes dirty between the look whether it is stale and its being
// taken is sent over itself, which cannot be helped. It stays dirty: what was
// sent does not count.
func TestBlockThatBecameStaleAsItWasTakenStaysDirty(t *testing.T) {
	o, d := newLiveTestOrder()
	o.drop(0, 8*4096)
	o.learned()
	d.mark(2*4096, 4096)
	o.live.take(0, 8)
	require.True(t, d.get(2))
	require.Equal(t, []uint32{2}, o.collect(false))
}

// Trap M12: a block that is in flight is in no list, whoever asks for it; it is in
// the next one when it has landed.
func TestBlockInFlightIsInNoList(t *testing.T) {
	o, d := newLiveTestOrder()
	o.learned()
	require.Equal(t, []span{{0, 8}}, takeRuns(o))
	d.mark(2*4096, 4096)
	o.ask(2*4096, 4096)
	require.Empty(t, o.collect(false))
	require.Empty(t, o.collect(true))
	o.done(span{0, 8})
	require.Equal(t, []uint32{2}, o.collect(false))
}
