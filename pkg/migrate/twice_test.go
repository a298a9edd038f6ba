package migrate

import (
	"bytes"
	"context"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/protocol"
	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// TestSameDiskConnectsTwiceAtOnce is trap P8: two sources with the same UUID. One
// at a time feeds the disk; the other waits, takes over when the first is cut
// off, and sends only what is missing then. The first finds the device in a state
// that it does not know, and says no more that all is there.
func TestSameDiskConnectsTwiceAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 8 << 20
		store, want := testDisk(t, size, 4)
		disk := SourceDisk{Name: "disk", Store: store, Identity: Identity{UUID: [16]byte{8}, Generation: 1}}
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		calls := make(chan io.ReadWriteCloser) // whoever calls the destination
		dial := func(conns *[]net.Conn) Connector {
			return func(ctx context.Context) (io.ReadWriteCloser, error) {
				a, b := net.Pipe()
				select {
				case calls <- b:
					*conns = append(*conns, a)
					return a, nil
				case <-ctx.Done():
					return nil, context.Cause(ctx)
				}
			}
		}
		var srcs [2]*Source
		var conns [2][]net.Conn
		errs := make(chan error, 2)
		for i := range srcs {
			srcs[i] = newSource(t, SourceOptions{BlockSize: 4096, Rate: 1 << 20, Listening: true}, disk)
			wg.Go(func() { errs <- srcs[i].Run(ctx, dial(&conns[i])) })
		}
		dst := newDestination(t, DestinationOptions{Disks: 1, Listening: true}, memory)
		ended := make(chan error, 1)
		wg.Go(func() { ended <- dst.Run(ctx, from(calls)) })
		<-dst.ready
		cut, served := -1, make(map[int]bool)
		for len(ended) == 0 {
			<-time.After(2 * time.Second)
			synctest.Wait()
			var feeding []int
			for i, s := range srcs {
				if s.Status()[0].Connected {
					feeding = append(feeding, i)
					served[i] = true
				}
			}
			require.LessOrEqual(t, len(feeding), 1, "one at a time")
			for _, i := range feeding { // not above: the other one takes over at once
				if cut < 0 {
					cut = i
					_ = conns[i][len(conns[i])-1].Close()
				}
			}
		}
		require.NoError(t, <-ended)
		require.Len(t, served, 2, "both had their turn")
		require.True(t, bytes.Equal(want, contents(t, dst.disks["disk"])))
		sent := srcs[0].Status()[0].BytesSent + srcs[1].Status()[0].BytesSent
		require.Less(t, sent, int64(size+size/4), "what was there was not sent again")
		require.NoError(t, <-errs, "the one that has heard that it is complete")
		require.Equal(t, StateComplete, srcs[1-cut].Status()[0].State)
		require.NotEqual(t, StateComplete, srcs[cut].Status()[0].State)
		stop()
		require.ErrorIs(t, <-errs, context.Canceled)
		wg.Wait()
		require.NoError(t, dst.Close())
	})
}

// The same, on one connection: it is refused, and what was here stays as it was.
func TestSameDiskTwiceOnOneConnectionIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dst := newDestination(t, DestinationOptions{}, memory)
		a, b := net.Pipe()
		p := protocol.NewProtocolRW(t.Context(), a, a, nil)
		var wg sync.WaitGroup
		wg.Go(func() { _ = p.Handle() })
		ended := make(chan error, 1)
		wg.Go(func() { ended <- dst.Run(t.Context(), once(b)) })
		info := &protocol.DevInfo{BlockSize: 4096, Name: "disk", Extension: &wire.Extension{
			Revision: wire.Revision, Identity: Identity{UUID: [16]byte{8}, Generation: 1},
		}}
		first := protocol.NewToProtocol(4096, 1, p)
		require.NoError(t, first.SendDevInfoExt(info))
		<-first.PeerKnown()
		_, err := first.WriteAt(bytes.Repeat([]byte{7}, 4096), 0)
		require.NoError(t, err)
		second := protocol.NewToProtocol(4096, 2, p)
		require.NoError(t, second.SendDevInfoExt(info))
		_, err = second.WriteAt(make([]byte, 4096), 0)
		require.Error(t, err)
		require.ErrorContains(t, <-ended, `brings disk "disk" twice`)
		require.NoError(t, p.Close())
		wg.Wait()
		require.Equal(t, bytes.Repeat([]byte{7}, 4096), contents(t, dst.disks["disk"]))
		require.NoError(t, dst.Close())
	})
}
