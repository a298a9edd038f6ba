package migrate

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// host is a destination's host: a disk and its map on a file system, and a process
// that may end and start again.
type host struct {
	resumable
	t   *testing.T
	log syncBuffer

	dst  *Destination
	dev  *lazy.Device
	stop context.CancelFunc
	done chan error
}

func newHost(t *testing.T) *host { return &host{t: t, resumable: newResumable(t)} }

// start starts the process with what lies there, and connects it.
func (h *host) start(ctx context.Context, c Connector) {
	h.t.Helper()
	ready := make(chan *lazy.Device, 1)
	dst, err := NewDestination(DestinationOptions{
		Disks: 1, Open: h.open, Log: slog.New(slog.NewTextHandler(&h.log, nil)),
		Ready: func(_ string, dev *lazy.Device) error { ready <- dev; return nil },
	})
	require.NoError(h.t, err)
	if _, err := os.Stat(h.mapPath); err == nil {
		h.resume(h.t, dst)
	}
	h.dst, h.done, h.dev = dst, make(chan error, 1), nil
	ctx, h.stop = context.WithCancel(ctx)
	go func() { h.done <- dst.Run(ctx, c) }()
	select {
	case h.dev = <-ready:
	case err := <-h.done: // it is refused
		h.done <- err
	}
}

// end ends the process in order.
func (h *host) end() {
	h.t.Helper()
	h.stop()
	<-h.done
	require.NoError(h.t, h.dst.Close())
}

// copy is a copy of the host's file system, or a snapshot of it.
func (h *host) copy() *host {
	h.t.Helper()
	c := newHost(h.t)
	h.copyTo(c)
	return c
}

func (h *host) copyTo(c *host) {
	h.t.Helper()
	for from, to := range map[string]string{h.disk: c.disk, h.mapPath: c.mapPath} {
		b, err := os.ReadFile(from)
		require.NoError(h.t, err)
		require.NoError(h.t, os.WriteFile(to, b, 0o600))
	}
}

func isLive(d *lazy.Device) bool {
	select {
	case <-d.Live():
		return true
	default:
		return false
	}
}

// move is a source that runs, and the network to it.
type move struct {
	t     *testing.T
	src   *Source
	log   syncBuffer
	wires *wires
	ctx   context.Context
	stop  context.CancelFunc
	wg    sync.WaitGroup
	done  chan error
}

func startMove(t *testing.T, o SourceOptions, disk SourceDisk) *move {
	t.Helper()
	return startMoveOver(t, newWires(), o, disk)
}

func startMoveOver(t *testing.T, w *wires, o SourceOptions, disk SourceDisk) *move {
	t.Helper()
	m := &move{t: t, wires: w, done: make(chan error, 1)}
	m.ctx, m.stop = context.WithCancel(t.Context())
	o.BlockSize, o.Listening, o.Log = 4096, true, slog.New(slog.NewTextHandler(&m.log, nil))
	m.src = newSource(t, o, disk)
	m.wg.Go(func() { m.wires.plugLoop(m.ctx) })
	m.wg.Go(func() { m.done <- m.src.Run(m.ctx, from(m.wires.src)) })
	return m
}

func (m *move) end() {
	m.stop()
	m.wg.Wait()
}

// settled waits until nothing is left to send.
func (m *move) settled() {
	m.t.Helper()
	for range 1000 {
		if s := m.src.Status()[0]; s.Connected && s.DirtyBytes == 0 && s.BytesDone == s.Size {
			return
		}
		<-time.After(100 * time.Millisecond)
	}
	m.t.Fatal("it does not settle")
}

var testID = Identity{UUID: [16]byte{5}, Generation: 1}

// TestAPlainPeerGetsNothingAfterAHandoff: it cannot show that it is the owner, and
// the source does not end as if all were there (fault A3, trap I3).
func TestAPlainPeerGetsNothingAfterAHandoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _ := testDisk(t, 64<<10, 1)
		tr, err := NewTracker(store, TrackerOptions{HandedOff: true, Owner: Device{1}})
		require.NoError(t, err)
		m := startMove(t, SourceOptions{}, SourceDisk{Name: "disk", Live: tr, Identity: testID})
		for range 3 {
			peer := &plainDestination{rawPeer: newRawPeer(<-m.wires.dst)}
			require.NoError(t, peer.run())
			require.Equal(t, make([]byte, 64<<10), peer.device().data)
			require.False(t, peer.device().completed)
		}
		require.Empty(t, m.done)
		require.Zero(t, m.src.Status()[0].BytesSent)
		require.Positive(t, m.log.count("is not its owner"))
		m.end()
	})
}

