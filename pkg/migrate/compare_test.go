package migrate

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// counted counts what is read of a disk.
type counted struct {
	storage.StorageProvider
	read atomic.Int64
}

func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	c.read.Add(int64(len(p)))
	return c.StorageProvider.ReadAt(p, off)
}

// half is a disk of which a live destination has a part, when the source starts again.
type half struct {
	t       *testing.T
	store   *sources.MemoryStorage
	want    []byte // what the destination is to have in the end
	dst     *destination
	dev     *lazy.Device
	wires   *wires
	ctx     context.Context
	dstEnd  chan error
	srcLog  syncBuffer
	dstLog  syncBuffer
	stop    func()
	fetched int64
	ledger  noLedger
	wrap    atomic.Pointer[func(net.Conn) io.ReadWriteCloser] // of the source's end of connections to come
}

const halfSize, halfBlock = 1 << 20, 4096

// newHalf moves some of a disk. written is what a client writes then, by offset.
func newHalf(t *testing.T, written map[int64][]byte) *half { return newHalfOn(t, written, memory) }

// newHalfOn is newHalf with a destination on what open returns.
func newHalfOn(t *testing.T, written map[int64][]byte, open func(name string, size uint64) storage.StorageProvider) *half {
	h := &half{t: t, wires: newWires(), dstEnd: make(chan error, 1)}
	h.store, h.want = testDisk(t, halfSize, 5)
	h.want = bytes.Clone(h.want)
	h.dst = newDestination(t, DestinationOptions{Disks: 1, Log: slog.New(slog.NewTextHandler(&h.dstLog, nil))}, open)
	h.wires.wrap = func(c net.Conn) io.ReadWriteCloser {
		if wrap := h.wrap.Load(); wrap != nil {
			return (*wrap)(c)
		}
		return c
	}
	ctx, cancel := context.WithCancel(t.Context())
	h.ctx = ctx
	var wg sync.WaitGroup
	wg.Go(func() { h.wires.plugLoop(ctx) })
	wg.Go(func() { h.dstEnd <- h.dst.Run(ctx, from(h.wires.dst)) })
	h.stop = func() { cancel(); wg.Wait(); require.NoError(t, h.dst.Close()) }
	one, end := h.source(SourceDisk{Store: h.store, Identity: Identity{UUID: [16]byte{7}, Generation: 3}}, 128<<10)
	h.dev = <-h.dst.ready
	<-time.After(2 * time.Second)
	for off, p := range written {
		_, err := h.dev.WriteAt(p, off)
		require.NoError(t, err)
		copy(h.want[off:], p)
	}
	end()
	require.NotEqual(t, StateComplete, one.Status()[0].State)
	synctest.Wait() // the last of it lands
	h.fetched = h.dev.Stats().BytesLocal
	require.GreaterOrEqual(t, h.fetched, int64(halfSize/4))
	return h
}

// source runs a source until end is called, which returns how it ended.
func (h *half) source(d SourceDisk, rate int64) (s *Source, end func() error) {
	d.Name = "disk"
	s = newSource(h.t, SourceOptions{BlockSize: halfBlock, Rate: rate, Listening: true, Ledger: &h.ledger, Log: slog.New(slog.NewTextHandler(&h.srcLog, nil))}, d)
	ctx, cancel := context.WithCancel(h.ctx)
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, from(h.wires.src)) }()
	return s, func() error { cancel(); return <-done }
}

// again is the disk as a source gives it that cannot prove that it is as it was.
func (h *half) again(store storage.StorageProvider) SourceDisk {
	return SourceDisk{Store: store, Identity: Identity{UUID: [16]byte{7}, Generation: 4}}
}

// finish waits until the disk is complete, and compares it.
func (h *half) finish() {
	h.t.Helper()
	require.NoError(h.t, <-h.dstEnd)
	require.True(h.t, bytes.Equal(h.want, contents(h.t, h.dst.disks["disk"])))
}

// clientWrites are in blocks that have come (the first), in one that has not, and over
// all of one.
func clientWrites() map[int64][]byte {
	return map[int64][]byte{
		5*halfBlock + 512:        bytes.Repeat([]byte{1}, 512),
		halfSize - halfBlock + 1: {2},
		halfSize - 4*halfBlock:   bytes.Repeat([]byte{3}, halfBlock),
	}
}

