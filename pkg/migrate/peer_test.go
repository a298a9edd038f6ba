package migrate

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// calls hands connections to a source, one after another.
type calls struct {
	conns chan io.ReadWriteCloser
	ctx   context.Context
	wg    *sync.WaitGroup
}

func newCalls(ctx context.Context, wg *sync.WaitGroup) *calls {
	return &calls{make(chan io.ReadWriteCloser), ctx, wg}
}

// call dials the source, and returns the other end.
func (c *calls) call(t *testing.T) net.Conn {
	t.Helper()
	a, b := net.Pipe()
	select {
	case c.conns <- a:
	case <-time.After(time.Minute):
		t.Fatal("the source no longer takes a connection")
	}
	return b
}

// move has d take the disks over one connection, and returns how it ended.
func (c *calls) move(t *testing.T, d *destination) chan error {
	t.Helper()
	conn, ended := c.call(t), make(chan error, 1)
	c.wg.Go(func() {
		ctx, stop := context.WithCancel(c.ctx)
		defer stop()
		first := true
		ended <- d.Run(ctx, func(ctx context.Context) (io.ReadWriteCloser, error) {
			if !first {
				return nil, &FatalError{errors.New("there is one connection only")}
			}
			first = false
			return conn, nil
		})
	})
	return ended
}

// oldPeer answers DevInfo as a destination before revision 3 did, and dirty lists.
func oldPeer(conn net.Conn) error {
	p := newRawPeer(conn)
	for {
		h, packet, err := p.read()
		if err != nil {
			return err
		}
		switch wire.Command(packet[0]) {
		case wire.CommandDevInfo:
			err = p.answer(h.Dev, h.ID, &wire.DevInfoResponse{Extension: wire.Extension{Revision: 1}})
		case wire.CommandDirtyList:
			err = p.answer(h.Dev, h.ID, bare(wire.CommandDirtyListResponse))
		}
		if err != nil {
			return err
		}
	}
}

// peerDoes is what a peer does to the source over a connection, until the source
// ends that.
var peerDoes = map[string]func(t *testing.T, c *calls){
	"answers as an old one": func(t *testing.T, c *calls) {
		conn := c.call(t)
		leave := time.AfterFunc(time.Minute, func() { _ = conn.Close() }) // frozen disks it may have
		defer leave.Stop()
		require.Error(t, oldPeer(conn))
		_ = conn.Close()
	},
	"refuses": func(t *testing.T, c *calls) {
		conn := c.call(t)
		p := newRawPeer(conn)
		h, _, err := p.read()
		require.NoError(t, err)
		// What follows is read no more: the source ends the connection.
		require.NoError(t, p.answer(h.Dev, h.ID, &wire.DevInfoResponse{Extension: wire.Extension{Revision: 3, Refused: "no"}}))
		_, _ = io.Copy(io.Discard, conn)
		_ = conn.Close()
	},
	"cannot write its disk": func(t *testing.T, c *calls) {
		broken := newDestination(t, DestinationOptions{Disks: 1}, func(n string, s uint64) storage.StorageProvider {
			return badDisk{memory(n, s), 0}
		})
		require.Error(t, <-c.move(t, broken))
		require.NoError(t, broken.Close())
	},
	"says what makes no sense": func(t *testing.T, c *calls) {
		conn := c.call(t)
		c.wg.Go(func() { _, _ = io.Copy(io.Discard, conn) })
		_, err := conn.Write(bytes.Repeat([]byte{0xff}, 64))
		require.NoError(t, err)
		_ = conn.Close()
	},
	"hangs up": func(t *testing.T, c *calls) { _ = c.call(t).Close() },
}

// TestNothingThatAPeerDoesEndsASourceThatListensOrIsLive: the next destination gets
// the disk (rule 8, fault B2).
func TestNothingThatAPeerDoesEndsASourceThatListensOrIsLive(t *testing.T) {
	for what, does := range peerDoes {
		for _, kind := range []string{"frozen, listens", "live, listens", "live, connects"} {
			if what == "cannot write its disk" && kind == "frozen, listens" {
				continue // it has taken the disk, and no other one is the owner (fault A4)
			}
			t.Run(what+"; "+kind, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { survivePeer(t, kind, does) })
			})
		}
	}
}

