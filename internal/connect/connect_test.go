package connect

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/internal/addr"
	"github.com/silo-nbd/silo-nbd/internal/tlsdir"
	"github.com/silo-nbd/silo-nbd/internal/tlsdir/tlstest"
)

var errRefused = errors.New("refused")

// dialerThat dials by calling f, in the bubble of a test.
func dialerThat(first time.Duration, f func(ctx context.Context) (net.Conn, error)) *dialer {
	a, _ := addr.Parse("unix:///run/other.sock") // known to be valid
	return &dialer{addr: a, dial: f, first: first}
}

func TestFirstConnectionIsTriedForAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		d := dialerThat(10*time.Second, func(context.Context) (net.Conn, error) {
			if time.Since(start) < 5*time.Second {
				return nil, errRefused
			}
			ours, theirs := net.Pipe()
			theirs.Close()
			return ours, nil
		})
		conn, err := d.Next(t.Context())
		require.NoError(t, err)
		conn.Close()
		require.InDelta(t, 5, time.Since(start).Seconds(), 0.2)
	})
}

func TestFirstConnectionIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		d := dialerThat(3*time.Second, func(context.Context) (net.Conn, error) { return nil, errRefused })
		_, err := d.Next(t.Context())
		require.ErrorIs(t, err, errRefused)
		require.ErrorContains(t, err, "no connection within 3s")
		require.InDelta(t, 3, time.Since(start).Seconds(), 0.2)
	})
}

func TestHostThatDoesNotAnswerIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		d := dialerThat(3*time.Second, func(ctx context.Context) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		})
		_, err := d.Next(t.Context())
		require.ErrorContains(t, err, "unix:///run/other.sock does not answer")
		require.Equal(t, 3*time.Second, time.Since(start))
	})
}

// The last try may have little time; what the one before has said is worth more.
func TestLastTryDoesNotHideTheReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tries := 0
		d := dialerThat(300*time.Millisecond, func(ctx context.Context) (net.Conn, error) {
			if tries++; tries == 1 {
				return nil, errRefused
			}
			<-ctx.Done()
			return nil, ctx.Err()
		})
		_, err := d.Next(t.Context())
		require.ErrorIs(t, err, errRefused)
		require.Equal(t, 2, tries)
	})
}

func TestLaterConnectionsAreTriedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tries := 0
		d := dialerThat(3*time.Second, func(context.Context) (net.Conn, error) {
			tries++
			if tries > 1 {
				return nil, errRefused
			}
			ours, theirs := net.Pipe()
			theirs.Close()
			return ours, nil
		})
		conn, err := d.Next(t.Context())
		require.NoError(t, err)
		conn.Close()
		start := time.Now()
		_, err = d.Next(t.Context())
		require.ErrorIs(t, err, errRefused)
		require.Zero(t, time.Since(start), "when to try again is the migration's business")
		require.Equal(t, 2, tries)
	})
}

func TestCancelEndsDialing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		why := errors.New("enough")
		time.AfterFunc(time.Second, func() { cancel(why) })
		d := dialerThat(time.Hour, func(context.Context) (net.Conn, error) { return nil, errRefused })
		_, err := d.Next(ctx)
		require.ErrorIs(t, err, why)
	})
}

func listener(t *testing.T) (net.Listener, addr.Addr) {
	t.Helper()
	a, err := addr.Parse("unix://" + filepath.Join(t.TempDir(), "s"))
	require.NoError(t, err)
	ln, err := a.Listen(t.Context())
	require.NoError(t, err)
	return ln, a
}

func TestAcceptGivesOneConnectionAfterAnother(t *testing.T) {
	ln, a := listener(t)
	ends := Accept(ln, nil, slog.New(slog.DiscardHandler))
	for _, word := range []string{"one", "two"} {
		conn, err := a.Dial(t.Context())
		require.NoError(t, err)
		_, err = io.WriteString(conn, word)
		require.NoError(t, err)
		require.NoError(t, conn.Close())
	}
	for _, want := range []string{"one", "two"} {
		conn, err := ends.Next(t.Context())
		require.NoError(t, err)
		got, err := io.ReadAll(conn)
		require.NoError(t, err)
		require.Equal(t, want, string(got))
		require.NoError(t, conn.Close())
	}
	require.NoError(t, ends.Close())
}

