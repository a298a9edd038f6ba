package migrate

import (
	"bytes"
	"context"
	"encoding/hex"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

func newTracker(t testing.TB, store storage.StorageProvider) *Tracker {
	t.Helper()
	tr, err := NewTracker(store, TrackerOptions{})
	require.NoError(t, err)
	return tr
}

// steadyWriter writes 4 KiB at random places, first to one device and, from its
// end on, to another. It knows what must be there.
type steadyWriter struct {
	want  []byte
	wrote int
}

func (w *steadyWriter) run(t *testing.T, ctx context.Context, first *Tracker, second func() blockDevice, pause time.Duration) {
	rnd := rand.New(rand.NewPCG(7, 7))
	var dev blockDevice = first
	for ctx.Err() == nil {
		p := make([]byte, 4096)
		for i := range p {
			p[i] = byte(rnd.Uint32())
		}
		off := rnd.Int64N(int64(len(w.want)/4096)) * 4096
		_, err := dev.WriteAtContext(ctx, p, off)
		if err == ErrHandedOff && dev == first {
			dev = second()
			_, err = dev.WriteAtContext(ctx, p, off)
		}
		if err != nil && ctx.Err() != nil {
			return
		}
		require.NoError(t, err)
		copy(w.want[off:], p)
		w.wrote++
		<-time.After(pause)
	}
}

type blockDevice interface {
	WriteAtContext(ctx context.Context, p []byte, off int64) (int, error)
	ReadAt(p []byte, off int64) (int, error)
}

func TestLiveDiskMovesUnderASteadyWriter(t *testing.T) {
	for _, auto := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			const size = 4 << 20
			store, data := testDisk(t, size, 1)
			tr := newTracker(t, store)
			src := newSource(t, SourceOptions{BlockSize: 4096, Rate: 1 << 20, AutoHandoff: auto}, SourceDisk{Name: "disk", Live: tr})
			m := migrate(t, src, newDestination(t, DestinationOptions{}, memory), newWires())
			dev := <-m.dst.ready
			w := &steadyWriter{want: bytes.Clone(data)}
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			var wg sync.WaitGroup
			wg.Go(func() {
				w.run(t, ctx, tr, func() blockDevice { return dev }, 20*time.Millisecond)
			})
			<-time.After(time.Second)
			require.Equal(t, StateFirstPass, src.Status()[0].State)
			require.Equal(t, StateStandby, m.dst.Status()[0].State)
			require.False(t, dev.Stats().Live)
			if !auto {
				<-time.After(5 * time.Second)
				require.Equal(t, StateConverging, src.Status()[0].State)
				require.NoError(t, src.Handoff(t.Context()))
				require.True(t, dev.Stats().Live)
				require.NoError(t, src.Handoff(t.Context()), "once more is no harm")
				require.ErrorIs(t, src.AbortHandoff(), ErrTooLate)
			}
			require.Equal(t, []error{nil, nil}, m.end())
			require.True(t, src.HandedOff())
			stop()
			wg.Wait()
			require.Greater(t, w.wrote, 100)
			require.True(t, bytes.Equal(w.want, contents(t, m.dst.disks["disk"])))
			_, err := tr.ReadAt(make([]byte, 1), 0)
			require.ErrorIs(t, err, ErrHandedOff)
			require.NoError(t, m.dst.Close())
		})
	}
}

// Trap D8 for a live source: another destination claims blocks of which the
// source cannot know what has changed since they were sent there.
func TestDestinationThatComesBackAfterAnotherIsNotTrusted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 256 << 10
		store, want := testDisk(t, size, 1)
		tr := newTracker(t, store)
		src := newSource(t, SourceOptions{BlockSize: 4096, Listening: true}, SourceDisk{Name: "disk", Live: tr})
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		var wg sync.WaitGroup
		wires := newWires()
		wg.Go(func() { wires.plugLoop(ctx) })
		wg.Go(func() { _ = src.Run(ctx, from(wires.src)) })
		first := newDestination(t, DestinationOptions{Listening: true}, memory)
		second := newDestination(t, DestinationOptions{Listening: true}, memory)
		// visit connects a destination for a while.
		visit := func(d *destination) {
			visitCtx, leave := context.WithCancel(ctx)
			left := make(chan struct{})
			wg.Go(func() { _ = d.Run(visitCtx, from(wires.dst)); close(left) })
			<-time.After(2 * time.Second)
			leave()
			<-left
		}
		visit(first)
		record(want[8192:12288], 1)
		_, err := tr.WriteAt(want[8192:12288], 8192)
		require.NoError(t, err)
		visit(second) // it gets the new bytes, and the block is clean again
		require.Zero(t, src.Status()[0].DirtyBytes)
		left := make(chan error, 1)
		wg.Go(func() { left <- first.Run(ctx, from(wires.dst)) })
		<-time.After(2 * time.Second)
		require.ErrorIs(t, src.Handoff(ctx), ErrOtherDestination) // two have connected
		device := first.all()[0].device
		require.NoError(t, src.HandoffTo(ctx, hex.EncodeToString(device[:])))
		require.NoError(t, <-left)
		require.True(t, bytes.Equal(want, contents(t, first.disks["disk"])))
		stop()
		wg.Wait()
		require.NoError(t, first.Close())
		require.NoError(t, second.Close())
	})
}