// TestASecondDestinationOfAFrozenMoveGetsNothing, whoever it is, and the source does
// not end; the first one goes on when it is back (fault A4, trap I3).
func TestASecondDestinationOfAFrozenMoveGetsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, want := testDisk(t, 1<<20, 1)
		m := startMove(t, SourceOptions{Rate: 256 << 10}, SourceDisk{Name: "disk", Store: store, Identity: testID})
		first, second := newHost(t), newHost(t)
		first.start(m.ctx, from(m.wires.dst))
		<-first.dev.Live()
		p := bytes.Repeat([]byte{0xAA}, 4096)
		_, err := first.dev.WriteAt(p, 0)
		require.NoError(t, err)
		copy(want, p)
		require.NoError(t, first.dev.Sync())
		first.end()
		synctest.Wait()
		sent := m.src.Status()[0].BytesSent

		second.start(m.ctx, from(m.wires.dst))
		require.Nil(t, second.dev)
		require.ErrorContains(t, <-second.done, "handed it off to another destination")
		second.close()
		peer := &plainDestination{rawPeer: newRawPeer(<-m.wires.dst)}
		require.NoError(t, peer.run())
		require.False(t, peer.device().completed)
		require.Equal(t, sent, m.src.Status()[0].BytesSent)
		require.Empty(t, m.done)

		first.start(m.ctx, from(m.wires.dst))
		require.NoError(t, <-m.done)
		require.NoError(t, <-first.done)
		first.close()
		m.end()
		got, err := os.ReadFile(first.disk)
		require.NoError(t, err)
		require.True(t, bytes.Equal(want, got))
	})
}

// close ends a process whose Run has ended.
func (h *host) close() {
	h.t.Helper()
	h.stop()
	require.NoError(h.t, h.dst.Close())
}

// TestWhatARolledBackDestinationHasIsNotTrusted: blocks that were taken back since,
// sent again and are clean, are claimed in their old version (fault A6, trap I5).
func TestWhatARolledBackDestinationHasIsNotTrusted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, want := testDisk(t, 1<<20, 1)
		tr := newTracker(t, store)
		m := startMove(t, SourceOptions{}, SourceDisk{Name: "disk", Live: tr, Identity: testID})
		h := newHost(t)
		h.start(m.ctx, from(m.wires.dst))
		m.settled()
		require.NoError(t, h.dev.Sync())
		snapshot := h.copy() // within a connection, so that only the steps tell
		p := bytes.Repeat([]byte{0x55}, 64<<10)
		copy(want[128<<10:], p)
		_, err := tr.WriteAt(p, 128<<10)
		require.NoError(t, err)
		<-time.After(time.Second)
		m.settled()
		h.end()
		snapshot.copyTo(h)
		h.start(m.ctx, from(m.wires.dst))
		<-time.After(time.Second)
		m.settled()
		require.NoError(t, m.src.Handoff(m.ctx))
		require.NoError(t, <-m.done)
		require.NoError(t, <-h.done)
		require.Positive(t, m.log.count("is not trusted, and is sent again"))
		h.close()
		m.end()
		got, err := os.ReadFile(h.disk)
		require.NoError(t, err)
		require.True(t, bytes.Equal(want, got))
	})
}

// cutAtPostLock breaks when a PostLock has been received and before its answer.
type cutAtPostLock struct {
	net.Conn
	on *atomic.Bool
}

func (c *cutAtPostLock) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if bytes.HasSuffix(p, []byte{byte(wire.CommandEvent), byte(wire.EventPostLock)}) && c.on.CompareAndSwap(true, false) {
		c.Close()
	}
	return n, err
}

// TestACopyOfADestinationIsNotTheOwner: the original has gone live since, and has
// writes that the copy does not know. Whenever it was made before the handoff, it
// gets nothing and does not go live; the original goes on (fault A6, trap I5).
func TestACopyOfADestinationIsNotTheOwner(t *testing.T) {
	for _, answered := range []bool{true, false} { // the PostLock
		t.Run(fmt.Sprintf("answered=%v", answered), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { copyIsNotOwner(t, answered) })
		})
	}
}

