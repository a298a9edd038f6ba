package migrate

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// a connection that breaks while the destination claims ends a dialling dest for good.
func TestConnectionMayBreakWhileTheDestinationClaims(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _ := testDisk(t, 64<<20, 1)
		src := newSource(t, SourceOptions{BlockSize: 4096, Rate: 20 << 10, Listening: true}, SourceDisk{Name: "disk", Store: store})
		w := newWires()
		n := 0
		w.wrap = func(c net.Conn) io.ReadWriteCloser { // the source's host dies just after DevInfo on the second connection
			if n++; n == 2 {
				return &dieAfterFirstWrite{c}
			}
			return c
		}
		m := migrate(t, src, newDestination(t, DestinationOptions{Disks: 1}, memory), w)
		dev := <-m.dst.ready
		var err error
		for off := int64(8 << 10); off < 64<<20; off += 8 << 10 { // so that there are several runs to claim
			_, err = dev.WriteAt(make([]byte, 4096), off)
			require.NoError(t, err)
		}
		<-time.After(time.Second)
		w.cut()
		err = <-m.errs
		t.Logf("the first to end: %v", err)
		if err != nil {
			t.Errorf("dest ended for good, with most of the disk missing")
		}
		m.stop()
		<-m.errs
		m.wg.Wait()
		_ = m.dst.Close()
	})
}

type dieAfterFirstWrite struct{ net.Conn }

func (d *dieAfterFirstWrite) Write(p []byte) (int, error) {
	n, err := d.Conn.Write(p)
	<-time.After(100 * time.Millisecond) // reads nothing meanwhile, so that the claims do not get through
	d.Conn.Close()
	return n, err
}

func (d *dieAfterFirstWrite) Read(p []byte) (int, error) {
	<-time.After(time.Second)
	return 0, io.ErrClosedPipe
}

// the largest block size that both ends accept never moves.
func TestLargestBlockSizeMoves(t *testing.T) {
	func() {
		store, want := testDisk(t, 33<<20, 1)
		src := newSource(t, SourceOptions{BlockSize: MaxBlockSize, Listening: true}, SourceDisk{Name: "disk", Store: store})
		w := newWires()
		m := migrate(t, src, newDestination(t, DestinationOptions{Disks: 1, Listening: true}, memory), w)
		go func() { <-m.dst.ready }()
		stop := time.AfterFunc(5*time.Second, m.stop)
		errs := m.end()
		stop.Stop()
		t.Log(errs, src.Status(), dst0(m))
		require.Equal(t, []error{nil, nil}, errs)
		require.True(t, bytes.Equal(want, contents(t, m.dst.disks["disk"])))
	}()
}

func dst0(m *migration) []DiskStatus { return m.dst.Status() }

// badDisk refuses data from limit on.
type badDisk struct {
	storage.StorageProvider
	limit int64
}

func (f badDisk) WriteAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > f.limit {
		return 0, syscall.EIO
	}
	return f.StorageProvider.WriteAt(p, off)
}

// How long until a destination whose disk fails is given up, and what is sent until
// then. A source that was told to connect there ends with it.
func TestBadDestinationIsGivenUpSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _ := testDisk(t, 64<<20, 1)
		src := newSource(t, SourceOptions{Rate: 1 << 20}, SourceDisk{Name: "disk", Store: store})
		w := newWires()
		dst := newDestination(t, DestinationOptions{Disks: 1, Listening: true}, func(n string, s uint64) storage.StorageProvider {
			return badDisk{memory(n, s), 1 << 20}
		})
		began := time.Now()
		m := migrate(t, src, dst, w)
		errs := m.end()
		require.NoError(t, dst.Close())
		t.Logf("ended after %v with %v, sent %d", time.Since(began), errs, src.Status()[0].BytesSent)
		require.Less(t, time.Since(began), 10*time.Second)
		for _, err := range errs {
			var disk *DiskError
			require.ErrorAs(t, err, &disk)
		}
	})
}

// sparse is a disk that is a hole but for its last block.
type sparse struct{ size int64 }

func (s sparse) Size() uint64                             { return uint64(s.size) }
func (s sparse) Flush() error                             { return nil }
func (s sparse) Close() error                             { return nil }
func (s sparse) WriteAt(p []byte, off int64) (int, error) { return 0, errors.New("no") }
func (s sparse) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	for i := range p {
		if off+int64(i) >= s.size-65536 {
			p[i] = 0x77
		}
	}
	return len(p), nil
}
func (s sparse) ExtentAt(off int64) (int64, bool, error) {
	if e := s.size - 65536; off < e {
		return e, true, nil
	}
	return s.size, false, nil
}

// zeroSlow takes zeroes at perMiB, or not at all.
type zeroSlow struct {
	size   int64
	perMiB time.Duration
	err    error
}

func (s zeroSlow) Size() uint64                             { return uint64(s.size) }
func (s zeroSlow) Flush() error                             { return nil }
func (s zeroSlow) Close() error                             { return nil }
func (s zeroSlow) WriteAt(p []byte, off int64) (int, error) { return len(p), nil }
func (s zeroSlow) ReadAt(p []byte, off int64) (int, error)  { return len(p), nil }
func (s zeroSlow) ZeroAt(off, length int64, punch bool) error {
	if s.err != nil {
		return s.err
	}
	<-time.After(time.Duration(length>>20) * s.perMiB)
	return nil
}