// A disk that was handed off has one owner: another destination is refused.
func TestHandedOffDiskGoesToNobodyElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _ := testDisk(t, 1<<20, 1)
		tr := newTracker(t, store)
		src := newSource(t, SourceOptions{BlockSize: 4096, Rate: 10 << 10, Listening: true}, SourceDisk{Name: "disk", Live: tr})
		m := migrate(t, src, newDestination(t, DestinationOptions{Listening: true}, memory), newWires())
		<-m.dst.ready
		<-time.After(time.Second)
		require.NoError(t, src.Handoff(t.Context()))
		m.stop()
		m.end()

		again := newSource(t, SourceOptions{BlockSize: 4096, Listening: true}, SourceDisk{Name: "disk", Live: tr, Identity: src.disks[0].Identity})
		other := newDestination(t, DestinationOptions{}, memory)
		n := migrate(t, again, other, newWires())
		require.ErrorContains(t, <-n.errs, "another destination")
		n.stop()
		<-n.errs
		n.wg.Wait()
		require.Empty(t, other.disks)

		n = migrate(t, newSource(t, SourceOptions{BlockSize: 4096, Listening: true}, SourceDisk{Name: "disk", Live: tr, Identity: src.disks[0].Identity}), m.dst, newWires())
		require.Equal(t, []error{nil, nil}, n.end())
		require.NoError(t, m.dst.Close())
		require.NoError(t, other.Close())
	})
}

// Trap M8: a handoff that is asked for too early, aborted, and asked for again.
func TestHandoffAsksAndAborts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		frozen, _ := testDisk(t, 4096, 1)
		require.ErrorIs(t, newSource(t, SourceOptions{}, SourceDisk{Name: "disk", Store: frozen}).Handoff(t.Context()), ErrFrozen)
		store, _ := testDisk(t, 1<<20, 1)
		slow := &blockedFlush{StorageProvider: store, goOn: make(chan struct{})}
		tr := newTracker(t, slow)
		src := newSource(t, SourceOptions{BlockSize: 4096, Rate: 100 << 10, Listening: true}, SourceDisk{Name: "disk", Live: tr})
		require.ErrorIs(t, src.Handoff(t.Context()), ErrNotConnected)
		require.ErrorIs(t, src.AbortHandoff(), ErrNoHandoff)
		m := migrate(t, src, newDestination(t, DestinationOptions{Listening: true}, memory), newWires())
		dev := <-m.dst.ready
		<-time.After(time.Second)

		asked := make(chan error, 2)
		go func() { asked <- src.Handoff(t.Context()) }()
		go func() { asked <- src.Handoff(t.Context()) }()
		synctest.Wait()
		_, err := tr.WriteAt(make([]byte, 4096), 0)
		require.NoError(t, err, "the flush that comes first holds up nobody")
		abort := make(chan error, 1)
		go func() { abort <- src.AbortHandoff() }()
		synctest.Wait()
		close(slow.goOn)
		require.NoError(t, <-abort)
		require.ErrorIs(t, <-asked, errAborted)
		require.ErrorIs(t, <-asked, errAborted)
		require.False(t, src.HandedOff())
		_, err = tr.WriteAt(make([]byte, 4096), 0)
		require.NoError(t, err)
		require.False(t, dev.Stats().Live)

		require.NoError(t, src.Handoff(t.Context()), "before the first pass is done")
		require.Equal(t, StateHandedOff, src.Status()[0].State)
		require.Equal(t, []error{nil, nil}, m.end())
		require.NoError(t, m.dst.Close())
	})
}

type blockedFlush struct {
	storage.StorageProvider
	goOn chan struct{}
}

func (b *blockedFlush) Flush() error {
	<-b.goOn
	return b.StorageProvider.Flush()
}

// Trap M9: the guest writes twice what the link takes.
func TestHandoffEndsHoweverFastTheGuestWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 2 << 20
		store, data := testDisk(t, size, 1)
		tr := newTracker(t, store)
		src := newSource(t, SourceOptions{BlockSize: 4096, Rate: 256 << 10, AutoHandoff: true}, SourceDisk{Name: "disk", Live: tr})
		m := migrate(t, src, newDestination(t, DestinationOptions{}, memory), newWires())
		dev := <-m.dst.ready
		w := &steadyWriter{want: bytes.Clone(data)}
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		var wg sync.WaitGroup
		wg.Go(func() { w.run(t, ctx, tr, func() blockDevice { return dev }, 8*time.Millisecond) })
		began := time.Now()
		require.Equal(t, []error{nil, nil}, m.end())
		require.Less(t, time.Since(began), 10*size/(256<<10)*time.Second)
		stop()
		wg.Wait()
		require.True(t, bytes.Equal(w.want, contents(t, m.dst.disks["disk"])))
		require.NoError(t, m.dst.Close())
	})
}

func TestLiveDiskMovesToAPlainSiloDestination(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 256<<10 + 100
		store, data := testDisk(t, size, 1)
		tr := newTracker(t, store)
		src := newSource(t, SourceOptions{BlockSize: 4096, Rate: 64 << 10}, SourceDisk{Name: "disk", Live: tr})
		a, b := net.Pipe()
		d := &plainDestination{rawPeer: newRawPeer(b), needs: 3, live: true}
		var wg sync.WaitGroup
		var peerErr, srcErr error
		wg.Go(func() { peerErr = d.run(); _ = b.Close() })
		wg.Go(func() { srcErr = src.Run(t.Context(), once(a)) })
		w := &steadyWriter{want: bytes.Clone(data)}
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		wg.Go(func() { // until the handoff
			w.run(t, ctx, tr, func() blockDevice { stop(); return tr }, 20*time.Millisecond)
		})
		<-time.After(6 * time.Second)
		require.NoError(t, src.Handoff(t.Context()))
		wg.Wait()
		require.NoError(t, srcErr)
		require.NoError(t, peerErr)
		for _, dev := range d.devs {
			require.True(t, dev.completed)
			require.True(t, bytes.Equal(w.want, dev.data))
		}
	})
}
