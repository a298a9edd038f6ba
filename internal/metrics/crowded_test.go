package metrics

import (
	"io"
	"log/slog"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/internal/control"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

// Connections that say nothing keep no scraper out (trap R3).
func TestIdleConnectionsKeepNoScraperOut(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s := Start(ln, Sight{Role: control.RoleDest, Disks: func() []migrate.DiskStatus { return nil }}, slog.New(slog.DiscardHandler))
	defer func() { require.NoError(t, s.Close()) }()
	for range 2 * maxConnections {
		c, err := net.Dial("tcp", ln.Addr().String())
		require.NoError(t, err)
		defer c.Close()
	}
	client := http.Client{Timeout: requestTime / 2, Transport: &http.Transport{DisableKeepAlives: true}}
	began := time.Now()
	resp, err := client.Get("http://" + ln.Addr().String() + "/metrics")
	require.NoError(t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Contains(t, string(b), "silo_nbd_")
	t.Logf("after %v", time.Since(began))
}
