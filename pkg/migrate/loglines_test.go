package migrate

import (
	"context"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

func (s *syncBuffer) lines() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Split(strings.TrimSpace(s.b.String()), "\n")
}

// TestStrangersDoNotFillTheLog of a source or destination that listens: the number of
// their lines is bounded, and each is short, whatever name they send (fault C4, trap R3).
func TestStrangersDoNotFillTheLog(t *testing.T) {
	const calls = 1000
	run := func(t *testing.T, log *syncBuffer, run func(context.Context, Connector) error, say func(p *rawPeer) error) {
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		c := newCalls(ctx, &wg)
		wg.Go(func() { _ = run(ctx, from(c.conns)) })
		for range calls {
			conn := c.call(t)
			heard := make(chan struct{})
			wg.Go(func() { _, _ = io.Copy(io.Discard, conn); close(heard) })
			require.NoError(t, say(newRawPeer(conn)))
			synctest.Wait()
			_ = conn.Close()
			<-heard
			<-time.After(10 * time.Millisecond)
		}
		stop()
		wg.Wait()
		lines := log.lines()
		t.Logf("%d lines by %d strangers, the last one is %s", len(lines), calls, lines[len(lines)-1])
		require.Less(t, len(lines), calls/10)
		for _, l := range lines {
			require.Less(t, len(l), 1500)
		}
	}
	t.Run("source", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var log syncBuffer
			store, _ := testDisk(t, 1<<20, 1)
			src := newSource(t, SourceOptions{Listening: true, Log: slog.New(slog.NewTextHandler(&log, nil))}, SourceDisk{Name: "disk", Store: store})
			run(t, &log, src.Run, func(p *rawPeer) error {
				return p.answer(1, 1, &wire.DevInfoResponse{Extension: wire.Extension{Revision: 3, Refused: strings.Repeat("no", 500)}})
			})
		})
	})
	t.Run("destination", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var log syncBuffer
			dst := newDestination(t, DestinationOptions{Listening: true, Disks: 1, Log: slog.New(slog.NewTextHandler(&log, nil))}, memory)
			run(t, &log, dst.Run, func(p *rawPeer) error {
				_, err := p.request(0, &wire.DevInfo{Size: 1 << 20, BlockSize: 3, Name: strings.Repeat("name", 15000)})
				return err
			})
			require.NoError(t, dst.Close())
		})
	})
}
