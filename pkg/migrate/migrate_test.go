package migrate

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// testDisk is a disk of random data with a stretch of zeroes in it.
func testDisk(t testing.TB, size int, seed uint64) (*sources.MemoryStorage, []byte) {
	t.Helper()
	rnd := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	data := make([]byte, size)
	_, _ = rnd.Read(data) // never fails
	clear(data[size/4 : size/2])
	store := sources.NewMemoryStorage(size)
	_, err := store.WriteAt(data, 0)
	require.NoError(t, err)
	return store, data
}

func contents(t testing.TB, s storage.StorageProvider) []byte {
	t.Helper()
	b := make([]byte, s.Size())
	n, err := s.ReadAt(b, 0)
	require.Equal(t, len(b), n, err)
	return b
}

// wires hands both ends of connection after connection to a source and a
// destination, and can cut the present one.
type wires struct {
	src, dst chan io.ReadWriteCloser
	wrap     func(net.Conn) io.ReadWriteCloser // of the source's end

	mu   sync.Mutex
	last net.Conn
}

func newWires() *wires {
	return &wires{src: make(chan io.ReadWriteCloser), dst: make(chan io.ReadWriteCloser)}
}

// plugLoop makes connections as long as somebody wants them.
func (w *wires) plugLoop(ctx context.Context) {
	for {
		a, b := net.Pipe()
		var end io.ReadWriteCloser = a
		if w.wrap != nil {
			end = w.wrap(a)
		}
		select {
		case w.src <- end:
		case <-ctx.Done():
			return
		}
		w.mu.Lock()
		w.last = a
		w.mu.Unlock()
		select {
		case w.dst <- b:
		case <-ctx.Done():
			return
		}
	}
}

func (w *wires) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	_ = w.last.Close() // a second cut of one connection is none
}