// a demand read behind zero runs that the destination's disk takes slowly.
func TestDemandDoesNotWaitForHoles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 64 << 30
		src := newSource(t, SourceOptions{Listening: true}, SourceDisk{Name: "disk", Store: sparse{size}})
		w := newWires()
		dst := newDestination(t, DestinationOptions{Disks: 1, Listening: true}, func(n string, s uint64) storage.StorageProvider {
			return zeroSlow{size: int64(s), perMiB: time.Millisecond}
		})
		m := migrate(t, src, dst, w)
		dev := <-m.dst.ready
		<-time.After(50 * time.Millisecond)
		began := time.Now()
		_, err := dev.ReadAt(make([]byte, 4096), size-4096)
		require.NoError(t, err)
		t.Logf("demand read took %v", time.Since(began))
		require.Less(t, time.Since(began), 500*time.Millisecond)
		require.Equal(t, []error{nil, nil}, m.end())
		require.NoError(t, dst.Close())
	})
}

// A disk that refuses zeroes is given up in seconds, with little to remember.
func TestRefusedZeroRunsCostLittle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newSource(t, SourceOptions{}, SourceDisk{Name: "disk", Store: sparse{512 << 30}})
		dst := newDestination(t, DestinationOptions{Disks: 1, Listening: true}, func(n string, s uint64) storage.StorageProvider {
			return zeroSlow{size: int64(s), err: syscall.EIO}
		})
		began := time.Now()
		m := migrate(t, src, dst, newWires())
		<-m.dst.ready
		var disk *DiskError
		require.ErrorAs(t, <-m.errs, &disk)
		require.Less(t, time.Since(began), 10*time.Second)
		require.ErrorAs(t, <-m.errs, &disk)
		m.stop()
		m.wg.Wait()
		require.Less(t, len(src.disks[0].order.attempts), 10_000)
		require.NoError(t, dst.Close())
	})
}

// probing goes on through a hole: a plain peer gets one zero block a round trip.
func TestHolesGoOnWhileTheWindowProbes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rtt = 10 * time.Millisecond
		w := newWindow(64<<10, plainBulkPackets).lane()
		w.probing = true // as after rttLife, by an answer to the last data before a hole
		var flying []flightMark
		sent := 0
		for range 100 { // round trips
			for hasRoom(w, 0) {
				flying = append(flying, w.begin(0))
				sent++
			}
			<-time.After(rtt)
			for _, f := range flying {
				w.release(f, true)
			}
			flying = nil
		}
		t.Logf("%d zero packets in 100 round trips", sent)
		require.Greater(t, sent, 1000)
	})
}

type noFlush struct{ storage.StorageProvider }

func (noFlush) Flush() error { return syscall.EIO }

// a destination whose disk fails the last flush never says so.
func TestFailedFlushEndsTheDestination(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _ := testDisk(t, 1<<20, 1)
		src := newSource(t, SourceOptions{Listening: true}, SourceDisk{Name: "disk", Store: store})
		var log bytes.Buffer
		dst := newDestination(t, DestinationOptions{Disks: 1, Log: slog.New(slog.NewTextHandler(&log, nil))}, func(n string, s uint64) storage.StorageProvider {
			return noFlush{memory(n, s)}
		})
		m := migrate(t, src, dst, newWires())
		<-m.dst.ready
		select {
		case err := <-m.errs:
			t.Log("ended:", err)
			m.errs <- err
		case <-time.After(5 * time.Minute):
			t.Errorf("after 5 minutes both ends still try: %+v", dst.Status()[0])
		}
		m.stop()
		<-m.errs
		<-m.errs
		m.wg.Wait()
		_ = dst.Close()
		t.Log(log.String()[:min(900, log.Len())])
	})
}

// the farewell of one disk is lost with the connection: half a minute and a false warning.
func TestLostFarewellOfOneDiskIsSaidAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := testDisk(t, 64<<10, 1)
		b, _ := testDisk(t, 4<<20, 2)
		src := newSource(t, SourceOptions{Rate: 200 << 10, Listening: true}, SourceDisk{Name: "a", Store: a}, SourceDisk{Name: "b", Store: b})
		w := newWires()
		n := 0
		w.wrap = func(c net.Conn) io.ReadWriteCloser {
			if n++; n == 1 {
				return &noRemoveDev{c}
			}
			return c
		}
		m := migrate(t, src, newDestination(t, DestinationOptions{Disks: 2, Listening: true}, memory), w)
		require.NoError(t, <-m.errs) // the source
		ended := time.Now()
		require.NoError(t, <-m.errs)
		t.Logf("the destination ended %v after the source", time.Since(ended))
		require.Less(t, time.Since(ended), 5*time.Second)
		m.stop()
		m.wg.Wait()
		_ = m.dst.Close()
	})
}

// noRemoveDev breaks when a RemoveDev is to be sent.
type noRemoveDev struct{ net.Conn }

func (c *noRemoveDev) Write(p []byte) (int, error) {
	if len(p) == 13 && p[12] == 0x0a {
		c.Conn.Close()
		return 0, io.ErrClosedPipe
	}
	return c.Conn.Write(p)
}