func TestCancelEndsAccepting(t *testing.T) {
	ln, _ := listener(t)
	ends := Accept(ln, nil, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	cancel(why)
	_, err := ends.Next(ctx)
	require.ErrorIs(t, err, why)
	require.NoError(t, ends.Close())
}

func TestCloseEndsAccepting(t *testing.T) {
	ln, a := listener(t)
	ends := Accept(ln, nil, slog.New(slog.DiscardHandler))
	conn, err := a.Dial(t.Context()) // one that nobody takes
	require.NoError(t, err)
	defer conn.Close()
	require.NoError(t, ends.Close())
	require.NoError(t, ends.Close(), "closing twice")
	_, err = ends.Next(t.Context())
	require.ErrorIs(t, err, net.ErrClosed)
	_, err = conn.Read(make([]byte, 1))
	require.Error(t, err, "the one that nobody took is closed")
}

// brieflyBroken fails with the errors that it has left, then accepts.
type brieflyBroken struct {
	net.Listener
	errs []error
}

func (l *brieflyBroken) Accept() (net.Conn, error) {
	if len(l.errs) == 0 {
		return l.Listener.Accept()
	}
	err := l.errs[0]
	l.errs = l.errs[1:]
	return nil, err
}

// A process that is out of file descriptors for a moment goes on accepting: the
// migration could not have another connection ever again.
func TestAcceptingOutlivesErrorsThatPass(t *testing.T) {
	ln, a := listener(t)
	var log bytes.Buffer
	failed := func(err syscall.Errno) error {
		return &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", err)}
	}
	broken := &brieflyBroken{ln, []error{failed(syscall.EMFILE), failed(syscall.ENFILE), failed(syscall.EMFILE)}}
	ends := Accept(broken, nil, slog.New(slog.NewTextHandler(&log, nil)))
	ours, err := a.Dial(t.Context())
	require.NoError(t, err)
	defer ours.Close()
	theirs, err := ends.Next(t.Context())
	require.NoError(t, err)
	require.NoError(t, theirs.Close())
	require.NoError(t, ends.Close())
	require.Equal(t, 1, strings.Count(log.String(), "cannot accept a connection now"), log.String())
}

// lastingTrouble has no file descriptor left until a moment.
type lastingTrouble struct {
	*oneListener
	until time.Time
	tries int
}

func (l *lastingTrouble) Accept() (net.Conn, error) {
	if l.tries++; time.Now().Before(l.until) {
		return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
	}
	return l.oneListener.Accept()
}

// A process without a file descriptor left does not fill the log, nor try without
// end (fault H5).
func TestTroubleThatLastsIsToldOnceAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		ln := &lastingTrouble{oneListener: &oneListener{closed: make(chan struct{})}, until: time.Now().Add(10 * time.Minute)}
		ends := Accept(ln, nil, slog.New(slog.NewTextHandler(&log, nil)))
		<-time.After(11 * time.Minute)
		require.NoError(t, ends.Close())
		require.InDelta(t, 600, ln.tries, 10)
		require.Equal(t, 10, strings.Count(log.String(), "cannot accept a connection now"))
	})
}

// Connections that say nothing, 200 of them and renewed all the time, do not keep
// out who has a certificate (fault B4, trap R3).
func TestIdleHandshakesKeepNoPeerOut(t *testing.T) {
	a, err := tlstest.NewAuthority()
	require.NoError(t, err)
	tcp, err := addr.Parse("127.0.0.1:0")
	require.NoError(t, err)
	ln, err := tcp.Listen(t.Context())
	require.NoError(t, err)
	to := addr.Of(ln.Addr())
	accepted := Accept(ln, directory(t, a, tlsdir.Options{Listen: true}), slog.New(slog.DiscardHandler))
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 200 {
		wg.Go(func() {
			for ctx.Err() == nil {
				conn, err := to.Dial(ctx)
				if err != nil {
					continue // ctx has ended, or ports are short for a moment
				}
				stop := context.AfterFunc(ctx, func() { conn.Close() })
				_, _ = io.Copy(io.Discard, conn) // until it is dropped
				stop()
				conn.Close()
			}
		})
	}
	for range 3 {
		var end sync.WaitGroup
		dialling, met := context.WithTimeout(t.Context(), 2*dialTimeout)
		end.Go(func() {
			for dialling.Err() == nil { // as a migration does
				if ours, err := Dial(to, dialTimeout, directory(t, a, tlsdir.Options{Dial: true})).Next(dialling); err == nil {
					_, _ = io.Copy(io.Discard, ours) // until it is closed
					_ = ours.Close()                 // its goodbye may find nobody
				}
			}
		})
		theirs, err := accepted.Next(dialling)
		require.NoError(t, err)
		met()
		_ = theirs.Close() // the other end may have gone
		end.Wait()
	}
	stop()
	wg.Wait()
	require.NoError(t, accepted.Close())
}

