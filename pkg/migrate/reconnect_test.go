package migrate

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

var errRefusedConn = errors.New("connection refused")

func refuse(context.Context) (io.ReadWriteCloser, error) { return nil, errRefusedConn }

func TestFirstConnectionThatFailsEndsAtOnce(t *testing.T) {
	store, _ := testDisk(t, 4096, 1)
	src := newSource(t, SourceOptions{}, SourceDisk{Name: "disk", Store: store})
	require.ErrorIs(t, src.Run(t.Context(), refuse), errRefusedConn)
}

// A destination that is known may be away when its source begins anew, and hang
// up before it has said anything.
func TestKnownDestinationIsWaitedForFromTheStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _ := testDisk(t, 4096, 1)
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		tries, met := 0, false
		src := newSource(t, SourceOptions{Known: true, Met: func() { met = true }}, SourceDisk{Name: "disk", Store: store})
		require.ErrorIs(t, src.Run(ctx, func(context.Context) (io.ReadWriteCloser, error) {
			if tries++; tries%2 == 0 {
				return nil, errRefusedConn
			}
			a, b := net.Pipe()
			return a, b.Close()
		}), context.DeadlineExceeded)
		require.Greater(t, tries, 100)
		require.False(t, met)
	})
}

// TestReconnectingGoesOnAndSaysSo is trap W4.
func TestReconnectingGoesOnAndSaysSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		var tries []time.Duration
		begin := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		loop := sessions{
			log: slog.New(slog.NewTextHandler(&log, nil)),
			connect: func(context.Context) (io.ReadWriteCloser, error) {
				if tries = append(tries, time.Since(begin)); len(tries) == 1 {
					return nil, nil
				}
				return nil, errRefusedConn
			},
			session: func(context.Context, *caller) (bool, error) { return true, io.EOF },
		}
		require.ErrorIs(t, loop.run(ctx), context.DeadlineExceeded)
		require.GreaterOrEqual(t, tries[1], 50*time.Millisecond)
		require.LessOrEqual(t, tries[1], 100*time.Millisecond)
		for i := 1; i < len(tries); i++ {
			require.LessOrEqual(t, tries[i]-tries[i-1], maxBackoff)
		}
		lines := strings.Count(log.String(), "trying again")
		require.InDelta(t, 10, lines, 1, "a line a minute")
	})
}

// A connection that works for a second and breaks is made again at once, each
// time, and that is told once a minute.
func TestConnectionThatBreaksOftenIsMadeAgainAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		n, begin := 0, time.Now()
		loop := sessions{
			log:     slog.New(slog.NewTextHandler(&log, nil)),
			connect: func(context.Context) (io.ReadWriteCloser, error) { return nil, nil },
			session: func(context.Context, *caller) (bool, error) {
				if n++; n > 200 {
					return true, nil
				}
				<-time.After(goodSession + time.Millisecond)
				return true, io.EOF
			},
		}
		require.NoError(t, loop.run(t.Context()))
		require.Less(t, time.Since(begin), 200*(goodSession+firstBackoff+2*time.Millisecond))
		require.Equal(t, 4, strings.Count(log.String(), "trying again"))
		require.NotContains(t, log.String(), "for=1", "each time anew")
	})
}

// Who listens says once a minute what it waits for, and for how long.
func TestListenerSaysThatNobodyComes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute+time.Second)
		defer cancel()
		n := 0
		loop := sessions{
			listening: true, log: slog.New(slog.NewTextHandler(&log, nil)),
			lack: func() []any { return lacking([]DiskStatus{{Size: 100, BytesDone: 60, Waiting: 3}}) },
			connect: func(ctx context.Context) (io.ReadWriteCloser, error) {
				if n++; n == 1 {
					return nil, nil
				}
				<-ctx.Done()
				return nil, context.Cause(ctx)
			},
			session: func(context.Context, *caller) (bool, error) {
				<-time.After(time.Hour / 60 / 2)
				return true, io.EOF
			},
		}
		require.ErrorIs(t, loop.run(ctx), context.DeadlineExceeded)
		require.Equal(t, 1, strings.Count(log.String(), "the connection has ended"))
		require.Equal(t, 9, strings.Count(log.String(), "no connection: waiting for the other side to connect"))
		require.Contains(t, log.String(), "for=9m0s missing_bytes=40 waiting_reads=3")
	})
}

// A link that is cut again and again costs a short pause each time, as long as
// something moves in between.
func TestProgressEndsTheBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, moved, begin := 0, int64(0), time.Now()
		loop := sessions{
			log:     logger(nil),
			connect: func(context.Context) (io.ReadWriteCloser, error) { return nil, nil },
			moved:   func() int64 { return moved },
			session: func(context.Context, *caller) (bool, error) {
				if n++; n == 300 {
					return true, nil
				}
				if n < 200 {
					moved++
				}
				return true, io.EOF
			},
		}
		require.NoError(t, loop.run(t.Context()))
		most := 199*firstBackoff + 126*firstBackoff + 94*maxBackoff
		require.LessOrEqual(t, time.Since(begin), most)
		require.GreaterOrEqual(t, time.Since(begin), most/2)
	})
}

func TestStrangerDoesNotEndAListener(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, begin := 0, time.Now()
		loop := sessions{
			listening: true, log: logger(nil),
			connect: func(context.Context) (io.ReadWriteCloser, error) { return nil, nil },
			session: func(context.Context, *caller) (bool, error) {
				if n++; n < 5 {
					return false, errors.New("not our protocol")
				}
				return true, nil
			},
		}
		require.NoError(t, loop.run(t.Context()))
		require.Zero(t, time.Since(begin), "and does not keep the next caller waiting")
		loop.connect = func(context.Context) (io.ReadWriteCloser, error) { return nil, net.ErrClosed }
		require.ErrorIs(t, loop.run(t.Context()), net.ErrClosed, "a listener that is closed does not come back")
	})
}

func TestFatalErrorEndsAtOnce(t *testing.T) {
	fatal := &FatalError{errors.New("another disk")}
	loop := sessions{
		log:     logger(nil),
		connect: func(context.Context) (io.ReadWriteCloser, error) { return nil, nil },
		session: func(context.Context, *caller) (bool, error) { return true, fatal },
	}
	require.ErrorIs(t, loop.run(t.Context()), fatal)
}

func TestSilentPeerIsGivenUpOnEitherSide(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _ := testDisk(t, 4096, 1)
		src := newSource(t, SourceOptions{}, SourceDisk{Name: "disk", Store: store})
		a, b := net.Pipe()
		go func() { _, _ = io.Copy(io.Discard, b) }() // until a is closed
		require.ErrorIs(t, src.Run(t.Context(), once(a)), errSilent)

		c, d := net.Pipe()
		defer d.Close()
		dst := newDestination(t, DestinationOptions{}, memory)
		require.ErrorIs(t, dst.Run(t.Context(), once(c)), errSilent)
	})
}