func survivePeer(t *testing.T, kind string, does func(t *testing.T, c *calls)) {
	store, want := testDisk(t, 1<<20, 1)
	disk := SourceDisk{Name: "disk", Store: store, Identity: Identity{UUID: [16]byte{1}, Generation: 1}}
	live := kind != "frozen, listens"
	if live {
		disk.Live, disk.Store = newTracker(t, store), nil
	}
	src := newSource(t, SourceOptions{BlockSize: 4096, Listening: kind != "live, connects"}, disk)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	c := newCalls(ctx, &wg)
	done := make(chan error, 1)
	wg.Go(func() { done <- src.Run(ctx, from(c.conns)) })
	for range 3 {
		does(t, c)
	}
	synctest.Wait()
	if live {
		if err := src.Handoff(ctx); !errors.Is(err, ErrNotConnected) {
			t.Errorf("Handoff says %v", err)
		}
	}
	good := newDestination(t, DestinationOptions{Disks: 1}, memory)
	moved := c.move(t, good)
	if live { // several may have connected, so that it does not come by itself
		<-good.ready
		synctest.Wait()
		device := good.all()[0].device
		require.NoError(t, src.HandoffTo(ctx, hex.EncodeToString(device[:])))
	}
	require.NoError(t, <-moved)
	require.NoError(t, <-done)
	require.True(t, bytes.Equal(want, contents(t, good.disks["disk"])))
	require.NoError(t, good.Close())
}

// badUntil is a disk of which a block cannot be read until it is mended.
type badUntil struct {
	storage.StorageProvider
	mended chan struct{}
}

func (b badUntil) ReadAt(p []byte, off int64) (int, error) {
	select {
	case <-b.mended:
	default:
		if off <= 8192 && off+int64(len(p)) > 8192 {
			return 0, errBroken
		}
	}
	return b.StorageProvider.ReadAt(p, off)
}

// TestLiveSourceThatCannotReadItsDiskTriesOnTheNextConnection: the machine that uses
// the disk goes on, and the migration does too when the disk is well again (fault B2).
func TestLiveSourceThatCannotReadItsDiskTriesOnTheNextConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, want := testDisk(t, 1<<20, 1)
		mended := make(chan struct{})
		var log syncBuffer
		src := newSource(t, SourceOptions{BlockSize: 4096, Listening: true, AutoHandoff: true, Log: slog.New(slog.NewTextHandler(&log, nil))},
			SourceDisk{Name: "disk", Live: newTracker(t, badUntil{store, mended})})
		dst := newDestination(t, DestinationOptions{Disks: 1, Listening: true}, memory)
		m := migrate(t, src, dst, newWires())
		<-time.After(time.Minute)
		require.Empty(t, m.errs)
		require.ErrorIs(t, src.Status()[0].Err, errBroken)
		require.Positive(t, log.count("medium error")+log.count(errBroken.Error()))
		close(mended)
		require.Equal(t, []error{nil, nil}, m.end())
		require.True(t, bytes.Equal(want, contents(t, dst.disks["disk"])))
		require.NoError(t, dst.Close())
	})
}

// TestHandoffSaysThatTheMigrationHasEnded, and not that there may be a connection
// yet (fault B2).
func TestHandoffSaysThatTheMigrationHasEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _ := testDisk(t, 1<<20, 1)
		src := newSource(t, SourceOptions{Listening: true}, SourceDisk{Name: "disk", Live: newTracker(t, store)})
		err := src.Run(t.Context(), func(context.Context) (io.ReadWriteCloser, error) { return nil, net.ErrClosed })
		require.ErrorIs(t, err, net.ErrClosed)
		require.ErrorIs(t, src.Handoff(t.Context()), ErrEnded)
	})
}

// late takes its time for each write.
type late struct {
	storage.StorageProvider
	pause time.Duration
}

func (l late) WriteAt(p []byte, off int64) (int, error) {
	<-time.After(l.pause)
	return l.StorageProvider.WriteAt(p, off)
}

// TestErrorOfADiskIsNotMaskedByTheEndOfTheConnection that it causes: the source ends
// with it, and does not connect once more (fault X6).
func TestErrorOfADiskIsNotMaskedByTheEndOfTheConnection(t *testing.T) {
	for seed := range 40 {
		synctest.Test(t, func(t *testing.T) {
			var all []SourceDisk
			for i := range 2 {
				store, _ := testDisk(t, 16<<20, uint64(i))
				var s storage.StorageProvider = store
				if i == seed%2 {
					s = badUntil{store, nil}
				}
				all = append(all, SourceDisk{Name: fmt.Sprint(i), Store: s, Identity: Identity{UUID: [16]byte{byte(i + 1)}, Generation: 1}})
			}
			src := newSource(t, SourceOptions{BlockSize: 4096, Listening: true}, all...)
			dst := newDestination(t, DestinationOptions{Listening: true, Disks: 2}, func(n string, s uint64) storage.StorageProvider {
				return late{memory(n, s), 10 * time.Millisecond}
			})
			m := migrate(t, src, dst, newWires())
			var disk *DiskError
			require.ErrorAs(t, <-m.errs, &disk)
			require.Equal(t, fmt.Sprint(seed%2), disk.Name)
			require.ErrorIs(t, src.Status()[seed%2].Err, errBroken)
			require.Equal(t, 1, src.Status()[0].Reconnects, "seed %d", seed)
			m.stop()
			m.wg.Wait()
			require.NoError(t, dst.Close())
		})
	}
}