// Close does not wait out the pause between two tries, and an error that lasts
// ends accepting with its reason.
func TestErrorsOfAcceptEndWithClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := &oneListener{closed: make(chan struct{})}
		passing := &net.OpError{Op: "accept", Err: syscall.EMFILE}
		ends := Accept(&brieflyBroken{ln, []error{passing, passing, passing}}, nil, slog.New(slog.DiscardHandler))
		synctest.Wait()
		began := time.Now()
		require.NoError(t, ends.Close())
		require.Zero(t, time.Since(began))

		ln = &oneListener{closed: make(chan struct{})}
		ends = Accept(&brieflyBroken{ln, []error{errRefused}}, nil, slog.New(slog.DiscardHandler))
		_, err := ends.Next(t.Context())
		require.ErrorIs(t, err, errRefused)
		require.NoError(t, ends.Close())
	})
}

// directory is one for TLS, of the authority a.
func directory(t *testing.T, a *tlstest.Authority, o tlsdir.Options) *tlsdir.Dir {
	t.Helper()
	path := t.TempDir()
	require.NoError(t, a.Write(path, tlstest.Leaf{CommonName: "one"}))
	d, err := tlsdir.Open(path, o)
	require.NoError(t, err)
	return d
}

func TestConnectionsAreOfTLS(t *testing.T) {
	a, err := tlstest.NewAuthority()
	require.NoError(t, err)
	ln, to := listener(t)
	var log bytes.Buffer
	accepted := Accept(ln, directory(t, a, tlsdir.Options{Listen: true}), slog.New(slog.NewTextHandler(&log, nil)))

	// Some who say nothing, or something else, hold up nobody.
	for range 5 {
		silent, err := to.Dial(t.Context())
		require.NoError(t, err)
		defer silent.Close()
	}
	garbage, err := to.Dial(t.Context())
	require.NoError(t, err)
	_, err = garbage.Write(make([]byte, 100))
	require.NoError(t, err)
	_, err = io.Copy(io.Discard, garbage)
	require.NoError(t, err, "it is told to go")
	garbage.Close()

	for range 2 {
		ours, err := Dial(to, time.Second, directory(t, a, tlsdir.Options{Dial: true})).Next(t.Context())
		require.NoError(t, err)
		theirs, err := accepted.Next(t.Context())
		require.NoError(t, err)
		_, err = io.WriteString(ours, "word")
		require.NoError(t, err)
		word := make([]byte, 4)
		_, err = io.ReadFull(theirs, word)
		require.NoError(t, err)
		require.Equal(t, "word", string(word))
		require.NoError(t, theirs.Close())
		_ = ours.Close() // its goodbye may find nobody
	}
	require.NoError(t, accepted.Close())
	require.Contains(t, log.String(), "a connection was refused")
	require.Contains(t, log.String(), "does not speak TLS")
	require.Equal(t, 2, strings.Count(log.String(), "certificate=[one]"), log.String())
}

func TestWrongPeerIsNotTriedAgain(t *testing.T) {
	a, err := tlstest.NewAuthority()
	require.NoError(t, err)
	other, err := tlstest.NewAuthority()
	require.NoError(t, err)
	ln, to := listener(t)
	accepted := Accept(ln, directory(t, other, tlsdir.Options{Listen: true}), slog.New(slog.DiscardHandler))
	defer accepted.Close()
	_, err = Dial(to, time.Hour, directory(t, a, tlsdir.Options{Dial: true})).Next(t.Context())
	require.ErrorContains(t, err, "connect to "+to.String()+": TLS: the other side's certificate is not signed by a CA of ")
}

func TestSilentPeerIsGivenUp(t *testing.T) {
	a, err := tlstest.NewAuthority()
	require.NoError(t, err)
	certs := directory(t, a, tlsdir.Options{Listen: true, Dial: true})
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		ln := &oneListener{conn: theirs, closed: make(chan struct{})}
		var log bytes.Buffer
		accepted := Accept(ln, certs, slog.New(slog.NewTextHandler(&log, nil)))
		began := time.Now()
		_, err := ours.Read(make([]byte, 1))
		require.Error(t, err)
		require.Equal(t, shakeTimeout, time.Since(began))
		synctest.Wait()
		require.NoError(t, accepted.Close())
		require.Contains(t, log.String(), "no TLS handshake within 10s")
	})
}

// oneListener gives one connection.
type oneListener struct {
	conn   net.Conn
	closed chan struct{}
}

func (l *oneListener) Accept() (net.Conn, error) {
	if c := l.conn; c != nil {
		l.conn = nil
		return c, nil
	}
	<-l.closed
	return nil, net.ErrClosed
}
func (l *oneListener) Addr() net.Addr { return &net.UnixAddr{} }
func (l *oneListener) Close() error   { close(l.closed); return nil }
