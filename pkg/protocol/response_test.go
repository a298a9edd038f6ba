package protocol

import (
	"context"
	"errors"
	"io"
	"math"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// P3: a response that belongs to nothing completes nothing and does no harm.
func TestStrayResponsesAreIgnored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, p, _ := source(t)
		to := NewToProtocol(8192, 1, p)
		require.NoError(t, to.SendDevInfo("d", 4096, ""))
		c := newCompletion()
		require.NoError(t, to.StartWrite(PriorityUrgent, fill(4096, 1), 0, c))
		require.Equal(t, uint32(1), raw.next().id)
		require.Equal(t, uint32(2), raw.next().id)
		raw.mustSend(1, 99, written(4096))                                     // never asked
		raw.mustSend(2, 2, written(4096))                                      // another device
		raw.mustSend(1, 0, written(4096))                                      // no id
		raw.mustSend(1, 1, []byte{0x85})                                       // DevInfo has no answer
		raw.mustSend(1, 66, cat([]byte{0x81}, le32(100_000), fill(100000, 1))) // with much data
		synctest.Wait()
		require.Empty(t, c)
		raw.mustSend(1, 2, written(4096))
		require.NoError(t, <-c)
		raw.mustSend(1, 2, []byte{0x84}) // twice
		synctest.Wait()
		require.Empty(t, c)
		require.NoError(t, p.Err())
		require.Equal(t, Stats{StrayResponses: 6}, p.Stats())
	})
}

// A response of another kind than its request, or one that claims more than was
// asked for, says that the peer is confused: the waiter gets the connection's end.
func TestResponsesThatCannotBeEndTheConnection(t *testing.T) {
	for name, body := range map[string][]byte{
		"of a read":            cat([]byte{0x81}, le32(0)),
		"of an event":          {0x85},
		"of a DevInfo":         {0xfd, 1, 0, 4, 0, 1, 0, 0, 0},
		"more than was sent":   written(4097),
		"2^32-1":               written(math.MaxUint32),
		"short":                {0x83, 0},
		"long":                 append(written(4096), 0),
		"error with more":      {0x84, 0},
		"far too long a count": cat([]byte{0x83}, fill(40, 0)),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				raw, p, ended := source(t)
				to := NewToProtocol(8192, 1, p)
				require.NoError(t, to.SendDevInfo("d", 4096, ""))
				c := newCompletion()
				require.NoError(t, to.StartWrite(PriorityUrgent, fill(4096, 1), 0, c))
				raw.mustSend(1, 2, body)
				err := <-c
				require.Error(t, err)
				require.Equal(t, <-ended, err, "everybody hears the same")
				require.ErrorContains(t, err, "device 1")
			})
		})
	}
}

// A short answer and an error are the peer's no; the connection lives.
func TestAShortAnswerIsAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, p, _ := source(t)
		to := NewToProtocol(1<<20, 1, p)
		require.NoError(t, to.SendDevInfo("d", 4096, ""))
		raw.next()
		answer := func(body []byte) { p := raw.next(); raw.mustSend(p.dev, p.id, body) }

		for _, v := range []struct {
			body []byte
			done int64
		}{{written(4095), 4095}, {written(0), 0}, {[]byte{0x84}, 0}} {
			go answer(v.body)
			n, err := to.WriteAt(fill(4096, 1), 8192)
			remote, ok := errors.AsType[*RemoteError](err)
			require.True(t, ok, "%v", err)
			require.Zero(t, n)
			require.Equal(t, RemoteError{Op: "write", Off: 8192, Len: 4096, Done: v.done}, *remote)
			require.ErrorContains(t, err, "8192")
		}

		go answer(cat([]byte{0x81}, le32(2), []byte{5, 6, 0, 0})) // Silo sends its whole buffer
		b := fill(4, 0xee)
		n, err := to.ReadAt(b, 0)
		require.Equal(t, 2, n)
		require.Equal(t, []byte{5, 6, 0xee, 0xee}, b)
		_, ok := errors.AsType[*RemoteError](err)
		require.True(t, ok)

		go answer([]byte{0x82})
		_, err = to.ReadAt(b, 0)
		_, ok = errors.AsType[*RemoteError](err)
		require.True(t, ok)

		go answer(written(1 << 16))
		require.NoError(t, to.ZeroAt(0, 1<<16, true))
		require.NoError(t, p.Err())
	})
}

// A read's answer with more than was asked for ends the connection before it is
// kept.
func TestAReadAnswerLongerThanAskedEndsTheConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, p, _ := source(t)
		to := NewToProtocol(1<<20, 1, p)
		require.NoError(t, to.SendDevInfo("d", 4096, ""))
		go func() {
			raw.next()
			raw.next()
			_ = raw.send(1, 2, cat([]byte{0x81}, le32(4), fill(5, 1))) // it is not read to its end
		}()
		_, err := to.ReadAt(make([]byte, 4), 0)
		require.ErrorIs(t, err, ErrUnexpected)
		require.ErrorIs(t, p.Err(), ErrUnexpected)
	})
}