// TestDiskThatCannotBeProvedIsComparedAndGoesOn: nothing that was fetched travels
// again, and the destination keeps the new generation (rule 2).
func TestDiskThatCannotBeProvedIsComparedAndGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHalf(t, clientWrites())
		disk := &counted{StorageProvider: h.store}
		src, end := h.source(h.again(disk), 0)
		h.finish()
		require.NoError(t, end())
		require.LessOrEqual(t, src.Status()[0].BytesSent, int64(halfSize)-h.fetched+halfBlock)
		require.Equal(t, 1, h.srcLog.count("what the destination has is as it is here"))
		require.Equal(t, 1, h.dstLog.count("all that came is as the source has it"))
		require.EqualValues(t, 4, h.dst.all()[0].id.Generation)
		h.stop()
	})
}

// TestDiskThatDiffersIsRefused, loudly on both sides and without a change, and is not
// compared again (rule 2).
func TestDiskThatDiffersIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHalf(t, clientWrites())
		before := bytes.Clone(contents(t, h.dst.disks["disk"]))
		_, err := h.store.WriteAt([]byte("changed"), 20*halfBlock)
		require.NoError(t, err)
		disk := &counted{StorageProvider: h.store}
		src, end := h.source(h.again(disk), 0)
		<-time.After(time.Minute)
		require.Positive(t, h.srcLog.count("differs at 81920"))
		require.Positive(t, h.dstLog.count("differs at 81920"))
		read := disk.read.Load()
		<-time.After(10 * time.Minute)
		require.Equal(t, read, disk.read.Load(), "it is compared once")
		require.Zero(t, src.Status()[0].BytesSent)
		require.Equal(t, h.fetched, h.dev.Stats().BytesLocal)
		require.EqualValues(t, 3, h.dst.all()[0].id.Generation)
		require.ErrorIs(t, end(), context.Canceled)
		require.True(t, bytes.Equal(before, contents(t, h.dst.disks["disk"])))
		// The right one is taken when it comes.
		_, err = h.store.WriteAt(h.want[20*halfBlock:21*halfBlock], 20*halfBlock)
		require.NoError(t, err)
		_, end = h.source(SourceDisk{Store: h.store, Identity: Identity{UUID: [16]byte{7}, Generation: 3}}, 0)
		h.finish()
		require.NoError(t, end())
		h.stop()
	})
}

// TestBlockThatAClientHasWrittenIsNotCompared: it differs, as it should (rule 2).
func TestBlockThatAClientHasWrittenIsNotCompared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHalf(t, map[int64][]byte{5 * halfBlock: bytes.Repeat([]byte{1}, halfBlock)})
		_, err := h.store.WriteAt([]byte("changed, and it does not matter"), 5*halfBlock)
		require.NoError(t, err)
		_, end := h.source(h.again(h.store), 0)
		h.finish()
		require.NoError(t, end())
		h.stop()
	})
}

// TestDestinationWithNothingToCompareRefuses: by what is here the disk cannot be known.
func TestDestinationWithNothingToCompareRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHalf(t, nil)
		var all [][2]int64
		h.dev.EachLocal(func(off, length int64) bool { all = append(all, [2]int64{off, length}); return true })
		for _, s := range all {
			_, err := h.dev.WriteAt(make([]byte, s[1]), s[0])
			require.NoError(t, err)
		}
		src, end := h.source(h.again(h.store), 0)
		<-time.After(time.Minute)
		require.Positive(t, h.dstLog.count("nothing was changed"))
		require.Positive(t, h.srcLog.count("nothing was changed"))
		require.Zero(t, src.Status()[0].BytesSent)
		require.ErrorIs(t, end(), context.Canceled)
		h.stop()
	})
}

