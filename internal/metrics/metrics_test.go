package metrics

import (
	"bufio"
	"context"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/internal/control"
	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

const size = 4 << 20

// serve starts a server of see and returns what reads its samples: by name and
// labels as they stand there.
func serve(t *testing.T, see Sight) (scrape func() map[string]float64) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s := Start(ln, see, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	return func() map[string]float64 {
		resp, err := client.Get("http://" + ln.Addr().String() + "/metrics")
		require.NoError(t, err)
		defer resp.Body.Close()
		require.Equal(t, http.StatusOK, resp.StatusCode)
		all := make(map[string]float64)
		for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
			if line := lines.Text(); !strings.HasPrefix(line, "#") {
				i := strings.LastIndexByte(line, ' ')
				all[line[:i]], err = strconv.ParseFloat(line[i+1:], 64)
				require.NoError(t, err, line)
			}
		}
		return all
	}
}

// documented are the metrics that docs/CONTROL.md names.
func documented(t *testing.T) []string {
	t.Helper()
	text, err := os.ReadFile("../../docs/CONTROL.md")
	require.NoError(t, err)
	names := regexp.MustCompile("(?m)^\\| `(silo_nbd_\\w+)").FindAllStringSubmatch(string(text), -1)
	var all []string
	for _, n := range names {
		all = append(all, n[1])
	}
	slices.Sort(all)
	require.Equal(t, slices.Compact(slices.Clone(all)), all, "named twice")
	require.Greater(t, len(all), 20)
	return all
}

