package addr

import (
	"crypto/tls"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func mustParse(t *testing.T, s string) Addr {
	t.Helper()
	a, err := Parse(s)
	require.NoError(t, err)
	return a
}

// connect returns both ends of a connection through ln.
func connect(t *testing.T, ln net.Listener) (dialed, accepted net.Conn) {
	t.Helper()
	type result struct {
		c   net.Conn
		err error
	}
	got := make(chan result, 1)
	go func() {
		c, err := ln.Accept()
		got <- result{c, err}
	}()
	dialed, err := Of(ln.Addr()).Dial(t.Context())
	require.NoError(t, err)
	r := <-got
	require.NoError(t, r.err)
	t.Cleanup(func() { dialed.Close(); r.c.Close() })
	return dialed, r.c
}

func requireTuned(t *testing.T, c net.Conn) {
	t.Helper()
	raw, err := c.(syscall.Conn).SyscallConn()
	require.NoError(t, err)
	err = raw.Control(func(fd uintptr) {
		for _, o := range []struct{ level, name, want int }{
			{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
			{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
			{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 5},
			{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 3},
			{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 3},
			{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 15000},
			{unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, 1 << 20},
		} {
			got, err := unix.GetsockoptInt(int(fd), o.level, o.name)
			require.NoError(t, err)
			require.Equal(t, o.want, got, "option %d of level %d", o.name, o.level)
		}
	})
	require.NoError(t, err)
}

func TestBothEndsOfATCPConnectionAreTuned(t *testing.T) {
	ln, err := mustParse(t, "127.0.0.1:0").Listen(t.Context())
	require.NoError(t, err)
	defer ln.Close()
	dialed, accepted := connect(t, ln)
	requireTuned(t, dialed)
	requireTuned(t, accepted)
}

func TestBothEndsOfAUnixConnectionHoldALargeAnswer(t *testing.T) {
	ln, err := mustParse(t, "unix://"+filepath.Join(t.TempDir(), "s")).Listen(t.Context())
	require.NoError(t, err)
	for what, ln := range map[string]net.Listener{"listened": ln, "adopted": Adopt(plainUnix(t))} {
		t.Run(what, func(t *testing.T) {
			defer ln.Close()
			dialed, accepted := connect(t, ln)
			for _, c := range []net.Conn{dialed, accepted} {
				require.GreaterOrEqual(t, sendBuffer(t, c), min(2*unixSendBuffer, 2*wmemMax(t)))
			}
		})
	}
}

func plainUnix(t *testing.T) net.Listener {
	t.Helper()
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	require.NoError(t, err)
	return ln
}

func sendBuffer(t *testing.T, c net.Conn) (n int) {
	t.Helper()
	raw, err := c.(syscall.Conn).SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) {
		n, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF)
	}))
	require.NoError(t, err)
	return n
}

// wmemMax is the most that a process may ask for.
func wmemMax(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/sys/net/core/wmem_max")
	require.NoError(t, err)
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	require.NoError(t, err)
	return n
}

func TestTuneLooksThroughTLSAndLeavesOthers(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	_, accepted := connect(t, ln)
	require.NoError(t, Tune(tls.Server(accepted, &tls.Config{})))
	requireTuned(t, accepted)

	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	require.NoError(t, Tune(a))
}

func TestPortInUseIsOneClearLine(t *testing.T) {
	ln, err := mustParse(t, "127.0.0.1:0").Listen(t.Context())
	require.NoError(t, err)
	defer ln.Close()
	taken := Of(ln.Addr())
	_, err = taken.Listen(t.Context())
	require.ErrorIs(t, err, syscall.EADDRINUSE)
	require.EqualError(t, err, "listen on "+taken.String()+
		": address already in use: another process listens there: stop it or choose another address")
}

func TestNobodyListeningIsOneClearLine(t *testing.T) {
	a := mustParse(t, "unix://"+filepath.Join(t.TempDir(), "s"))
	_, err := a.Dial(t.Context())
	require.ErrorIs(t, err, os.ErrNotExist)
	require.EqualError(t, err, "connect to "+a.String()+
		": no such file or directory: nobody listens there: is the other side running?")

	ln, err := mustParse(t, "127.0.0.1:0").Listen(t.Context())
	require.NoError(t, err)
	gone := Of(ln.Addr())
	require.NoError(t, ln.Close())
	_, err = gone.Dial(t.Context())
	require.EqualError(t, err, "connect to "+gone.String()+
		": connection refused: nobody listens there: is the other side running?")
}

func TestUnixSocketIsRemovedOnClose(t *testing.T) {
	a := mustParse(t, "unix://"+filepath.Join(t.TempDir(), "s"))
	ln, err := a.Listen(t.Context())
	require.NoError(t, err)
	require.FileExists(t, a.Path())
	connect(t, ln)
	require.NoError(t, ln.Close())
	require.NoFileExists(t, a.Path())
	require.NoError(t, ln.Close(), "Close is idempotent")
}

