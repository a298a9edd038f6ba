package quick

import (
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// processors has the scheduler use n during a test.
func processors(t *testing.T, n int) {
	before := runtime.GOMAXPROCS(n)
	t.Cleanup(func() { runtime.GOMAXPROCS(before) })
}

// inPlace is a pair of which the quick one is waited for in place.
func inPlace(t *testing.T, network string) (*testing.T, *Conn, net.Conn) {
	processors(t, 2)
	c, peer := pair(t, network)
	c.WaitInPlace()
	require.NotNil(t, c.at.Load())
	t.Cleanup(func() {
		_ = c.Close()
		require.Zero(t, places.Load(), "its descriptors are open")
	})
	return t, c, peer
}

func TestOneProcessorIsLeftForAllElse(t *testing.T) {
	processors(t, 3)
	conns := make([]*Conn, 4)
	for i := range conns {
		conns[i], _ = pair(t, "unix")
		conns[i].WaitInPlace()
		conns[i].WaitInPlace() // counts once
	}
	at := func() (is []bool) {
		for _, c := range conns {
			is = append(is, c.at.Load() != nil)
		}
		return is
	}
	require.Equal(t, []bool{true, true, false, false}, at())
	require.NoError(t, conns[2].Close())
	conns[3].WaitInPlace()
	require.Equal(t, []bool{true, true, false, false}, at(), "taken by one that had none")
	require.NoError(t, conns[0].Close())
	require.ErrorIs(t, conns[0].Close(), net.ErrClosed)
	conns[2].WaitInPlace()
	conns[3].WaitInPlace()
	require.Equal(t, []bool{true, true, false, true}, at(), "one that is closed has none")
	require.NoError(t, conns[1].Close())
	require.NoError(t, conns[3].Close())
	require.Zero(t, places.Load())

	processors(t, 1)
	c, _ := pair(t, "unix")
	c.WaitInPlace()
	require.Nil(t, c.at.Load())
}

func TestADeadlineEndsAWaitUnderWay(t *testing.T) {
	pairs(t, func(t *testing.T, c *Conn, peer net.Conn) {
		for range 3 {
			errs := make(chan error, 2)
			go func() { _, err := c.Read(make([]byte, 1)); errs <- err }()
			go func() { _, err := c.Write(make([]byte, 64<<20)); errs <- err }()
			_, err := io.ReadFull(peer, make([]byte, 1<<20)) // the one that writes is at it
			require.NoError(t, err)
			require.NoError(t, c.SetDeadline(time.Now()))
			for range 2 {
				require.ErrorIs(t, <-errs, os.ErrDeadlineExceeded)
			}
			require.NoError(t, c.SetDeadline(time.Time{}))
			got := make(chan error, 1)
			go func() { _, err := c.Read(make([]byte, 1)); got <- err }()
			_, err = peer.Write([]byte{1})
			require.NoError(t, err)
			require.NoError(t, <-got, "the deadline was lifted")
		}
	})
}

func TestCloseEndsAWaitUnderWay(t *testing.T) {
	for _, told := range []bool{false, true} {
		for range 10 {
			_, c, _ := inPlace(t, "unix")
			p := c.at.Load()
			if told {
				require.NoError(t, c.SetDeadline(time.Time{}))
			}
			errs := make(chan error, 1)
			go func() { _, err := c.Read(make([]byte, 1)); errs <- err }()
			require.Eventually(t, func() bool {
				p.mu.Lock()
				defer p.mu.Unlock()
				return p.users == 1
			}, 10*time.Second, time.Millisecond)
			require.NoError(t, c.Close())
			require.ErrorIs(t, <-errs, net.ErrClosed)
			require.Zero(t, places.Load())
		}
	}
}

// What was set before a connection is waited for in place holds afterwards.
func TestDeadlinesStayWhenTheSocketIsReplaced(t *testing.T) {
	processors(t, 2)
	c, peer := pair(t, "tcp")
	require.NoError(t, c.SetReadDeadline(time.Now()))
	require.NoError(t, c.SetWriteDeadline(time.Now().Add(time.Hour)))
	c.WaitInPlace()
	_, err := c.Read(make([]byte, 1))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	_, err = c.Write([]byte{1})
	require.NoError(t, err)
	_, err = peer.Read(make([]byte, 1))
	require.NoError(t, err)
}

// While a socket is replaced it can be looked at, closed, and given deadlines.
func TestASocketIsReplacedWhileOthersUseIt(t *testing.T) {
	processors(t, 2)
	for range 300 {
		c, peer := pair(t, "unix")
		raw, err := c.SyscallConn()
		require.NoError(t, err)
		var wg sync.WaitGroup
		looks := 0
		wg.Go(func() {
			for c.at.Load() == nil {
				if err := raw.Control(func(uintptr) { looks++ }); err != nil {
					t.Errorf("the connection looks closed: %v", err)
				}
			}
		})
		wg.Go(func() {
			if err := c.SetReadDeadline(time.Now()); err != nil {
				t.Error(err)
			}
		})
		c.WaitInPlace()
		wg.Wait()
		_, err = c.Read(make([]byte, 1))
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		wg.Go(func() { _, _ = c.Write([]byte{1}) }) // may come before the end, or after
		require.NoError(t, c.Close())
		wg.Wait()
		require.Zero(t, places.Load())
		require.NoError(t, peer.Close())
		require.ErrorIs(t, raw.Control(func(uintptr) { t.Error("of a closed socket") }), net.ErrClosed)
		require.ErrorIs(t, c.SetReadDeadline(time.Time{}), net.ErrClosed)
	}
}

// lateRaw is a socket of which somebody has got hold when it is replaced.
type lateRaw struct {
	syscall.RawConn
	replace func()
}

func (r *lateRaw) Control(f func(fd uintptr)) error {
	if replace := r.replace; replace != nil {
		r.replace = nil
		replace()
	}
	return r.RawConn.Control(f)
}

func TestWhoComesTooLateForASocketFindsItsPlace(t *testing.T) {
	processors(t, 2)
	c, _ := pair(t, "unix")
	c.raw = &lateRaw{c.raw, c.WaitInPlace}
	raw, err := c.SyscallConn()
	require.NoError(t, err)
	looks := 0
	require.NoError(t, raw.Control(func(uintptr) { looks++ }))
	require.Equal(t, 1, looks)
	require.NotNil(t, c.at.Load())
}

func TestAClosedConnectionIsNotReplaced(t *testing.T) {
	processors(t, 2)
	for range 300 {
		c, peer := pair(t, "unix")
		var wg sync.WaitGroup
		wg.Go(func() { _ = c.Close() })
		c.WaitInPlace()
		wg.Wait()
		_, err := c.Read(make([]byte, 1))
		require.ErrorIs(t, err, net.ErrClosed)
		require.Zero(t, places.Load())
		_, err = peer.Read(make([]byte, 1))
		require.Error(t, err, "open")
	}
}
