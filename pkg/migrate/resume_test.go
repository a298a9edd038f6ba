package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/protocol"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// resumable is a destination's disk and map on a file system.
type resumable struct{ disk, mapPath string }

func newResumable(t testing.TB) resumable {
	t.Helper()
	dir := t.TempDir()
	return resumable{filepath.Join(dir, "disk.raw"), filepath.Join(dir, "disk.raw.silo-nbd")}
}

func (r resumable) open(a Announcement) (DestinationDisk, error) {
	f, err := sources.OpenFile(r.disk, sources.FileOptions{Create: true, Size: int64(a.Size)})
	if err != nil {
		return DestinationDisk{}, err
	}
	m, err := lazy.CreateMap(r.mapPath, lazy.Identity{
		Size: int64(a.Size), BlockSize: int64(a.BlockSize), Source: a.Identity.UUID, Generation: a.Identity.Generation,
	})
	return DestinationDisk{Store: f, KnownZero: true, Map: m}, err
}

func (r resumable) resume(t testing.TB, d *Destination) {
	t.Helper()
	f, err := sources.OpenFile(r.disk, sources.FileOptions{})
	require.NoError(t, err)
	m, err := lazy.OpenMap(r.mapPath, lazy.Identity{})
	require.NoError(t, err)
	require.NoError(t, d.Resume("disk", DestinationDisk{Store: f, Map: m}))
}

func (r resumable) destination(t testing.TB, ready chan *lazy.Device) *Destination {
	t.Helper()
	d, err := NewDestination(DestinationOptions{
		Open:  r.open,
		Ready: func(_ string, dev *lazy.Device) error { ready <- dev; return nil },
		Disks: 1,
	})
	require.NoError(t, err)
	return d
}

func TestRestartedDestinationGoesOnWithWhatIsMissing(t *testing.T) {
	const size = 4 << 20
	store, want := testDisk(t, size, 6)
	id := Identity{UUID: [16]byte{7}, Generation: 3}
	r, ready := newResumable(t), make(chan *lazy.Device, 1)

	src := newSource(t, SourceOptions{BlockSize: 4096, Rate: 100 << 10, Listening: true}, SourceDisk{Name: "disk", Store: store, Identity: id})
	first := r.destination(t, ready)
	m := migrate(t, src, &destination{Destination: first}, newWires())
	dev := <-ready
	got := make([]byte, size/2)
	_, err := dev.ReadAt(got, size/2)
	require.NoError(t, err)
	require.True(t, bytes.Equal(want[size/2:], got))
	_, err = dev.WriteAt([]byte("written here"), 100)
	require.NoError(t, err)
	copy(want[100:], "written here")
	require.NoError(t, dev.Sync())
	m.stop()
	m.end()
	require.NoError(t, first.Close())

	second := r.destination(t, ready)
	r.resume(t, second)
	dev = <-ready
	_, err = dev.ReadAt(got, size/2) // the source is not there
	require.NoError(t, err)
	require.True(t, bytes.Equal(want[size/2:], got))
	again := newSource(t, SourceOptions{BlockSize: 4096, Listening: true}, SourceDisk{Name: "disk", Store: store, Identity: id})
	m = migrate(t, again, &destination{Destination: second}, newWires())
	require.Equal(t, []error{nil, nil}, m.end())
	require.Less(t, again.Status()[0].BytesSent, int64(size/4+size/8), "what was there was not sent again")
	require.NoError(t, second.Close())
	data, err := os.ReadFile(r.disk)
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, data))
}

