package migrate

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// slowConn lets rate bytes a second through.
type slowConn struct {
	net.Conn
	rate float64
	mu   sync.Mutex // one write at a time is on the link
}

func (c *slowConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for sent := 0; sent < len(p); {
		n := min(len(p)-sent, 16<<10)
		<-time.After(time.Duration(float64(n) / c.rate * float64(time.Second)))
		if _, err := c.Conn.Write(p[sent : sent+n]); err != nil {
			return sent, err
		}
		sent += n
	}
	return len(p), nil
}

// TestDemandOvertakesTheBackground is trap M10 and the point of it all: on a
// link that the background fills, a read waits for little more than its own
// bytes, and a second disk is announced at once.
func TestDemandOvertakesTheBackground(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size, rate = 24 << 20, 10 << 20
		store, want := testDisk(t, size, 2)
		second, _ := testDisk(t, size, 3)
		src := newSource(t, SourceOptions{}, SourceDisk{Name: "first", Store: store}, SourceDisk{Name: "second", Store: second})
		w := newWires()
		w.wrap = func(c net.Conn) io.ReadWriteCloser { return &slowConn{Conn: c, rate: rate} }
		begin := time.Now()
		m := migrate(t, src, newDestination(t, DestinationOptions{Disks: 2}, memory), w)
		dev := <-m.dst.ready
		other := <-m.dst.ready
		require.Less(t, time.Since(begin), time.Second, "the second disk does not wait for the first")
		if n, _ := dev.Size(); n != size || dev == other {
			t.Fatal("devices mixed up")
		}
		buf := make([]byte, 4096)
		own := time.Duration(float64(DefaultBlockSize) / rate * float64(time.Second))
		var worst time.Duration
		for i := range 60 {
			off := int64(size) - int64(i+1)*3*DefaultBlockSize
			at := time.Now()
			_, err := dev.ReadAt(buf, off)
			require.NoError(t, err)
			worst = max(worst, time.Since(at))
			_, err = other.ReadAt(buf, off)
			require.NoError(t, err)
		}
		t.Logf("one block takes %v, the slowest read took %v", own, worst)
		require.Less(t, worst, 8*own)
		path := src.path.Load()
		path.mu.Lock()
		require.Less(t, time.Since(path.demandAt), demandLife, "the window knows that somebody asks")
		path.mu.Unlock()
		require.Equal(t, StateMigrating, src.Status()[0].State)
		require.Equal(t, []error{nil, nil}, m.end())
		require.True(t, bytes.Equal(want, contents(t, m.dst.disks["first"])))
		require.NoError(t, m.dst.Close())
	})
}

// TestDemandDoesNotWaitForTheRate holds the background to next to nothing: a
// read waits neither for the rate nor for a run that the rate holds back.
func TestDemandDoesNotWaitForTheRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, want := testDisk(t, 8<<20, 2)
		src := newSource(t, SourceOptions{Rate: 10 << 10}, SourceDisk{Name: "disk", Store: store})
		m := migrate(t, src, newDestination(t, DestinationOptions{}, memory), newWires())
		dev := <-m.dst.ready
		buf := make([]byte, 1000)
		for off := int64(0); off+1000 < 8<<20; off += 50_000 {
			begin := time.Now()
			_, err := dev.ReadAt(buf, off)
			require.NoError(t, err)
			require.True(t, bytes.Equal(want[off:off+1000], buf))
			require.Less(t, time.Since(begin), time.Millisecond, "at %d", off)
		}
		require.Equal(t, []error{nil, nil}, m.end())
		require.NoError(t, m.dst.Close())
	})
}

// flaky fails each operation for which fail says so.
type flaky struct {
	*sources.MemoryStorage
	fail func(op string, off int64) error
}

func (f *flaky) ReadAt(p []byte, off int64) (int, error) {
	if err := f.fail("read", off); err != nil {
		return 0, err
	}
	return f.MemoryStorage.ReadAt(p, off)
}

func (f *flaky) WriteAt(p []byte, off int64) (int, error) {
	if err := f.fail("write", off); err != nil {
		return 0, err
	}
	return f.MemoryStorage.WriteAt(p, off)
}

var errBroken = errors.New("broken sector")

// TestOneFailureIsRetriedAndTheDiskCompletes is half of trap M4: the n-th read
// of the source or write of the destination fails once, for every n.
func TestOneFailureIsRetriedAndTheDiskCompletes(t *testing.T) {
	for n := int64(0); ; n++ {
		fired := false
		synctest.Test(t, func(t *testing.T) {
			var ops atomic.Int64
			fail := func(string, int64) error {
				if ops.Add(1)-1 == n {
					return errBroken
				}
				return nil
			}
			mem, want := testDisk(t, 300<<10, 1)
			src := newSource(t, SourceOptions{BlockSize: 4096}, SourceDisk{Name: "disk", Store: &flaky{mem, fail}})
			dst := newDestination(t, DestinationOptions{}, func(_ string, size uint64) storage.StorageProvider {
				return &flaky{sources.NewMemoryStorage(int(size)), fail}
			})
			m := migrate(t, src, dst, newWires())
			require.Equal(t, []error{nil, nil}, m.end(), "operation %d", n)
			require.True(t, bytes.Equal(want, contents(t, dst.disks["disk"].(*flaky).MemoryStorage)), "operation %d", n)
			require.NoError(t, dst.Close())
			fired = ops.Load() > n
		})
		if !fired {
			require.Greater(t, n, int64(10))
			return
		}
	}
}