func TestStaleSocketIsReplaced(t *testing.T) {
	a := mustParse(t, "unix://"+filepath.Join(t.TempDir(), "s"))
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: a.Path(), Net: "unix"})
	require.NoError(t, err)
	dead.SetUnlinkOnClose(false)
	require.NoError(t, dead.Close())
	require.FileExists(t, a.Path())

	ln, err := a.Listen(t.Context())
	require.NoError(t, err)
	defer ln.Close()
	connect(t, ln)
}

func TestLiveSocketIsRefused(t *testing.T) {
	a := mustParse(t, "unix://"+filepath.Join(t.TempDir(), "s"))
	ln, err := a.Listen(t.Context())
	require.NoError(t, err)
	defer ln.Close()
	_, err = a.Listen(t.Context())
	require.ErrorIs(t, err, syscall.EADDRINUSE)
	require.EqualError(t, err, "listen on "+a.String()+
		": address already in use: another process listens there: stop it or choose another path")
	require.FileExists(t, a.Path())
}

func TestOtherFilesAreNeverRemoved(t *testing.T) {
	dir := t.TempDir()
	file, link, sub := filepath.Join(dir, "file"), filepath.Join(dir, "link"), filepath.Join(dir, "sub")
	require.NoError(t, os.WriteFile(file, []byte("precious"), 0o600))
	require.NoError(t, os.Symlink("/nowhere", link))
	require.NoError(t, os.Mkdir(sub, 0o700))
	for _, path := range []string{file, link, sub} {
		a := mustParse(t, "unix://"+path)
		_, err := a.Listen(t.Context())
		require.EqualError(t, err, "listen on "+a.String()+
			": a file that is no socket lies there: remove it or choose another path")
		_, err = os.Lstat(path)
		require.NoError(t, err)
	}
	content, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, "precious", string(content))
}

func TestCloseLeavesASuccessorsSocket(t *testing.T) {
	a := mustParse(t, "unix://"+filepath.Join(t.TempDir(), "s"))
	first, err := a.Listen(t.Context())
	require.NoError(t, err)
	require.NoError(t, os.Remove(a.Path()))
	second, err := a.Listen(t.Context())
	require.NoError(t, err)
	defer second.Close()
	require.NoError(t, first.Close())
	connect(t, second)
}

func TestMissingDirectoryIsOneClearLine(t *testing.T) {
	a := mustParse(t, "unix://"+filepath.Join(t.TempDir(), "none", "s"))
	_, err := a.Listen(t.Context())
	require.EqualError(t, err, "listen on "+a.String()+": no such file or directory: create the directory first")
}

func TestZeroAddrIsRefused(t *testing.T) {
	_, err := Addr{}.Listen(t.Context())
	require.EqualError(t, err, "listen: no address")
	_, err = Addr{}.Dial(t.Context())
	require.EqualError(t, err, "connect: no address")
}

func TestListeningLooksWithoutConnecting(t *testing.T) {
	for _, text := range []string{"tcp://127.0.0.1:0", "unix://" + filepath.Join(t.TempDir(), "s")} {
		a, err := Parse(text)
		require.NoError(t, err)
		ln, err := a.Listen(t.Context())
		require.NoError(t, err)
		a = Of(ln.Addr())
		is, err := Listening(a)
		require.NoError(t, err)
		require.True(t, is, text)
		require.NoError(t, ln.Close())
		is, err = Listening(a)
		require.NoError(t, err)
		require.False(t, is, text)
	}
}

// A listener on a link-local address tells its zone, without which nobody can
// connect to it (fault H8).
func TestLinkLocalListenerTellsItsZone(t *testing.T) {
	zoned := linkLocal(t)
	ln, err := mustParse(t, net.JoinHostPort(zoned, "0")).Listen(t.Context())
	require.NoError(t, err)
	defer ln.Close()
	at := Of(ln.Addr())
	require.Equal(t, zoned, at.Host())
	require.Contains(t, NBDURI(at, "vm"), strings.Replace(zoned, "%", "%25", 1))
	conn, err := at.Dial(t.Context())
	require.NoError(t, err)
	require.NoError(t, conn.Close())
}

// linkLocal is a link-local address of this host, with its zone.
func linkLocal(t *testing.T) string {
	t.Helper()
	all, err := net.Interfaces()
	require.NoError(t, err)
	for _, i := range all {
		addrs, err := i.Addrs()
		require.NoError(t, err)
		for _, a := range addrs {
			if ip, is := a.(*net.IPNet); is && ip.IP.To4() == nil && ip.IP.IsLinkLocalUnicast() {
				return ip.IP.String() + "%" + i.Name
			}
		}
	}
	t.Skip("no interface of this host has a link-local IPv6 address")
	return ""
}