func from(c chan io.ReadWriteCloser) Connector {
	return func(ctx context.Context) (io.ReadWriteCloser, error) {
		select {
		case conn := <-c:
			return conn, nil
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// destination is a Destination with memory disks of which the test knows.
type destination struct {
	*Destination
	ready chan *lazy.Device
	mu    sync.Mutex
	disks map[string]storage.StorageProvider
}

func newDestination(t testing.TB, opts DestinationOptions, open func(name string, size uint64) storage.StorageProvider) *destination {
	t.Helper()
	d := &destination{ready: make(chan *lazy.Device, 8), disks: make(map[string]storage.StorageProvider)}
	opts.Open = func(a Announcement) (DestinationDisk, error) {
		s := open(a.Name, a.Size)
		d.mu.Lock()
		defer d.mu.Unlock()
		d.disks[a.Name] = s
		return DestinationDisk{Store: s}, nil
	}
	opts.Ready = func(_ string, dev *lazy.Device) error { d.ready <- dev; return nil }
	var err error
	d.Destination, err = NewDestination(opts)
	require.NoError(t, err)
	return d
}

func memory(_ string, size uint64) storage.StorageProvider {
	return sources.NewMemoryStorage(int(size))
}

// migration is a source and a destination at work.
type migration struct {
	src   *Source
	dst   *destination
	wires *wires
	errs  chan error // of the source, then of the destination, in the order in which they end
	stop  context.CancelFunc
	wg    sync.WaitGroup
}

func migrate(t testing.TB, src *Source, dst *destination, w *wires) *migration {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	m := &migration{src: src, dst: dst, wires: w, errs: make(chan error, 2), stop: stop}
	m.wg.Go(func() { w.plugLoop(ctx) })
	m.wg.Go(func() { m.errs <- src.Run(ctx, from(w.src)) })
	m.wg.Go(func() { m.errs <- dst.Run(ctx, from(w.dst)) })
	return m
}

// end waits for both sides and returns their errors.
func (m *migration) end() []error {
	errs := []error{<-m.errs, <-m.errs}
	m.stop()
	m.wg.Wait()
	return errs
}

func newSource(t testing.TB, opts SourceOptions, disks ...SourceDisk) *Source {
	t.Helper()
	s, err := NewSource(disks, opts)
	require.NoError(t, err)
	return s
}

func TestDiskMovesForEveryBlockSizeAndOddSize(t *testing.T) {
	for _, blockSize := range []int64{512, 4096, 64 << 10, 1 << 20} {
		for _, size := range []int{1, 511, 4096, 1<<20 + 1, 3<<20 + 4097} {
			store, want := testDisk(t, size, 1)
			src := newSource(t, SourceOptions{BlockSize: blockSize}, SourceDisk{Name: "disk", Store: store})
			m := migrate(t, src, newDestination(t, DestinationOptions{}, memory), newWires())
			require.Equal(t, []error{nil, nil}, m.end())
			require.True(t, bytes.Equal(want, contents(t, m.dst.disks["disk"])), "size %d, block %d", size, blockSize)
			for _, st := range [][]DiskStatus{src.Status(), m.dst.Status()} {
				require.Equal(t, StateComplete, st[0].State)
				require.EqualValues(t, size, st[0].BytesDone)
			}
			require.NoError(t, m.dst.Close())
		}
	}
}

func TestDeviceIsUsableWhileTheDiskMoves(t *testing.T) {
	const size = 32 << 20
	store, want := testDisk(t, size, 2)
	src := newSource(t, SourceOptions{Rate: 16 << 20}, SourceDisk{Name: "disk", Store: store})
	m := migrate(t, src, newDestination(t, DestinationOptions{}, memory), newWires())
	dev := <-m.dst.ready
	rnd := rand.New(rand.NewPCG(3, 3))
	buf := make([]byte, 10000)
	for range 200 {
		off := rnd.Int64N(size - int64(len(buf)))
		if rnd.IntN(2) == 0 {
			_, err := dev.ReadAt(buf, off)
			require.NoError(t, err)
			require.True(t, bytes.Equal(want[off:off+int64(len(buf))], buf), "at %d", off)
			continue
		}
		for i := range buf {
			buf[i] = byte(rnd.Uint32())
		}
		_, err := dev.WriteAt(buf, off)
		require.NoError(t, err)
		copy(want[off:], buf)
	}
	require.Equal(t, StateMigrating, src.Status()[0].State, "the disk must still be on its way")
	require.Equal(t, []error{nil, nil}, m.end())
	require.True(t, bytes.Equal(want, contents(t, m.dst.disks["disk"])))
	require.NoError(t, m.dst.Close())
}

func TestCutConnectionGoesOnWithWhatIsMissing(t *testing.T) {
	const size = 8 << 20
	store, want := testDisk(t, size, 4)
	src := newSource(t, SourceOptions{BlockSize: 4096, Rate: 4 << 20}, SourceDisk{Name: "disk", Store: store})
	w := newWires()
	m := migrate(t, src, newDestination(t, DestinationOptions{}, memory), w)
	dev := <-m.dst.ready
	for cut := int64(1); cut <= 3; cut++ {
		buf := make([]byte, 4096)
		for off := size - cut<<20; off < size-cut<<20+1<<19; off += 4096 { // demand, so that there is progress
			_, err := dev.ReadAt(buf, int64(off))
			require.NoError(t, err)
			require.True(t, bytes.Equal(want[off:off+4096], buf))
		}
		w.cut()
	}
	require.Equal(t, []error{nil, nil}, m.end())
	require.True(t, bytes.Equal(want, contents(t, m.dst.disks["disk"])))
	require.GreaterOrEqual(t, m.dst.Status()[0].Reconnects, 3)
	require.Less(t, src.Status()[0].BytesSent, int64(size)+size/4, "what was there was not sent again")
	require.NoError(t, m.dst.Close())
}

func TestSeveralDisksMoveOnOneConnection(t *testing.T) {
	var disks []SourceDisk
	want := make(map[string][]byte)
	for i, name := range []string{"root", "data", "swap"} {
		store, data := testDisk(t, 1<<20+i*777, uint64(i))
		disks = append(disks, SourceDisk{Name: name, Store: store})
		want[name] = data
	}
	src := newSource(t, SourceOptions{BlockSize: 4096}, disks...)
	m := migrate(t, src, newDestination(t, DestinationOptions{Disks: 3}, memory), newWires())
	require.Equal(t, []error{nil, nil}, m.end())
	for name, data := range want {
		require.True(t, bytes.Equal(data, contents(t, m.dst.disks[name])), name)
	}
	require.NoError(t, m.dst.Close())
}

func TestStopEndsBothSidesAndWakesReaders(t *testing.T) {
	store, _ := testDisk(t, 64<<20, 5)
	src := newSource(t, SourceOptions{Rate: 1 << 20}, SourceDisk{Name: "disk", Store: store})
	m := migrate(t, src, newDestination(t, DestinationOptions{}, memory), newWires())
	<-m.dst.ready
	m.stop()
	for _, err := range m.end() {
		require.ErrorIs(t, err, context.Canceled)
	}
	require.NoError(t, m.dst.Close())
	require.Empty(t, m.dst.Status())
}

func TestDestinationWithoutListenerRefusesWhatIsNotTheProtocol(t *testing.T) {
	a, b := net.Pipe()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		_, _ = a.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n")) // the other end may be gone
		_ = a.Close()
	})
	dst := newDestination(t, DestinationOptions{}, memory)
	err := dst.Run(t.Context(), func(context.Context) (io.ReadWriteCloser, error) { return b, nil })
	require.Error(t, err)
	require.Empty(t, dst.disks)
	t.Log(err)
}

func TestOptionsAreChecked(t *testing.T) {
	store := sources.NewMemoryStorage(4096)
	for _, c := range []struct {
		disks []SourceDisk
		opts  SourceOptions
	}{
		{nil, SourceOptions{}},
		{[]SourceDisk{{Name: "a", Store: store}}, SourceOptions{BlockSize: 3000}},
		{[]SourceDisk{{Name: "a", Store: store}}, SourceOptions{BlockSize: 256}},
		{[]SourceDisk{{Name: "a", Store: store}, {Name: "a", Store: store}}, SourceOptions{}},
		{[]SourceDisk{{Name: "a", Store: sources.NewMemoryStorage(0)}}, SourceOptions{}},
	} {
		_, err := NewSource(c.disks, c.opts)
		require.Error(t, err)
	}
	_, err := NewDestination(DestinationOptions{})
	require.Error(t, err)
}