// TestBlockThatCannotMoveKeepsTheDiskFromCompleting is the other half.
func TestBlockThatCannotMoveKeepsTheDiskFromCompleting(t *testing.T) {
	for _, side := range []string{"read", "write"} {
		t.Run(side, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fail := func(op string, off int64) error {
					if op == side && off <= 150<<10 && off+4096 > 150<<10 {
						return errBroken
					}
					return nil
				}
				mem, _ := testDisk(t, 300<<10, 1)
				src := newSource(t, SourceOptions{BlockSize: 4096}, SourceDisk{Name: "disk", Store: &flaky{mem, fail}})
				dst := newDestination(t, DestinationOptions{}, func(_ string, size uint64) storage.StorageProvider {
					return &flaky{sources.NewMemoryStorage(int(size)), fail}
				})
				m := migrate(t, src, dst, newWires())
				var disk *DiskError
				require.ErrorAs(t, <-m.errs, &disk)
				require.Equal(t, "disk", disk.Name)
				m.stop()
				err := <-m.errs
				m.wg.Wait()
				if side == "write" {
					require.Error(t, err)
				}
				for _, st := range [][]DiskStatus{src.Status(), dst.Status()} {
					require.NotEqual(t, StateComplete, st[0].State)
					require.Less(t, st[0].BytesDone, st[0].Size, "trap M11")
				}
				require.NoError(t, dst.Close())
			})
		})
	}
}

// TestHostileSourceIsRefused lists what a source may not announce.
func TestHostileSourceIsRefused(t *testing.T) {
	for _, c := range []struct {
		name string
		size uint64
		bs   uint32
	}{
		{"no size", 0, 4096}, {"no block size", 4096, 0}, {"odd block size", 4096, 3000}, {"small blocks", 4096, 256},
		{"huge blocks", 1 << 40, 1 << 31}, {"negative size", 1 << 63, 4096}, {"too many blocks", 1 << 50, 512},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := net.Pipe()
			peer := newRawPeer(a)
			var wg sync.WaitGroup
			wg.Go(func() {
				_, _ = a.Write(frame(t, 1, 1, c.size, c.bs)) // it may be cut short
				_, _, _ = peer.read()                        // until the connection ends
			})
			dst := newDestination(t, DestinationOptions{}, memory)
			err := dst.Run(t.Context(), once(b))
			require.Error(t, err)
			t.Log(err)
			require.Empty(t, dst.disks, "nothing was opened")
			wg.Wait()
		})
	}
}

// TestRandomReadsWritesAndCuts runs whole migrations under client I/O and cuts.
func TestRandomReadsWritesAndCuts(t *testing.T) {
	for seed := range uint64(20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { cutRandomly(t, rand.New(rand.NewPCG(seed, 7))) })
		})
	}
}

func cutRandomly(t *testing.T, rnd *rand.Rand) {
	size := 1<<20 + rnd.IntN(4<<20)
	store, want := testDisk(t, size, rnd.Uint64())
	src := newSource(t, SourceOptions{BlockSize: 512 << rnd.IntN(8), Rate: 8 << 20, Listening: true}, SourceDisk{Name: "disk", Store: store})
	w := newWires()
	m := migrate(t, src, newDestination(t, DestinationOptions{}, memory), w)
	dev := <-m.dst.ready
	for range 300 {
		off := rnd.IntN(size)
		buf := make([]byte, min(1+rnd.IntN(20000), size-off))
		switch rnd.IntN(20) {
		case 0:
			w.cut()
		case 1:
			require.NoError(t, dev.ZeroAtContext(t.Context(), int64(off), int64(len(buf)), true))
			clear(want[off : off+len(buf)])
		case 2, 3, 4, 5, 6, 7, 8:
			for i := range buf {
				buf[i] = byte(rnd.Uint32())
			}
			_, err := dev.WriteAt(buf, int64(off))
			require.NoError(t, err)
			copy(want[off:], buf)
		default:
			_, err := dev.ReadAt(buf, int64(off))
			require.NoError(t, err)
			require.True(t, bytes.Equal(want[off:off+len(buf)], buf), "at %d", off)
		}
	}
	require.Equal(t, []error{nil, nil}, m.end())
	require.True(t, bytes.Equal(want, contents(t, m.dst.disks["disk"])))
	require.NoError(t, m.dst.Close())
}
