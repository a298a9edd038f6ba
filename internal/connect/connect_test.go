package connect

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/internal/addr"
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
	ends := Accept(ln, slog.New(slog.DiscardHandler))
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
	ends := Accept(ln, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	cancel(why)
	_, err := ends.Next(ctx)
	require.ErrorIs(t, err, why)
	require.NoError(t, ends.Close())
}

func TestCloseEndsAccepting(t *testing.T) {
	ln, a := listener(t)
	ends := Accept(ln, slog.New(slog.DiscardHandler))
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
