package migrate

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/protocol"
)

// outage is what was said of the time without a connection.
type outage struct {
	since time.Time // zero: there was a connection until now
	told  time.Time
	what  string // was told
}

// refusedError says that we did not take the source's disks.
type refusedError struct{ error }

func (e *refusedError) Unwrap() error { return e.error }

// say says why there is no connection any more or, of many tries that end alike,
// once a minute that there is none. Who listens hears of each that has ended.
func (s *sessions) say(err error) {
	what, always := "no connection to the other side; trying again until it is back", false
	level := slog.LevelWarn
	var none *connectError
	var byUs *refusedError
	var byThem *protocol.RefusedError
	switch {
	case errors.As(err, &byUs):
		what, level = "the source was refused; waiting for the right one", slog.LevelError
	case errors.As(err, &byThem):
		what, level, err = "the destination refuses; waiting for one that does not", slog.LevelError, byThem
	case errors.As(err, new(*differsError)):
		what, level = "the destination has another disk; waiting for one that has this one", slog.LevelError
	case s.listening && !errors.As(err, &none):
		what, always = "the connection has ended; waiting for the next", true
	}
	now := time.Now()
	if s.out.since.IsZero() {
		s.out.since = now
	}
	if !always && what == s.out.what && now.Sub(s.out.told) < outageLogEvery {
		return
	}
	more := []any{"cause", cut(err.Error(), maxReason)}
	if always {
		skipped, ok := s.lines.take()
		if !ok {
			return
		}
		if skipped > 0 {
			more = append(more, "lines_left_out", skipped)
		}
	}
	s.out.told, s.out.what = now, what
	s.log.Log(context.Background(), level, what, s.details(now, more...)...)
}

// details are what a line about an outage says beside its words.
func (s *sessions) details(now time.Time, more ...any) []any {
	more = append(more, "for", now.Sub(s.out.since).Round(time.Second))
	if s.lack != nil {
		more = append(more, s.lack()...)
	}
	return more
}

// next returns the next connection. Who listens may wait long for it, and says so
// once a minute.
func (s *sessions) next(ctx context.Context) (*caller, error) {
	dial := func(ctx context.Context) (*caller, error) {
		conn, err := s.connect(ctx)
		if err != nil {
			return nil, err
		}
		return newCaller(conn), nil
	}
	switch {
	case !s.listening:
		return dial(ctx)
	case s.lobby.max > 0:
		dial = s.lobby.next
	}
	if s.out.since.IsZero() {
		s.out.since = time.Now()
	}
	var wg sync.WaitGroup
	saying, stop := context.WithCancel(ctx)
	wg.Go(func() { s.sayLoop(saying) })
	c, err := dial(ctx)
	stop()
	wg.Wait()
	return c, err
}

// sayLoop says once a minute that nobody connects.
func (s *sessions) sayLoop(ctx context.Context) {
	t := time.NewTimer(outageLogEvery)
	defer t.Stop()
	for {
		select {
		case now := <-t.C:
			s.log.Warn("no connection: waiting for the other side to connect", s.details(now)...)
			t.Reset(outageLogEvery)
		case <-ctx.Done():
			return
		}
	}
}

// lacking is what the disks lack, for the log.
func lacking(disks []DiskStatus) []any {
	var missing int64
	waiting := 0
	for _, d := range disks {
		if d.State != StateComplete {
			missing += d.Size - d.BytesDone
		}
		waiting += d.Waiting
	}
	return []any{"missing_bytes", missing, "waiting_reads", waiting}
}
