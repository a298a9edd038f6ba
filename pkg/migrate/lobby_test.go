package migrate

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/crowd"
)

// door is a listener whose callers are pipes.
type door struct{ conns chan io.ReadWriteCloser }

func newDoor() *door { return &door{make(chan io.ReadWriteCloser)} }

// accept is a Connector.
func (d *door) accept(ctx context.Context) (io.ReadWriteCloser, error) {
	select {
	case c := <-d.conns:
		return c, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// dial is a Connector.
func (d *door) dial(ctx context.Context) (io.ReadWriteCloser, error) {
	a, b := net.Pipe()
	select {
	case d.conns <- a:
		return b, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// strangers keep n connections open that say nothing but what is in words, and
// make them anew whenever they are closed. They end with ctx.
func (d *door) strangers(ctx context.Context, wg *sync.WaitGroup, n int, words string) {
	for range n {
		wg.Go(func() {
			for ctx.Err() == nil {
				conn, err := d.dial(ctx)
				if err != nil {
					return
				}
				stop := context.AfterFunc(ctx, func() { conn.Close() })
				if words != "" {
					go func() { _, _ = io.WriteString(conn, words) }() // until it is closed
				}
				_, _ = io.Copy(io.Discard, conn) // until it is closed
				stop()
				<-time.After(time.Millisecond) // a round trip
			}
		})
	}
}

// crowded runs a migration through a door at which strangers stand, and cuts its
// connection cuts times.
func crowded(t *testing.T, sourceListens bool, words string, cuts int) time.Duration {
	var took time.Duration
	synctest.Test(t, func(t *testing.T) {
		store, want := testDisk(t, 1<<20, 1)
		src := newSource(t, SourceOptions{BlockSize: 4096, Rate: 512 << 10, Listening: sourceListens, MaxCallers: 8}, SourceDisk{Name: "disk", Store: store})
		dst := newDestination(t, DestinationOptions{Disks: 1, Listening: !sourceListens, MaxCallers: 8}, memory)
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		d, errs := newDoor(), make(chan error, 2)
		d.strangers(ctx, &wg, 20, words)
		var mu sync.Mutex
		var last io.Closer
		dial := func(ctx context.Context) (io.ReadWriteCloser, error) {
			c, err := d.dial(ctx)
			mu.Lock()
			defer mu.Unlock()
			last = c
			return c, err
		}
		begin := time.Now()
		if sourceListens {
			wg.Go(func() { errs <- src.Run(ctx, d.accept) })
			wg.Go(func() { errs <- dst.Run(ctx, dial) })
		} else {
			wg.Go(func() { errs <- dst.Run(ctx, d.accept) })
			wg.Go(func() { errs <- src.Run(ctx, dial) })
		}
		for range cuts {
			for before := src.acknowledged(); src.acknowledged() < before+10; {
				<-time.After(time.Millisecond)
			}
			mu.Lock()
			_ = last.Close()
			mu.Unlock()
		}
		require.NoError(t, <-errs)
		require.NoError(t, <-errs)
		took = time.Since(begin)
		stop()
		wg.Wait()
		require.True(t, bytes.Equal(want, contents(t, dst.disks["disk"])))
		require.NoError(t, dst.Close())
	})
	return took
}

// Connections that say nothing, however many and however often they are renewed,
// keep the other end out neither at the start nor after a cut (fault B4, trap R3).
func TestSilentConnectionsKeepNothingOut(t *testing.T) {
	for name, words := range map[string]string{
		"silent": "", "a part of a header": "\x01\x00\x00", "a header and nothing else": "\x01\x00\x00\x00\x01\x00\x00\x00\xff\x00\x00\x00\xfd",
		"DevInfo that never ends": "\x01\x00\x00\x00\x01\x00\x00\x00\xff\x00\x00\x00\x06", "http": "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
	} {
		for _, sourceListens := range []bool{true, false} {
			t.Run(name, func(t *testing.T) {
				alone := 1500 * time.Millisecond // at its rate, with a hole
				once := 25 * crowd.Tenure / 8    // until all who stand before it have had a place
				require.Less(t, crowded(t, sourceListens, words, 0), alone+once)
				require.Less(t, crowded(t, sourceListens, words, 3), alone+4*once+3*maxBackoff/10)
			})
		}
	}
}

// A plain Silo says nothing before it has data, and is served although silent
// connections stand before it (fault B4).
func TestPlainDestinationIsServedAmongSilentConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		store, want := testDisk(t, 256<<10, 1)
		src := newSource(t, SourceOptions{BlockSize: 4096, Listening: true, MaxCallers: 8, Log: slog.New(slog.NewTextHandler(&log, nil))}, SourceDisk{Name: "disk", Store: store})
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		d := newDoor()
		wg.Go(func() { require.NoError(t, src.Run(ctx, d.accept)) })
		d.strangers(ctx, &wg, 3, "")
		synctest.Wait()
		conn, err := d.dial(ctx)
		require.NoError(t, err)
		plain := &plainDestination{rawPeer: newRawPeer(conn)}
		begin := time.Now()
		require.NoError(t, plain.run())
		require.Less(t, time.Since(begin), plainAfter+4*trialTime+time.Second)
		require.True(t, bytes.Equal(want, plain.device().data))
		stop()
		wg.Wait()
		require.NotContains(t, log.String(), "level=ERROR")
	})
}

// Connections that say nothing are tried as plain Silo peers in time, and bind a
// disk to nobody by that: the destination that comes later gets it (fault B4,
// trap I3).
func TestSilentConnectionsBindNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, want := testDisk(t, 256<<10, 1)
		src := newSource(t, SourceOptions{BlockSize: 4096, Listening: true, MaxCallers: 8}, SourceDisk{Name: "disk", Store: store})
		dst := newDestination(t, DestinationOptions{Disks: 1}, memory)
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		d, errs := newDoor(), make(chan error, 2)
		wg.Go(func() { errs <- src.Run(ctx, d.accept) })
		d.strangers(ctx, &wg, 3, "")
		<-time.After(time.Minute)
		require.False(t, src.HandedOff())
		wg.Go(func() { errs <- dst.Run(ctx, d.dial) })
		require.NoError(t, <-errs)
		require.NoError(t, <-errs)
		stop()
		wg.Wait()
		require.True(t, bytes.Equal(want, contents(t, dst.disks["disk"])))
		require.NoError(t, dst.Close())
	})
}
