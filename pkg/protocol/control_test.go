package protocol

import (
	"errors"
	"io"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// lists is a store that keeps what the lists said.
type lists struct {
	discard
	dirty  [][]uint32
	hashes []int
	event  wire.Event
}

func (l *lists) HandleDirtyList(_ uint32, blocks []uint32) error {
	l.dirty = append(l.dirty, blocks)
	return nil
}

func (l *lists) HandleHashes(hashes []wire.Hash) error {
	l.hashes = append(l.hashes, len(hashes))
	return nil
}

func (l *lists) HandleEvent(ev *wire.Event, answer func(error)) {
	l.event = *ev
	answer(nil)
}

// Lists of any length arrive whole, in several packets, and an empty one arrives
// too.
func TestLongListsGoAsSeveralPackets(t *testing.T) {
	const blocks = 5 << 19
	store := &lists{discard: discard{size: 4096 * blocks}}
	src, dst := pair(t, nil)
	NewFromProtocol(1, keep(store), dst)
	to := NewToProtocol(store.size, 1, src)
	require.NoError(t, to.SendDevInfo("d", 4096, ""))
	list := make([]uint32, blocks)
	for i := range list {
		list[i] = uint32(blocks - 1 - i)
	}
	require.NoError(t, to.SendDirtyList(t.Context(), 4096, list))
	require.Len(t, store.dirty, 3)
	var got []uint32
	for _, part := range store.dirty {
		got = append(got, part...)
	}
	require.Equal(t, list, got)
	require.NoError(t, to.SendDirtyList(t.Context(), 4096, nil))
	require.Len(t, store.dirty, 4)

	require.NoError(t, to.SendHashes(t.Context(), make([]wire.Hash, maxHashes+1)))
	require.NoError(t, to.SendHashes(t.Context(), nil))
	require.Equal(t, []int{maxHashes, 1, 0}, store.hashes)

	custom := wire.Event{Type: wire.EventCustom, CustomType: 7, Payload: fill(40_000, 9)}
	require.NoError(t, to.SendEvent(t.Context(), &custom))
	require.Equal(t, custom, store.event)
	custom.Payload = fill(maxEvent, 9)
	require.ErrorIs(t, to.SendEvent(t.Context(), &custom), wire.ErrTooLarge)
	require.ErrorIs(t, to.SendEvent(t.Context(), &wire.Event{Type: 9}), wire.ErrInvalid)
	require.Zero(t, dst.Stats().Received)
	require.NoError(t, to.RemoveDev()) // has no answer to wait for
	require.NoError(t, dst.Err())
}

// unreadable is a store that cannot be read, or only in part.
type unreadable struct {
	*sources.MemoryStorage
	n   int
	err error
}

func (u *unreadable) ReadAt([]byte, int64) (int, error) { return u.n, u.err }

// A read that the store cannot do whole is answered with an error, never with
// bytes that are not the disk's.
func TestAFailedReadIsAnErrorAnswer(t *testing.T) {
	store := &unreadable{MemoryStorage: sources.NewMemoryStorage(8192)}
	raw, p, _ := destination(t, store)
	raw.mustSend(1, 1, devInfo(8192, 4096))
	for i, v := range []struct {
		n   int
		err error
	}{{0, errors.New("broken")}, {100, io.ErrUnexpectedEOF}, {4096, errors.New("broken")}, {100, nil}} {
		store.n, store.err = v.n, v.err
		raw.mustSend(1, uint32(i)+2, ranged(1, 0, 4096))
		raw.expect(1, uint32(i)+2, []byte{0x82})
	}
	store.n, store.err = 4096, io.EOF
	raw.mustSend(1, 9, ranged(1, 4096, 4096))
	require.Equal(t, byte(0x81), raw.next().body[0])
	require.NoError(t, p.Err())
}