// names are those of samples, without labels and what a histogram adds.
func names(all ...map[string]float64) []string {
	var out []string
	for _, samples := range all {
		for name := range samples {
			name, _, _ = strings.Cut(name, "{")
			for _, suffix := range []string{"_bucket", "_sum", "_count"} {
				name = strings.TrimSuffix(name, suffix)
			}
			if strings.HasPrefix(name, "silo_nbd_") {
				out = append(out, name)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// TestDocumentedMetricsAreThereAndTrue moves a small disk, stops in the middle,
// and holds what is shown against what has happened.
func TestDocumentedMetricsAreThereAndTrue(t *testing.T) {
	store := sources.NewMemoryStorage(size)
	data := make([]byte, size)
	rnd := rand.NewChaCha8([32]byte{1})
	_, _ = rnd.Read(data) // never fails
	_, err := store.WriteAt(data, 0)
	require.NoError(t, err)
	src, err := migrate.NewSource([]migrate.SourceDisk{{Name: "vm", Store: store}}, migrate.SourceOptions{Rate: 5 << 20})
	require.NoError(t, err)
	src.Pause()
	ready := make(chan *lazy.Device, 1)
	dst, err := migrate.NewDestination(migrate.DestinationOptions{
		Open: func(a migrate.Announcement) (migrate.DestinationDisk, error) {
			return migrate.DestinationDisk{Store: sources.NewMemoryStorage(int(a.Size))}, nil
		},
		Ready: func(_ string, dev *lazy.Device) error { ready <- dev; return nil },
	})
	require.NoError(t, err)
	var dev *lazy.Device
	var mu sync.Mutex
	source := serve(t, Sight{Role: control.RoleSource, Version: "1", Disks: src.Status, Path: src.Path, Pace: src})
	dest := serve(t, Sight{
		Role: control.RoleDest, Version: "1", Disks: dst.Status,
		Devices: func() map[string]lazy.Stats {
			mu.Lock()
			defer mu.Unlock()
			if dev == nil {
				return nil
			}
			return map[string]lazy.Stats{"vm": dev.Stats()}
		},
		NBD: func() control.NBD { return control.NBD{Clients: 3, Waiting: 2} },
	})
	require.Equal(t, map[string]float64{"size": size, "connected": 0}, map[string]float64{
		"size": source()[`silo_nbd_disk_size_bytes{disk="vm"}`], "connected": source()[`silo_nbd_disk_connected{disk="vm"}`],
	})
	require.Contains(t, dest(), `silo_nbd_info{role="dest",version="1"}`, "before there is a disk")

	a, b := net.Pipe()
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	wg.Go(func() { _ = src.Run(ctx, once(a)) })
	wg.Go(func() { _ = dst.Run(ctx, once(b)) })
	d := <-ready
	mu.Lock()
	dev = d
	mu.Unlock()
	_, err = d.ReadAt(make([]byte, 100), 1<<20) // asks for one block
	require.NoError(t, err)
	_, err = d.WriteAt(make([]byte, 64<<10), 2<<20)
	require.NoError(t, err)
	_, err = d.WriteAt(make([]byte, 512), 3<<20)
	require.NoError(t, err)
	require.NoError(t, d.Sync())

	s, e := source(), dest()
	require.Equal(t, documented(t), names(s, e), "docs/CONTROL.md and what is served")
	want := func(samples map[string]float64, all map[string]float64) {
		t.Helper()
		for name, value := range all {
			require.Contains(t, samples, name)
			require.Equal(t, value, samples[name], name)
		}
	}
	want(s, map[string]float64{
		`silo_nbd_info{role="source",version="1"}`:                      1,
		`silo_nbd_disk_complete{disk="vm"}`:                             0,
		`silo_nbd_disk_connected{disk="vm"}`:                            1,
		`silo_nbd_disk_reconnects_total{disk="vm"}`:                     0,
		`silo_nbd_source_sent_bytes_total{disk="vm",kind="background"}`: 0,
		`silo_nbd_source_sent_bytes_total{disk="vm",kind="demand"}`:     64 << 10,
		`silo_nbd_source_pass{disk="vm"}`:                               0,
		`silo_nbd_source_dirty_bytes{disk="vm"}`:                        0,
		`silo_nbd_source_write_bytes_per_second{disk="vm"}`:             0,
		`silo_nbd_source_paused`:                                        1,
		`silo_nbd_source_rate_limit_bytes_per_second`:                   5 << 20,
		`silo_nbd_source_in_flight_bytes`:                               0,
		`silo_nbd_source_round_trip_seconds`:                            0,
		`silo_nbd_source_delivery_bytes_per_second`:                     0,
	})
	require.Positive(t, s[`silo_nbd_source_window_bytes`])
	want(e, map[string]float64{
		`silo_nbd_disk_size_bytes{disk="vm"}`:                           size,
		`silo_nbd_disk_done_bytes{disk="vm"}`:                           128 << 10,
		`silo_nbd_dest_received_bytes_total{disk="vm"}`:                 64 << 10,
		`silo_nbd_dest_blocks{disk="vm",state="missing"}`:               62,
		`silo_nbd_dest_blocks{disk="vm",state="fetched"}`:               1,
		`silo_nbd_dest_blocks{disk="vm",state="written"}`:               1,
		`silo_nbd_dest_partial_blocks{disk="vm"}`:                       1,
		`silo_nbd_dest_waiting_reads{disk="vm"}`:                        0,
		`silo_nbd_dest_oldest_wait_seconds{disk="vm"}`:                  0,
		`silo_nbd_dest_asked_total{disk="vm"}`:                          1,
		`silo_nbd_dest_demand_read_seconds_count{disk="vm"}`:            1,
		`silo_nbd_dest_demand_read_seconds_bucket{disk="vm",le="+Inf"}`: 1,
		`silo_nbd_dest_demand_read_seconds_bucket{disk="vm",le="60"}`:   1,
		`silo_nbd_dest_flush_seconds_count{disk="vm"}`:                  1,
		`silo_nbd_nbd_clients`:                                          3,
		`silo_nbd_nbd_waiting_requests`:                                 2,
	})
	require.Positive(t, e[`silo_nbd_dest_demand_read_seconds_sum{disk="vm"}`])

	src.SetRate(0)
	src.Resume()
	require.Eventually(t, func() bool { return dest()[`silo_nbd_disk_complete{disk="vm"}`] == 1 }, 20*time.Second, 10*time.Millisecond)
	e = dest()
	require.Zero(t, e[`silo_nbd_dest_blocks{disk="vm",state="missing"}`])
	require.EqualValues(t, size, e[`silo_nbd_disk_done_bytes{disk="vm"}`])
	require.Greater(t, source()[`silo_nbd_source_sent_bytes_total{disk="vm",kind="background"}`], 0.9*(size-192<<10))
	stop()
	wg.Wait()
	require.NoError(t, dst.Close())
}

// once gives one connection and no other.
func once(conn net.Conn) migrate.Connector {
	first := make(chan net.Conn, 1)
	first <- conn
	return func(ctx context.Context) (io.ReadWriteCloser, error) {
		select {
		case c := <-first:
			return c, nil
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// A name that the other side has made up breaks nothing.
func TestHostileNameIsALabel(t *testing.T) {
	scrape := serve(t, Sight{Role: control.RoleDest, Disks: func() []migrate.DiskStatus {
		return []migrate.DiskStatus{{Name: "a\xff\"\n}", Size: 7}, {Name: "b", Size: 8}}
	}})
	all := scrape()
	require.EqualValues(t, 7, all[`silo_nbd_disk_size_bytes{disk="a?\"\n}"}`])
	require.EqualValues(t, 8, all[`silo_nbd_disk_size_bytes{disk="b"}`])
}

// A disk that is in use shows its passes and who is ahead.
func TestDiskInUseShowsItsPasses(t *testing.T) {
	scrape := serve(t, Sight{Role: control.RoleSource, Disks: func() []migrate.DiskStatus {
		return []migrate.DiskStatus{{Name: "vm", Size: size, Pass: 3, DirtyBytes: 128 << 10, WriteRate: 2.5e6, State: migrate.StateConverging}}
	}})
	all := scrape()
	require.EqualValues(t, 3, all[`silo_nbd_source_pass{disk="vm"}`])
	require.EqualValues(t, 128<<10, all[`silo_nbd_source_dirty_bytes{disk="vm"}`])
	require.EqualValues(t, 2.5e6, all[`silo_nbd_source_write_bytes_per_second{disk="vm"}`])
}