// TestComparisonIsShown while it lasts, and a read of a missing block waits for it.
func TestComparisonIsShown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHalf(t, nil)
		slow := &flaky{h.store, func(string, int64) error { <-time.After(time.Second); return nil }}
		src, end := h.source(h.again(slow), 0)
		read := make(chan error, 1)
		go func() {
			p := make([]byte, 512)
			_, err := h.dev.ReadAt(p, halfSize-512)
			read <- err
		}()
		<-time.After(500 * time.Millisecond)
		for _, st := range []DiskStatus{src.Status()[0], h.dst.Status()[0]} {
			require.Equal(t, StateComparing, st.State)
			require.Equal(t, h.fetched, st.BytesToCompare)
			require.Less(t, st.BytesCompared, st.BytesToCompare)
		}
		require.Equal(t, 1, h.dst.Status()[0].Waiting)
		require.Empty(t, read)
		h.finish()
		require.NoError(t, <-read)
		require.NoError(t, end())
		require.Zero(t, src.Status()[0].BytesToCompare)
		h.stop()
	})
}

// TestComparisonMayBreakAtEveryByte: the next connection compares again, or goes on.
func TestComparisonMayBreakAtEveryByte(t *testing.T) {
	for _, toDest := range []bool{true, false} {
		for n := int64(0); ; n += 17 {
			var fired atomic.Bool
			synctest.Test(t, func(t *testing.T) {
				h := newHalf(t, clientWrites())
				first := true
				wrap := func(c net.Conn) io.ReadWriteCloser {
					switch {
					case !first:
						return c
					case toDest:
						first = false
						return &cutAt{c, n, &fired}
					}
					first = false
					return &cutReads{Conn: c, left: n, fired: &fired}
				}
				h.wrap.Store(&wrap)
				_ = (<-h.wires.src).Close() // it was made before
				_, end := h.source(h.again(h.store), 0)
				h.finish()
				require.NoError(t, end(), "cut after %d bytes", n)
				h.stop()
			})
			if !fired.Load() || n > 8000 {
				require.Greater(t, n, int64(100))
				break
			}
		}
	}
}

// TestComparisonSurvivesOneFailure: the n-th read of the source or the destination
// fails once, for every n.
func TestComparisonSurvivesOneFailure(t *testing.T) {
	for n := int64(0); ; n++ {
		var ops atomic.Int64
		synctest.Test(t, func(t *testing.T) {
			var on atomic.Bool
			fail := func(op string, _ int64) error {
				if op == "read" && on.Load() && ops.Add(1)-1 == n {
					return errBroken
				}
				return nil
			}
			h := newHalfOn(t, clientWrites(), func(_ string, size uint64) storage.StorageProvider {
				return &flaky{sources.NewMemoryStorage(int(size)), fail}
			})
			on.Store(true)
			_, end := h.source(h.again(&flaky{h.store, fail}), 0)
			require.NoError(t, <-h.dstEnd)
			on.Store(false)
			require.True(t, bytes.Equal(h.want, contents(t, h.dst.disks["disk"])), "operation %d", n)
			require.NoError(t, end(), "operation %d", n)
			h.stop()
		})
		if ops.Load() <= n {
			require.Greater(t, n, int64(50))
			return
		}
	}
}

// cutReads closes the connection when left bytes were read.
type cutReads struct {
	net.Conn
	left  int64
	fired *atomic.Bool
}

func (c *cutReads) Read(p []byte) (int, error) {
	if c.left <= 0 {
		c.fired.Store(true)
		c.Conn.Close()
		return 0, io.ErrUnexpectedEOF
	}
	n, err := c.Conn.Read(p[:min(int64(len(p)), c.left)])
	c.left -= int64(n)
	return n, err
}

// TestNothingIsLaidDownBeforeTheComparisonHasEnded, whatever the source sends.
func TestNothingIsLaidDownBeforeTheComparisonHasEnded(t *testing.T) {
	for what, send := range map[string]appender{
		"data":      &wire.WriteAt{Off: halfSize - halfBlock, Data: make([]byte, halfBlock)},
		"completed": &wire.Event{Type: wire.EventCompleted},
		"post lock": &wire.Event{Type: wire.EventPostLock},
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHalf(t, nil)
				conn := <-h.wires.src
				heard := make(chan struct{})
				go func() { _, _ = io.Copy(io.Discard, conn); close(heard) }()
				p := newRawPeer(conn)
				_, err := p.request(1, &wire.DevInfo{Size: halfSize, BlockSize: halfBlock, Name: "disk", Extension: &wire.Extension{
					Revision: wire.RevisionEpoch, Identity: Identity{UUID: [16]byte{7}, Generation: 4},
				}})
				require.NoError(t, err)
				synctest.Wait()
				_, err = p.request(1, send)
				require.NoError(t, err)
				synctest.Wait()
				require.Equal(t, h.fetched, h.dev.Stats().BytesLocal)
				require.EqualValues(t, 3, h.dst.all()[0].id.Generation)
				require.NoError(t, conn.Close())
				<-heard
				h.stop()
			})
		})
	}
}

