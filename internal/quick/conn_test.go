package quick

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// pairs runs f with both ends of a TCP and of a unix connection: a quick one, also
// if that is waited for in place, and the standard library's.
func pairs(t *testing.T, f func(t *testing.T, c *Conn, peer net.Conn)) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			c, peer := pair(t, network)
			f(t, c, peer)
		})
		t.Run(network+" in place", func(t *testing.T) {
			f(inPlace(t, network))
		})
	}
}

func pair(t *testing.T, network string) (*Conn, net.Conn) {
	address := "127.0.0.1:0"
	if network == "unix" {
		address = filepath.Join(t.TempDir(), "s")
	}
	ln, err := net.Listen(network, address)
	require.NoError(t, err)
	defer ln.Close()
	peer, err := net.Dial(network, ln.Addr().String())
	require.NoError(t, err)
	accepted, err := ln.Accept()
	require.NoError(t, err)
	c := New(accepted).(*Conn)
	t.Cleanup(func() { _ = c.Close(); _ = peer.Close() })
	require.Equal(t, accepted, c.NetConn())
	return c, peer
}

func TestOtherConnectionsStayAsTheyAre(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	require.Equal(t, a, New(a))
}

// What is written in pieces of all sizes, by slices and by many, arrives as it was,
// also if it is more than the socket holds and both ways are in use.
func TestBytesArriveAsTheyWere(t *testing.T) {
	pairs(t, func(t *testing.T, c *Conn, peer net.Conn) {
		r := rand.New(rand.NewPCG(1, 2))
		there := make([]byte, 24<<20)
		rand.NewChaCha8([32]byte{1}).Read(there)
		back := make([]byte, 9<<20)
		rand.NewChaCha8([32]byte{2}).Read(back)
		var wg sync.WaitGroup
		defer wg.Wait()
		wg.Go(func() { _, _ = peer.Write(back) })
		got := make(chan []byte, 1)
		wg.Go(func() {
			b, _ := io.ReadAll(peer)
			got <- b
		})
		heard := make(chan []byte, 1)
		wg.Go(func() {
			b := make([]byte, len(back))
			_, _ = io.ReadFull(c, b)
			heard <- b
		})
		for left := there; len(left) > 0; {
			if r.IntN(2) == 0 {
				n := min(len(left), 1<<r.IntN(22))
				wrote, err := c.Write(left[:n])
				require.NoError(t, err)
				require.Equal(t, n, wrote)
				left = left[n:]
				continue
			}
			v, total := net.Buffers{nil}, 0
			for range r.IntN(200) {
				n := min(len(left), r.IntN(1<<r.IntN(23)))
				v = append(v, left[:n])
				left, total = left[n:], total+n
			}
			wrote, err := c.WriteBuffers(&v)
			require.NoError(t, err)
			require.EqualValues(t, total, wrote)
			require.Empty(t, v)
		}
		require.True(t, bytes.Equal(back, <-heard))
		require.NoError(t, c.CloseWrite())
		require.True(t, bytes.Equal(there, <-got))
	})
}

func TestTheEndsOfAConnectionAreToldApart(t *testing.T) {
	pairs(t, func(t *testing.T, c *Conn, peer net.Conn) {
		n, err := c.Read(nil)
		require.NoError(t, err)
		require.Zero(t, n)

		require.NoError(t, c.SetReadDeadline(time.Now()))
		_, err = c.Read(make([]byte, 1))
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		require.ErrorContains(t, err, "read "+c.LocalAddr().Network()+" ")
		require.NoError(t, c.SetReadDeadline(time.Time{}))

		require.NoError(t, peer.Close())
		_, err = c.Read(make([]byte, 1))
		require.Equal(t, io.EOF, err)
		var lost error
		for lost == nil { // over TCP the first may still go out
			_, lost = c.WriteBuffers(&net.Buffers{[]byte("a"), []byte("b")})
		}
		if lost, ok := lost.(*net.OpError); ok && lost.Err.(*os.SyscallError).Err != syscall.ECONNRESET {
			require.ErrorIs(t, lost, syscall.EPIPE)
		}
		_, err = c.Write([]byte("a"))
		require.ErrorIs(t, err, syscall.EPIPE)
		require.ErrorContains(t, err, "write "+c.LocalAddr().Network()+" ")
	})
}

func TestCloseWakesWhoReadsAndWhoWrites(t *testing.T) {
	pairs(t, func(t *testing.T, c *Conn, peer net.Conn) {
		full := make([]byte, 64<<20)
		require.NoError(t, c.SetWriteDeadline(time.Now().Add(10*time.Millisecond)))
		n, err := c.Write(full)
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		require.Positive(t, n, "what went out is told")
		require.NoError(t, c.SetWriteDeadline(time.Time{}))

		errs := make(chan error, 3)
		go func() { _, err := c.Read(make([]byte, 1)); errs <- err }()
		go func() { _, err := c.Write(full); errs <- err }()
		go func() { _, err := c.WriteBuffers(&net.Buffers{full}); errs <- err }()
		require.NoError(t, c.Close())
		for range 3 {
			require.ErrorIs(t, <-errs, net.ErrClosed)
		}
	})
}