// TestSourceThatChangedIsRefused is trap D8.
func TestSourceThatChangedIsRefused(t *testing.T) {
	store, _ := testDisk(t, 1<<20, 6)
	r, ready := newResumable(t), make(chan *lazy.Device, 1)
	id := Identity{UUID: [16]byte{7}, Generation: 3}
	src := newSource(t, SourceOptions{Rate: 10 << 10, Listening: true}, SourceDisk{Name: "disk", Store: store, Identity: id})
	first := r.destination(t, ready)
	m := migrate(t, src, &destination{Destination: first}, newWires())
	<-(<-ready).Live()
	m.stop()
	m.end()
	require.NoError(t, first.Close())
	before, err := os.ReadFile(r.disk)
	require.NoError(t, err)

	for _, other := range []Identity{{UUID: [16]byte{8}, Generation: 3}, {}} {
		synctest.Test(t, func(t *testing.T) {
			var dstLog, srcLog syncBuffer
			ready := make(chan *lazy.Device, 1)
			d := r.destination(t, ready)
			d.log = slog.New(slog.NewTextHandler(&dstLog, nil))
			r.resume(t, d)
			dev := <-ready
			ledger := new(noLedger)
			if other.UUID == id.UUID { // it is the same disk, and noted as the destination's
				require.NoError(t, ledger.Prepare(map[string]Owner{"disk": {Device: d.all()[0].device, Taken: true}}))
				require.NoError(t, ledger.HandOff())
			}
			src := newSource(t, SourceOptions{Listening: true, Ledger: ledger, Log: slog.New(slog.NewTextHandler(&srcLog, nil))}, SourceDisk{Name: "disk", Store: store, Identity: other})
			m := migrate(t, src, &destination{Destination: d}, newWires())
			<-time.After(10*time.Minute - time.Second)
			require.Equal(t, 10, dstLog.count("the source was refused; waiting for the right one"), "a line a minute")
			require.Equal(t, 10, srcLog.count("the destination refuses; waiting for one that does not"))
			require.Equal(t, 10, strings.Count(srcLog.b.String(), "nothing was changed"))
			require.Equal(t, 10, strings.Count(srcLog.b.String(), "begin anew with --overwrite"), "and the way out")
			local := dev.Stats().BytesLocal
			m.stop()
			for _, err := range m.end() {
				require.ErrorIs(t, err, context.Canceled)
			}
			require.Less(t, local, int64(1<<20))
			require.NoError(t, d.Close())
			after, err := os.ReadFile(r.disk)
			require.NoError(t, err)
			require.True(t, bytes.Equal(before, after), "nothing was changed")
		})
	}

	// The right one is taken when it comes, whoever came before.
	d := r.destination(t, ready)
	r.resume(t, d)
	<-ready
	w := newWires()
	dstErr := make(chan error, 1)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { w.plugLoop(ctx) })
	wg.Go(func() { dstErr <- d.Run(ctx, from(w.dst)) })
	wrong := newSource(t, SourceOptions{}, SourceDisk{Name: "disk", Store: store, Identity: Identity{UUID: [16]byte{9}, Generation: 1}})
	var refused *protocol.RefusedError
	require.ErrorAs(t, wrong.Run(ctx, from(w.src)), &refused, "one that calls for the first time ends with the reason")
	require.Contains(t, refused.Error(), `disk "disk" came from 07000000`)
	right := newSource(t, SourceOptions{Listening: true}, SourceDisk{Name: "disk", Store: store, Identity: id})
	require.NoError(t, right.Run(ctx, from(w.src)))
	require.NoError(t, <-dstErr)
	stop()
	wg.Wait()
	require.NoError(t, d.Close())
}

// A first connection to a source that cannot be taken ends both, who call.
func TestUnsuitableSourceEndsTheFirstConnection(t *testing.T) {
	store, _ := testDisk(t, 1<<20, 6)
	src := newSource(t, SourceOptions{}, SourceDisk{Name: "disk", Store: store})
	small := newDestination(t, DestinationOptions{}, func(string, uint64) storage.StorageProvider { return sources.NewMemoryStorage(4096) })
	m := migrate(t, src, small, newWires())
	for _, err := range m.end() {
		require.ErrorContains(t, err, `disk "disk": the source's disk has 1048576 bytes, this one only 4096: take one at least as large`)
	}
	require.NoError(t, small.Close())
}

// What went wrong on the destination's own file system is told there.
func TestReasonTellsNoPaths(t *testing.T) {
	_, err := os.Open("/no/such/file")
	require.Equal(t, `it cannot take disk "d": its log says why`, reason("d", fmt.Errorf("disk: %w", err)))
	require.Equal(t, `it cannot take disk "d": its log says why`, reason("d", &localError{errors.New("secret")}))
	require.Empty(t, reason("d", ErrClosed))
}
