package migrate

import (
	"bytes"
	"context"
	"encoding/hex"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// slowest is how long a block takes to land at the destinations of these tests.
const slowest = 300 * time.Millisecond

// plainMove is a live disk that moves to a plain Silo destination.
type plainMove struct {
	src         *Source
	to          *plainDestination
	wg          sync.WaitGroup
	srcErr, err error // read only after wg
}

func movePlain(t *testing.T, src *Source, to *plainDestination) *plainMove {
	t.Helper()
	a, b := net.Pipe()
	to.rawPeer, to.live = newRawPeer(b), true
	m := &plainMove{src: src, to: to}
	m.wg.Go(func() { m.err = to.run(); _ = b.Close() })
	m.wg.Go(func() { m.srcErr = src.Run(t.Context(), once(a)) })
	return m
}

// complete waits for the end, and says that the destination has want.
func (m *plainMove) complete(t *testing.T, want []byte) {
	t.Helper()
	m.wg.Wait()
	require.NoError(t, m.srcErr)
	require.NoError(t, m.err)
	require.True(t, m.to.device().completed)
	require.True(t, bytes.Equal(want, m.to.device().data), "what was written last is there")
}

// Trap M12 at its worst: of a disk hardly anything was sent, so no list of what is
// old would come that is answered behind it, when a block that is on its way is
// written to and the disk is handed off. The old block lands first.
func TestHandoffWaitsForABlockInFlight(t *testing.T) {
	const block = 4096
	begin := func(t *testing.T) (tr *Tracker, src *Source, want []byte) {
		store, want := testDisk(t, 16*block, 1)
		tr = newTracker(t, store)
		src = newSource(t, SourceOptions{BlockSize: block, Rate: block}, SourceDisk{Name: "disk", Live: tr})
		src.Pause() // until the connection stands
		return tr, src, want
	}
	// change writes over all blocks, and hands off while one of them is in flight.
	change := func(t *testing.T, tr *Tracker, src *Source, want []byte) {
		require.False(t, src.disks[0].order.landed(), "a block is in flight")
		record(want, 1)
		_, err := tr.WriteAt(want, 0)
		require.NoError(t, err)
		require.NoError(t, src.Handoff(t.Context()))
	}
	t.Run("ours", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			tr, src, want := begin(t)
			m := migrate(t, src, newDestination(t, DestinationOptions{}, func(_ string, size uint64) storage.StorageProvider {
				return &slowDest{sources.NewMemoryStorage(int(size))}
			}), newWires())
			<-m.dst.ready
			<-time.After(time.Second)
			src.Resume()
			<-time.After(slowest / 2)
			change(t, tr, src, want)
			require.Equal(t, []error{nil, nil}, m.end())
			require.True(t, bytes.Equal(want, contents(t, m.dst.disks["disk"])), "what was written last is there")
			require.NoError(t, m.dst.Close())
		})
	})
	t.Run("a plain Silo", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			tr, src, want := begin(t)
			m := movePlain(t, src, &plainDestination{slow: slowest})
			<-time.After(time.Second) // the first blocks are on their way
			src.Resume()
			<-time.After(slowest / 2)
			change(t, tr, src, want)
			m.complete(t, want)
		})
	})
}

// Trap M2 to the end: a write that was let in before the handoff is done, flushed
// and announced as dirty before the destination hears that it is locked; one that
// came later waits, and is refused then.
func TestPostLockWaitsForWritesInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const block = 4096
		memory0, want := testDisk(t, 16*block, 1)
		late := &lateWrites{StorageProvider: memory0, begun: make(chan struct{}), letGo: make(chan struct{})}
		tr := newTracker(t, late)
		src := newSource(t, SourceOptions{BlockSize: block}, SourceDisk{Name: "disk", Live: tr})
		m := movePlain(t, src, &plainDestination{slow: time.Millisecond})
		<-time.After(2 * time.Second)
		require.Len(t, m.to.device().held, 16)
		record(want[3*block:4*block], 1)
		wrote, refused := make(chan error, 1), make(chan error, 1)
		m.wg.Go(func() { _, err := tr.WriteAt(want[3*block:4*block], 3*block); wrote <- err })
		<-late.begun
		handed := make(chan error, 1)
		m.wg.Go(func() { handed <- src.Handoff(t.Context()) })
		<-time.After(time.Second)
		require.True(t, m.to.told(wire.EventPreLock))
		require.False(t, m.to.told(wire.EventPostLock), "a write is under way")
		require.False(t, src.HandedOff())
		m.wg.Go(func() { _, err := tr.WriteAt(make([]byte, block), 0); refused <- err })
		synctest.Wait()
		close(late.letGo)
		require.NoError(t, <-wrote, "the one that was let in")
		require.NoError(t, <-handed)
		require.ErrorIs(t, <-refused, ErrHandedOff, "the one that came later")
		m.complete(t, want)
	})
}

