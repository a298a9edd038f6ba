package migrate

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/protocol"
	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// noise is a bad network, for one connection after another: it changes bits at
// random places of both directions, and cuts.
type noise struct {
	toDest, fromDest, cuts int64 // a mean distance in bytes each; 0: never

	mu sync.Mutex
	// Guarded by mu:
	rnd                       *rand.Rand
	flipped, cut              int
	nextTo, nextFrom, nextCut int64
}

func newNoise(seed uint64, toDest, fromDest, cuts int64) *noise {
	n := &noise{toDest: toDest, fromDest: fromDest, cuts: cuts, rnd: rand.New(rand.NewPCG(seed, 9))}
	n.nextTo, n.nextFrom, n.nextCut = n.distance(toDest), n.distance(fromDest), n.distance(cuts)
	return n
}

// distance is how many bytes go before the next trouble.
func (n *noise) distance(mean int64) int64 {
	if mean == 0 {
		return 1 << 62
	}
	return n.rnd.Int64N(2 * mean)
}

// change flips what is due in b.
func (n *noise) change(b []byte, next *int64, mean int64) {
	at := int64(0)
	for at+*next < int64(len(b)) {
		at += *next
		b[at] ^= 1 << n.rnd.IntN(8)
		n.flipped++
		at++
		*next = n.distance(mean)
	}
	*next -= int64(len(b)) - at
}

func (n *noise) counts() (flipped, cut int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.flipped, n.cut
}

// noisyConn is the source's end of a connection.
type noisyConn struct {
	net.Conn
	n *noise
}

func (c *noisyConn) Write(p []byte) (int, error) {
	b := bytes.Clone(p)
	c.n.mu.Lock()
	c.n.change(b, &c.n.nextTo, c.n.toDest)
	c.n.nextCut -= int64(len(b))
	cut := c.n.nextCut < 0
	if cut {
		c.n.nextCut = c.n.distance(c.n.cuts)
		c.n.cut++
	}
	c.n.mu.Unlock()
	if !cut {
		return c.Conn.Write(b)
	}
	n, _ := c.Conn.Write(b[:len(b)/2])
	_ = c.Close()
	return n, io.ErrClosedPipe
}

func (c *noisyConn) Read(p []byte) (int, error) {
	got, err := c.Conn.Read(p)
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	c.n.change(p[:got], &c.n.nextFrom, c.n.fromDest)
	return got, err
}

// TestBadNetworkChangesNothing moves a disk that is in use over a network that
// changes bits in both directions and cuts, hundreds of times: what arrives, and
// what is read and written meanwhile, is right to the byte.
func TestBadNetworkChangesNothing(t *testing.T) {
	for seed := range uint64(3) {
		synctest.Test(t, func(t *testing.T) {
			n := newNoise(seed, 50<<10, 60<<10, 500<<10)
			src, dst, said := moveOverNoise(t, n, seed, 16<<20+1234, 4096)
			flipped, cut := n.counts()
			require.GreaterOrEqual(t, flipped, 200)
			require.GreaterOrEqual(t, cut, 10)
			require.GreaterOrEqual(t, dst.Damaged, int64(100))
			require.Positive(t, src.Damaged)
			require.Contains(t, said, "bytes were changed on the way")
			require.Less(t, strings.Count(said, "bytes were changed on the way"), 12, "a line a burst")
		})
	}
}

// TestBadNetworkFromTheFirstByte is the same where it is so bad that few
// connections get far, and all that they begin with is changed now and then.
func TestBadNetworkFromTheFirstByte(t *testing.T) {
	for seed := range uint64(60) {
		synctest.Test(t, func(t *testing.T) { moveOverNoise(t, newNoise(seed, 3<<10, 4<<10, 10<<10), seed, 60_000, 512) })
	}
}

// moveOverNoise moves a disk of size bytes that is in use, and checks every byte.
func moveOverNoise(t *testing.T, n *noise, seed uint64, size, blockSize int64) (srcEnd, dstEnd DiskStatus, log string) {
	t.Helper()
	store, want := testDisk(t, int(size), seed)
	want = bytes.Clone(want)
	var said strings.Builder // guarded by the handler
	logger := slog.New(slog.NewTextHandler(&said, nil))
	id := Identity{UUID: [16]byte{1}, Generation: 1}
	src := newSource(t, SourceOptions{BlockSize: blockSize, Rate: 4 << 20, Listening: true, Log: logger}, SourceDisk{Name: "disk", Store: store, Identity: id})
	w := newWires()
	w.wrap = func(c net.Conn) io.ReadWriteCloser { return &noisyConn{c, n} }
	m := migrate(t, src, newDestination(t, DestinationOptions{Disks: 1, Listening: true, Log: logger}, memory), w)
	dev := <-m.dst.ready
	rnd := rand.New(rand.NewPCG(seed, 1))
	for range 300 {
		buf := make([]byte, 1+rnd.IntN(3*int(blockSize)))
		off := rnd.Int64N(size - int64(len(buf)))
		if rnd.IntN(2) == 0 {
			_, err := dev.ReadAtContext(t.Context(), buf, off)
			require.NoError(t, err)
			require.True(t, bytes.Equal(want[off:off+int64(len(buf))], buf), "seed %d, at %d", seed, off)
		} else {
			for i := range buf {
				buf[i] = byte(rnd.Uint32())
			}
			_, err := dev.WriteAtContext(t.Context(), buf, off)
			require.NoError(t, err)
			copy(want[off:], buf)
		}
		<-time.After(time.Duration(rnd.IntN(20)) * time.Millisecond)
	}
	require.Equal(t, []error{nil, nil}, m.end())
	require.True(t, bytes.Equal(want, contents(t, m.dst.disks["disk"])), "seed %d", seed)
	flipped, cut := n.counts()
	srcEnd, dstEnd = src.Status()[0], m.dst.Status()[0]
	t.Logf("seed %d: %d bits changed, %d cuts; the destination saw %d, the source %d", seed, flipped, cut, dstEnd.Damaged, srcEnd.Damaged)
	require.NoError(t, m.dst.Close())
	return srcEnd, dstEnd, said.String()
}