// TestMovedDiskIsComparedBeforeItIsBelieved: an operator has said that it is the map's,
// which nothing proves, and the source is the same (rule 2).
func TestMovedDiskIsComparedBeforeItIsBelieved(t *testing.T) {
	for _, same := range []bool{true, false} {
		store, want := testDisk(t, halfSize, 5)
		id := Identity{UUID: [16]byte{7}, Generation: 3}
		r, ready := newResumable(t), make(chan *lazy.Device, 1)
		d := r.destination(t, ready)
		src := newSource(t, SourceOptions{BlockSize: halfBlock, Rate: 1 << 10, Listening: true}, SourceDisk{Name: "disk", Store: store, Identity: id})
		m := migrate(t, src, &destination{Destination: d}, newWires())
		p := make([]byte, 64<<10)
		_, err := (<-ready).ReadAt(p, 0)
		require.NoError(t, err)
		m.stop()
		m.end()
		require.NoError(t, d.Close())
		if !same { // it was another disk
			f, err := os.OpenFile(r.disk, os.O_WRONLY, 0)
			require.NoError(t, err)
			_, err = f.WriteAt([]byte("other"), halfBlock)
			require.NoError(t, err)
			require.NoError(t, f.Close())
		}
		mp, err := lazy.OpenMap(r.mapPath, lazy.Identity{})
		require.NoError(t, err)
		require.NoError(t, mp.SetCompare(true))
		require.NoError(t, mp.Close())

		d = r.destination(t, ready)
		r.resume(t, d)
		<-ready
		src = newSource(t, SourceOptions{BlockSize: halfBlock}, SourceDisk{Name: "disk", Store: store, Identity: id})
		m = migrate(t, src, &destination{Destination: d}, newWires())
		if same {
			require.Equal(t, []error{nil, nil}, m.end())
			require.NoError(t, d.Close())
			f, err := sources.OpenFile(r.disk, sources.FileOptions{})
			require.NoError(t, err)
			require.True(t, bytes.Equal(want, contents(t, f)))
			require.NoError(t, f.Close())
			continue
		}
		require.ErrorContains(t, <-m.errs, "differs at 4096")
		m.stop()
		m.wg.Wait()
		require.NoError(t, d.Close())
	}
}

// TestComparedGenerationOutlivesTheProcess: a destination that is started again takes
// the source for the same (rule 2).
func TestComparedGenerationOutlivesTheProcess(t *testing.T) {
	store, want := testDisk(t, halfSize, 5)
	r, ready := newResumable(t), make(chan *lazy.Device, 1)
	disk := func(generation uint64) SourceDisk {
		return SourceDisk{Name: "disk", Store: store, Identity: Identity{UUID: [16]byte{7}, Generation: generation}}
	}
	var sent int64
	for i, generation := range []uint64{3, 4, 4} {
		d := r.destination(t, ready)
		if i > 0 {
			r.resume(t, d)
		}
		src := newSource(t, SourceOptions{BlockSize: halfBlock, Rate: 256 << 10, Listening: true}, disk(generation))
		if i == 2 {
			src.SetRate(0)
		}
		m := migrate(t, src, &destination{Destination: d}, newWires())
		dev := <-ready
		if i == 2 {
			require.Equal(t, []error{nil, nil}, m.end())
		} else {
			p := make([]byte, 64<<10) // by demand, so that there is progress
			_, err := dev.ReadAt(p, int64(i)*128<<10)
			require.NoError(t, err)
			require.Eventually(t, func() bool { return d.Status()[0].State == StateMigrating }, 10*time.Second, time.Millisecond)
			m.stop()
			m.end()
		}
		sent += src.Status()[0].BytesSent
		require.NoError(t, d.Close())
	}
	f, err := sources.OpenFile(r.disk, sources.FileOptions{})
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, contents(t, f)))
	require.NoError(t, f.Close())
	require.Less(t, sent, int64(halfSize), "nothing has travelled twice; a quarter is zero")
}