// Trap M13 in the letter: a block that is written to again and again is never
// sent over itself, also if it becomes dirty while it is read. So the
// destination takes every block that comes.
func TestNoBlockIsSentOverItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const block = 4096
		memory0, data := testDisk(t, 64*block, 1)
		store := &slowReads{memory0}
		tr := newTracker(t, store)
		src := newSource(t, SourceOptions{BlockSize: block}, SourceDisk{Name: "disk", Live: tr})
		m := movePlain(t, src, &plainDestination{slow: 3 * time.Millisecond})
		w := &steadyWriter{want: bytes.Clone(data)}
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		m.wg.Go(func() { // until the handoff
			w.run(t, ctx, tr, func() blockDevice { stop(); return tr }, 2*time.Millisecond)
		})
		<-time.After(20 * time.Second)
		require.Greater(t, src.Status()[0].Pass, 2)
		require.NoError(t, src.Handoff(t.Context()))
		m.complete(t, w.want)
		require.Greater(t, src.Status()[0].BytesSent, int64(2*len(data)), "blocks were sent more than once")
		require.Zero(t, m.to.device().again, "blocks were sent over themselves")
	})
}

// What is not dirty is what has not changed since it was sent, whoever it was
// sent to; what a plain Silo holds it does not say. So all that is dirty is taken
// back first, also on the first pass of a connection.
func TestPlainDestinationThatKeepsItsBlocksForgetsFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const block = 4096
		store, want := testDisk(t, 16*block, 1)
		tr := newTracker(t, store)
		src := newSource(t, SourceOptions{BlockSize: block, Listening: true}, SourceDisk{Name: "disk", Live: tr})
		a, b := net.Pipe()
		first := &plainDestination{rawPeer: newRawPeer(b), live: true}
		var wg sync.WaitGroup
		wg.Go(func() { _ = first.run() }) // until it is cut
		connections := make(chan io.ReadWriteCloser, 1)
		connections <- a
		ended := make(chan error, 1)
		wg.Go(func() { ended <- src.Run(t.Context(), from(connections)) })
		<-time.After(3 * time.Second)
		require.Len(t, first.device().held, 16)
		require.NoError(t, b.Close())
		record(want[2*block:4*block], 1)
		_, err := tr.WriteAt(want[2*block:4*block], 2*block)
		require.NoError(t, err)

		c, d := net.Pipe()
		second := &plainDestination{rawPeer: newRawPeer(d), live: true, kept: first.device()}
		var peerErr error
		wg.Go(func() { peerErr = second.run(); _ = d.Close() })
		connections <- c
		<-time.After(3 * time.Second)
		require.True(t, bytes.Equal(want, second.device().data), "all of it is there")
		require.NoError(t, src.Handoff(t.Context()))
		require.NoError(t, <-ended)
		wg.Wait()
		require.NoError(t, peerErr)
		require.True(t, bytes.Equal(want, second.device().data))
	})
}

// slowReads is a disk that is written to while it is read.
type slowReads struct{ storage.StorageProvider }

func (s *slowReads) ReadAt(p []byte, off int64) (int, error) {
	<-time.After(5 * time.Millisecond)
	return s.StorageProvider.ReadAt(p, off)
}

// A plain Silo destination, which has no name, comes between two visits of one of
// ours. What was sent to it is not at the one that comes back, which claims what
// it has from before (trap D8).
func TestDestinationThatComesBackAfterAPlainOneIsNotTrusted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const block = 4096
		store, want := testDisk(t, 16*block, 1)
		tr := newTracker(t, store)
		src := newSource(t, SourceOptions{BlockSize: block, Listening: true}, SourceDisk{Name: "disk", Live: tr})
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		var wg sync.WaitGroup
		wires := newWires()
		wg.Go(func() { wires.plugLoop(ctx) })
		wg.Go(func() { _ = src.Run(ctx, from(wires.src)) })
		ours := newDestination(t, DestinationOptions{Listening: true}, memory)
		visit, leave := context.WithCancel(ctx)
		left := make(chan error, 1)
		wg.Go(func() { left <- ours.Run(visit, from(wires.dst)) })
		<-time.After(2 * time.Second)
		leave()
		require.Error(t, <-left)
		record(want[2*block:3*block], 1)
		_, err := tr.WriteAt(want[2*block:3*block], 2*block)
		require.NoError(t, err)

		var conn io.ReadWriteCloser
		select { // the one that ours has left was dialled again
		case conn = <-wires.dst:
		case <-time.After(time.Minute):
			t.Fatal("no connection")
		}
		plain := &plainDestination{rawPeer: newRawPeer(conn), live: true}
		wg.Go(func() { _ = plain.run() })        // until it is left
		<-time.After(greetTimeout + time.Second) // longer than one may take that says nothing
		require.Zero(t, src.Status()[0].DirtyBytes, "the block is clean again, for the plain one")
		require.True(t, bytes.Equal(want, plain.device().data))
		require.NoError(t, conn.Close())

		wg.Go(func() { left <- ours.Run(ctx, from(wires.dst)) })
		<-time.After(2 * time.Second)
		device := ours.all()[0].device
		require.NoError(t, src.HandoffTo(ctx, hex.EncodeToString(device[:])))
		require.NoError(t, <-left)
		require.True(t, bytes.Equal(want, contents(t, ours.disks["disk"])))
		stop()
		wg.Wait()
		require.NoError(t, ours.Close())
	})
}