// A plain Silo destination never says a word of its own: it is waited for, for a
// moment, and then fed as ever. What it asks for meanwhile goes at once.
func TestPlainPeerIsNotWaitedForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, want := testDisk(t, 1<<20, 1)
		src := newSource(t, SourceOptions{}, SourceDisk{Name: "a", Store: store})
		a, b := net.Pipe()
		d := &plainDestination{rawPeer: newRawPeer(b)}
		began := time.Now()
		var wg sync.WaitGroup
		var peerErr error
		wg.Go(func() { peerErr = d.run(); _ = b.Close() })
		require.NoError(t, src.Run(t.Context(), once(a)))
		wg.Wait()
		require.NoError(t, peerErr)
		require.True(t, bytes.Equal(want, d.devs[firstDevice].data))
		require.Less(t, time.Since(began), time.Second)
	})
}

// Damaged blocks are sent again at once, alone, as often as it takes; only that
// ends it which the destination itself refuses.
func TestDamagedBlocksGoAgainAlone(t *testing.T) {
	geo, err := newGeometry(64*512, 512)
	require.NoError(t, err)
	o := newOrder(geo)
	o.ask(3*512, 512)
	s, ok := o.nextUrgent(8)
	require.True(t, ok)
	for range 10 * maxAttempts {
		o.again(s)
		s, ok = o.nextUrgent(8)
		require.True(t, ok)
		require.Equal(t, span{3, 4}, s)
	}
	o.done(s)
	b, _, ok := o.peekBulk()
	require.True(t, ok)
	s, ok = o.takeBulk(b, 3)
	require.True(t, ok)
	require.Equal(t, span{4, 7}, s)
	o.drop(5*512, 512) // while it is on its way
	o.again(s)
	for _, from := range []int64{4, 6} {
		b, _, ok = o.peekBulk()
		require.True(t, ok)
		s, ok = o.takeBulk(b, 8)
		require.True(t, ok)
		require.Equal(t, span{from, from + 1}, s)
		o.done(s)
	}
	require.EqualValues(t, 60, o.unsettled())
}

func TestDamageIsToldOnceABurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var said strings.Builder
		log := slog.New(slog.NewTextHandler(&said, nil))
		var d damage
		lines := func() int { return strings.Count(said.String(), "\n") }
		for range 1000 {
			d.note(log, "a")
		}
		require.Equal(t, 1, lines())
		<-time.After(damageQuiet)
		d.note(log, "a")
		require.Equal(t, 2, lines())
		for range 100 { // it does not stop
			<-time.After(time.Second)
			d.note(log, "a")
		}
		require.Equal(t, 3, lines())
		require.EqualValues(t, 1101, d.count())
		d.noteEnd(log, "a", io.EOF)
		d.noteEnd(log, "a", fmt.Errorf("a packet: %w", &protocol.RemoteError{Damaged: true}))
		require.EqualValues(t, 1101, d.count(), "neither ended a connection because of its bytes")
		d.noteEnd(log, "a", fmt.Errorf("a packet: %w", wire.ErrChecksum))
		require.EqualValues(t, 1102, d.count())
	})
}

// TestDestinationThatIsSlowToOpenIsNoDamage: it is asked who it is before it gets data, so
// nothing is sent that it must refuse for want of a checksum (fault X4).
func TestDestinationThatIsSlowToOpenIsNoDamage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, want := testDisk(t, 4<<20, 1)
		var log syncBuffer
		src := newSource(t, SourceOptions{BlockSize: 4096, Listening: true, Log: slog.New(slog.NewTextHandler(&log, nil))}, SourceDisk{Name: "disk", Store: store})
		dst := newDestination(t, DestinationOptions{Listening: true, Disks: 1}, func(n string, s uint64) storage.StorageProvider {
			<-time.After(5 * time.Second) // a large map on a busy disk
			return memory(n, s)
		})
		m := migrate(t, src, dst, newWires())
		require.Equal(t, []error{nil, nil}, m.end())
		require.Equal(t, int64(4<<20*3/4), src.Status()[0].BytesSent, "a quarter is zeroes, and nothing went twice")
		require.Zero(t, src.Status()[0].Damaged)
		require.Zero(t, log.count("changed on the way"))
		require.True(t, bytes.Equal(want, contents(t, dst.disks["disk"])))
		require.NoError(t, dst.Close())
	})
}
