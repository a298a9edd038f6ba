package link

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/internal/addr"
)

// start returns a link over unix sockets or loopback TCP to a server that
// hands its connections over.
func start(t *testing.T, network string, o Options) (*Link, <-chan net.Conn) {
	t.Helper()
	listen, target := "tcp://127.0.0.1:0", "tcp://127.0.0.1:0"
	if network == "unix" {
		dir := t.TempDir()
		listen, target = "unix://"+filepath.Join(dir, "l"), "unix://"+filepath.Join(dir, "t")
	}
	at, err := addr.Parse(target)
	require.NoError(t, err)
	server, err := at.Listen(t.Context())
	require.NoError(t, err)
	conns := make(chan net.Conn, 16)
	go func() {
		defer close(conns)
		for {
			c, err := server.Accept()
			if err != nil {
				return
			}
			conns <- c
		}
	}()
	o.Target = addr.Of(server.Addr())
	o.Listen, err = addr.Parse(listen)
	require.NoError(t, err)
	l, err := Listen(t.Context(), o)
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, l.Close())
		require.NoError(t, l.Close(), "Close is idempotent")
		require.Zero(t, l.Connections())
		server.Close()
		for c := range conns {
			c.Close()
		}
	})
	return l, conns
}

func dial(t *testing.T, l *Link) net.Conn {
	t.Helper()
	c, err := l.Addr().Dial(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

func eachNetwork(t *testing.T, test func(t *testing.T, network string)) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) { test(t, network) })
	}
}

func exchange(t *testing.T, from, to net.Conn, text string) {
	t.Helper()
	_, err := from.Write([]byte(text))
	require.NoError(t, err)
	got := make([]byte, len(text))
	_, err = io.ReadFull(to, got)
	require.NoError(t, err)
	require.Equal(t, text, string(got))
}

func TestBytesArriveUnchangedAndAreCounted(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		l, conns := start(t, network, Options{})
		client := dial(t, l)
		server := <-conns
		sent := make([]byte, 5<<20+7)
		_, _ = rand.NewChaCha8([32]byte{1}).Read(sent) // never fails
		go func() {
			_, _ = client.Write(sent) // a failure shows as missing bytes
			_ = client.(interface{ CloseWrite() error }).CloseWrite()
		}()
		got, err := io.ReadAll(server)
		require.NoError(t, err)
		require.True(t, bytes.Equal(sent, got))
		exchange(t, server, client, "the other way goes on after a half-close")
		require.NoError(t, server.Close())
		_, err = client.Read(make([]byte, 1))
		require.ErrorIs(t, err, io.EOF)
		require.NoError(t, l.Close())
		to, from := l.Bytes()
		require.EqualValues(t, len(sent), to)
		require.EqualValues(t, 40, from)
	})
}

func TestCutBreaksEveryConnectionAndTakesNewOnes(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		l, conns := start(t, network, Options{})
		var ends []net.Conn
		for range 3 {
			client := dial(t, l)
			server := <-conns
			exchange(t, client, server, "hello")
			ends = append(ends, client, server)
		}
		l.Cut()
		for _, c := range ends {
			_, err := c.Read(make([]byte, 1))
			if network == "tcp" {
				require.ErrorIs(t, err, syscall.ECONNRESET)
			} else {
				require.Error(t, err)
			}
		}
		exchange(t, dial(t, l), <-conns, "again")
	})
}

func TestStallKeepsConnectionsAndMovesNothing(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		l, conns := start(t, network, Options{})
		client := dial(t, l)
		server := <-conns
		exchange(t, client, server, "before")
		l.Stall(true)
		l.Stall(true)
		_, err := client.Write([]byte("during"))
		require.NoError(t, err)
		require.NoError(t, server.SetReadDeadline(time.Now().Add(50*time.Millisecond)))
		_, err = server.Read(make([]byte, 1))
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		dial(t, l) // accepted, and goes no further
		require.Empty(t, conns)

		l.Stall(false)
		require.NoError(t, server.SetReadDeadline(time.Time{}))
		got := make([]byte, 6)
		_, err = io.ReadFull(server, got)
		require.NoError(t, err)
		require.Equal(t, "during", string(got))
		(<-conns).Close()
	})
}

func TestCloseEndsAStalledLink(t *testing.T) {
	l, conns := start(t, "unix", Options{Rate: 1 << 10, Delay: time.Hour})
	client := dial(t, l)
	server := <-conns
	_, err := client.Write(make([]byte, 10<<10))
	require.NoError(t, err)
	l.Stall(true)
	dial(t, l)
	require.NoError(t, l.Close())
	_, err = server.Read(make([]byte, 1))
	require.Error(t, err)
}

func TestRefuseBreaksOnlyNewConnections(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		l, conns := start(t, network, Options{})
		old := dial(t, l)
		server := <-conns
		exchange(t, old, server, "old")
		l.Refuse(true)
		c, err := l.Addr().Dial(t.Context())
		if err == nil { // the reset may come before the dial has returned
			_, err = c.Read(make([]byte, 1))
			c.Close()
		}
		require.Error(t, err)
		require.Empty(t, conns, "the target hears nothing of it")
		exchange(t, old, server, "old goes on")
		l.Refuse(false)
		exchange(t, dial(t, l), <-conns, "new")
	})
}

func TestDeadTargetBreaksTheConnection(t *testing.T) {
	none, err := addr.Parse("unix://" + filepath.Join(t.TempDir(), "none"))
	require.NoError(t, err)
	at, err := addr.Parse("unix://" + filepath.Join(t.TempDir(), "l"))
	require.NoError(t, err)
	l, err := Listen(t.Context(), Options{Listen: at, Target: none})
	require.NoError(t, err)
	defer l.Close()
	_, err = dial(t, l).Read(make([]byte, 1))
	require.Error(t, err)
}

func TestListenRefusesWhatMakesNoSense(t *testing.T) {
	_, err := Listen(t.Context(), Options{Rate: -1})
	require.EqualError(t, err, "link: rate -1 and delay 0s: want none below zero")
	_, err = Listen(t.Context(), Options{})
	require.EqualError(t, err, "link: listen: no address")
}

func TestRateHoldsOverARealSocket(t *testing.T) {
	l, conns := start(t, "tcp", Options{Rate: 2 << 20})
	client := dial(t, l)
	server := <-conns
	began := time.Now()
	go func() {
		_, _ = client.Write(make([]byte, 1<<20)) // a failure shows as missing bytes
		client.Close()
	}()
	n, err := io.Copy(io.Discard, server)
	require.NoError(t, err)
	require.EqualValues(t, 1<<20, n)
	require.Greater(t, time.Since(began), 400*time.Millisecond)
}