// The answer to a waiter that has given up may come late.
func TestALateAnswerAfterTheWaiterLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, p, _ := source(t)
		to := NewToProtocol(4096, 1, p)
		require.NoError(t, to.SendDevInfo("d", 4096, ""))
		why := errors.New("had enough")
		ctx, cancel := context.WithCancelCause(t.Context())
		done := make(chan error, 1)
		go func() { done <- to.SendEvent(ctx, &wire.Event{Type: wire.EventPreLock}) }()
		synctest.Wait()
		require.Empty(t, done)
		require.Equal(t, 1, p.Stats().Unanswered)
		cancel(why)
		require.ErrorIs(t, <-done, why)
		require.Zero(t, p.Stats().Unanswered, "forgotten on the way out")
		raw.mustSend(1, 2, []byte{0x85})
		synctest.Wait()
		require.NoError(t, p.Err())
		require.ErrorIs(t, to.SendEvent(ctx, &wire.Event{}), why, "a dead context sends nothing")
		synctest.Wait()
		require.Len(t, raw.got, 2)
	})
}

// Transaction ids: never 0, passed over when the counter wraps.
func TestTransactionIDsWrapPastZero(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, p, _ := source(t)
		to := NewToProtocol(4096, 1, p)
		p.calls.last = math.MaxUint32 - 2
		require.NoError(t, to.SendDevInfo("d", 4096, ""))
		c := [4]completion{}
		for i := range c {
			c[i] = newCompletion()
			require.NoError(t, to.StartWrite(PriorityBulk, fill(1, 1), 0, c[i]))
		}
		require.Equal(t, uint32(math.MaxUint32-1), raw.next().id)
		for i, id := range []uint32{math.MaxUint32, 1, 2, 3} {
			require.Equal(t, id, raw.next().id)
			raw.mustSend(1, id, written(1))
			require.NoError(t, <-c[i])
		}
	})
}

// An id that is still waiting is not given out again.
func TestABusyTransactionIDIsPassedOver(t *testing.T) {
	var cs calls
	old, err := cs.add(call{dev: 1, done: ignored{}})
	require.NoError(t, err)
	seen := map[uint32]bool{old: true}
	for range 3 * 64 {
		id, err := cs.add(call{dev: 1, done: ignored{}})
		require.NoError(t, err)
		require.NotEqual(t, old%64, id%64, "its slot is taken")
		require.False(t, seen[id])
		seen[id] = true
		_, ok := cs.take(1, id)
		require.True(t, ok)
	}
	_, ok := cs.take(1, old)
	require.True(t, ok, "and the old one is still there")
	open := make([]uint32, 1000)
	for i := range open {
		open[i], err = cs.add(call{dev: 2, off: int64(i), done: ignored{}})
		require.NoError(t, err)
	}
	for i, id := range open {
		c, ok := cs.take(2, id)
		require.True(t, ok)
		require.Equal(t, int64(i), c.off)
	}
	require.Zero(t, cs.len())
}

// ToProtocol as a store: what does not lie in the device is refused here.
func TestToProtocolChecksItsRanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, dst := pair(t, nil)
		store := sources.NewMemoryStorage(8192)
		NewFromProtocol(1, keep(store), dst)
		to := NewToProtocol(8192, 1, src)
		require.NoError(t, to.SendDevInfo("d", 4096, ""))
		_, err := to.WriteAt(fill(2, 1), 8191)
		require.ErrorIs(t, err, storage.ErrOutOfRange)
		_, err = to.WriteAt(fill(2, 1), -1)
		require.ErrorIs(t, err, storage.ErrOutOfRange)
		require.ErrorIs(t, to.ZeroAt(8000, 193, false), storage.ErrOutOfRange)
		require.ErrorIs(t, to.StartWrite(PriorityBulk, fill(2, 1), 8191, ignored{}), storage.ErrOutOfRange)
		require.Error(t, to.StartWrite(PriorityBulk, nil, 0, ignored{}))
		require.Error(t, to.StartZero(PriorityBulk, 0, 0, ignored{}))
		_, err = to.ReadAt(make([]byte, 1), -1)
		require.ErrorIs(t, err, storage.ErrOutOfRange)
		n, err := to.ReadAt(make([]byte, 1), 8192)
		require.Equal(t, io.EOF, err)
		require.Zero(t, n)

		n, err = to.WriteAt(nil, 0)
		require.NoError(t, err)
		require.Zero(t, n)
		n, err = to.WriteAt([]byte("tail"), 8188)
		require.NoError(t, err)
		require.Equal(t, 4, n)
		b := make([]byte, 8)
		n, err = to.ReadAt(b, 8188)
		require.Equal(t, io.EOF, err)
		require.Equal(t, "tail", string(b[:n]))
		require.NoError(t, to.ZeroAt(8188, 4, false))
		require.Equal(t, make([]byte, 8192), content(t, store))
		require.Equal(t, uint64(8192), to.Size())
		require.ErrorIs(t, to.Flush(), errors.ErrUnsupported, "the protocol knows no flush, and says so")
		require.NoError(t, to.Close())
		require.NoError(t, src.Err())
	})
}
