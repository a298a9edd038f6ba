package main

import (
	"bytes"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/nbdexport"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// Many reads that are given up together are one line for each disk.
func TestReadsGivenUpTogetherAreOneLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dest, err := migrate.NewDestination(migrate.DestinationOptions{
			Open: func(migrate.Announcement) (migrate.DestinationDisk, error) {
				return migrate.DestinationDisk{}, errors.ErrUnsupported
			},
			Ready: func(string, *lazy.Device) error { return nil },
		})
		require.NoError(t, err)
		var log bytes.Buffer
		r := &receiver{dest: dest, console: &console{log: slog.New(slog.NewTextHandler(&log, nil))}}
		wait := nbdexport.Wait{Export: "a", Command: "READ", Off: 4096, Length: 512, Waited: time.Minute}
		for range 100 {
			r.waited(wait) // waits on: the device's to tell
		}
		giveUp := func(export string, off uint64) {
			w := wait
			w.Export, w.Off, w.GivenUp = export, off, true
			r.waited(w)
		}
		for i := range uint64(64) {
			giveUp("a", 4096+i)
		}
		require.Empty(t, log.String(), "more may come")
		giveUp("b", 7)
		time.Sleep(gatherGivenUp)
		synctest.Wait()
		require.Equal(t, 2, strings.Count(log.String(), "\n"), log.String())
		require.Contains(t, log.String(), "disk=a requests=64 first_offset=4096 waited=1m0s source_attached=false")
		require.Contains(t, log.String(), "disk=b requests=1 first_offset=7")
		giveUp("a", 1)
		time.Sleep(gatherGivenUp)
		synctest.Wait()
		require.Contains(t, log.String(), "disk=a requests=1 first_offset=1 ")
		require.Equal(t, 3, strings.Count(log.String(), "\n"), log.String())
	})
}

// slowFlush is storage whose flush takes its time.
type slowFlush struct{ storage.StorageProvider }

func (s slowFlush) Flush() error {
	<-time.After(200 * time.Millisecond)
	return s.StorageProvider.Flush()
}

// Three flushes that wait for the disk, and for each other, are none that wait for
// the source: the stall rule leaves them alone, and they are not counted. A read of
// what is missing is given up, and counted (fault G1, trap R5).
func TestStallRuleHitsOnlyWhatWaitsForTheSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev, err := lazy.New(slowFlush{sources.NewMemoryStorage(1 << 20)}, lazy.Options{Waiting: nbdexport.Waiting, Log: slog.New(slog.DiscardHandler)})
		require.NoError(t, err)
		server := nbdexport.NewServer(nbdexport.Options{StallError: 60 * time.Millisecond})
		require.NoError(t, server.AddExport(nbdexport.Export{Name: "disk", Backend: dev}))
		door := &pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
		var serving sync.WaitGroup
		serving.Go(func() { require.ErrorIs(t, server.Serve(door), nbdexport.ErrServerClosed) })
		ours, theirs := net.Pipe()
		door.conns <- theirs
		c, err := nbdclient.New(t.Context(), ours, "disk")
		require.NoError(t, err)
		var wg sync.WaitGroup
		for i := range int64(3) {
			wg.Go(func() {
				_, err := c.WriteAt(make([]byte, 64<<10), i*64<<10)
				require.NoError(t, err)
				require.NoError(t, c.Flush())
			})
		}
		synctest.Wait()
		require.Zero(t, server.Waits().Count)
		wg.Wait()

		wg.Go(func() {
			_, err := c.ReadAt(make([]byte, 512), 1<<19)
			require.ErrorIs(t, err, syscall.EIO)
		})
		synctest.Wait()
		require.Equal(t, 1, server.Waits().Count)
		wg.Wait()
		require.NoError(t, c.Close())
		require.NoError(t, server.Close())
		serving.Wait()
		require.NoError(t, dev.Close())
	})
}

// pipes is a listener.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { close(p.closed); return nil }
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{} }