func copyIsNotOwner(t *testing.T, answered bool) {
	store, want := testDisk(t, 1<<20, 1)
	tr := newTracker(t, store)
	var cut atomic.Bool
	w := newWires()
	w.wrap = func(c net.Conn) io.ReadWriteCloser { return &cutAtPostLock{c, &cut} }
	m := startMoveOver(t, w, SourceOptions{Rate: 128 << 10}, SourceDisk{Name: "disk", Live: tr, Identity: testID})
	h := newHost(t)
	h.start(m.ctx, from(m.wires.dst))
	<-time.After(time.Second)
	require.NoError(t, h.dev.Sync())
	before := h.copy()
	cut.Store(!answered)
	handed := make(chan error, 1)
	m.wg.Go(func() { handed <- m.src.Handoff(m.ctx) })
	<-h.dev.Live()
	p := bytes.Repeat([]byte{0x77}, 4096)
	_, err := h.dev.WriteAt(p, 0)
	require.NoError(t, err)
	copy(want, p)
	require.NoError(t, h.dev.Sync())
	h.end()
	synctest.Wait()
	require.Equal(t, answered, len(handed) == 1)
	sent := m.src.Status()[0].BytesSent

	before.start(m.ctx, from(m.wires.dst))
	<-time.After(10 * time.Second)
	require.False(t, isLive(before.dev), "two owners")
	require.Positive(t, before.log.count("the source refuses this destination"))
	require.Positive(t, m.log.count("is not its owner"))
	before.end()
	require.Equal(t, sent, m.src.Status()[0].BytesSent)

	h.start(m.ctx, from(m.wires.dst))
	require.NoError(t, <-m.done)
	require.NoError(t, <-h.done)
	require.NoError(t, <-handed)
	h.close()
	m.end()
	got, err := os.ReadFile(h.disk)
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got))
}

// TestOfTwoCopiesOfALiveDestinationOneGetsTheRest: which of them is the owner is not
// known, but the source serves one of them only (trap I5).
func TestOfTwoCopiesOfALiveDestinationOneGetsTheRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, want := testDisk(t, 1<<20, 1)
		m := startMove(t, SourceOptions{Rate: 128 << 10}, SourceDisk{Name: "disk", Store: store, Identity: testID})
		h := newHost(t)
		h.start(m.ctx, from(m.wires.dst))
		<-h.dev.Live()
		<-time.After(time.Second)
		require.NoError(t, h.dev.Sync())
		other := h.copy()
		h.end()
		h.start(m.ctx, from(m.wires.dst)) // the first of them that is back
		<-time.After(time.Second)
		h.end()
		other.start(m.ctx, from(m.wires.dst))
		<-time.After(10 * time.Second)
		require.Positive(t, other.log.count("the source refuses this destination"))
		require.Empty(t, m.done)
		other.end()
		h.start(m.ctx, from(m.wires.dst))
		require.NoError(t, <-m.done)
		require.NoError(t, <-h.done)
		h.close()
		m.end()
		got, err := os.ReadFile(h.disk)
		require.NoError(t, err)
		require.True(t, bytes.Equal(want, got))
	})
}

// TestASourceWithoutIdentityIsAnotherDiskToTheNextOne: it cannot show that the
// contents are the same, so they are not (fault A8, traps I8 and D8).
func TestASourceWithoutIdentityIsAnotherDiskToTheNextOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one, _ := testDisk(t, 1<<20, 1)
		two, _ := testDisk(t, 1<<20, 2) // written since
		w := newWires()
		m := startMoveOver(t, w, SourceOptions{Rate: 256 << 10}, SourceDisk{Name: "disk", Store: one})
		h := newHost(t)
		h.start(t.Context(), from(w.dst))
		<-h.dev.Live()
		<-time.After(2 * time.Second)
		m.end()
		m = startMoveOver(t, w, SourceOptions{}, SourceDisk{Name: "disk", Store: two})
		<-time.After(time.Minute)
		require.Empty(t, m.done)
		require.Positive(t, h.log.count("it is another disk"))
		require.Zero(t, m.src.Status()[0].BytesSent)
		m.end()
		h.end()
	})
}
