package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"time"
)

const (
	firstBackoff = 100 * time.Millisecond
	maxBackoff   = 10 * time.Second
	// outageLogEvery is how often a line says that there is no connection.
	outageLogEvery = time.Minute
	// greetTimeout is how long a new peer may take to say its first word.
	// It is longer than a dead connection takes to be noticed at the other end,
	// which may be busy with one.
	greetTimeout = 20 * time.Second
	// goodSession is how long a connection on which nothing moved has to last for
	// the pauses to begin anew, and longSession for the next failure to be told at once.
	goodSession = time.Second
	longSession = 10 * time.Second
)

// errSilent says that a peer took the connection and then said nothing.
var errSilent = fmt.Errorf("the peer took the connection but has said nothing for %v: is it the other end of a migration?", greetTimeout)

// FatalError says that connecting again cannot help.
type FatalError struct{ Err error }

func (e *FatalError) Error() string { return e.Err.Error() }

func (e *FatalError) Unwrap() error { return e.Err }

// sessions runs one session after another until one ends well.
type sessions struct {
	connect   Connector
	listening bool // connect accepts: a stranger that calls is not our end
	known     bool // there was a connection to the other side, also in an earlier life
	log       *slog.Logger
	// lack is what waits for the other side, for the log; nil says nothing.
	lack func() []any
	out  outage
	// lines bounds what those who connect to us can have logged.
	lines lineBudget
	// moved grows with what one side has sent and the other has taken; nil: not known.
	moved func() int64
	// session serves one connection, which it closes. greeted says that the
	// other side spoke our protocol.
	session func(ctx context.Context, c *caller) (greeted bool, err error)
	lobby   lobby // of a side that listens and greets side by side: its max is not 0
}

// run returns nil when a session ended well, the cause when ctx is done, and
// an error that connecting again cannot mend. Until the first connection on
// which the other side spoke our protocol that is every error, unless we are
// the one who listens.
func (s *sessions) run(ctx context.Context) error {
	if s.listening && s.lobby.max > 0 {
		inside, leave := context.WithCancelCause(ctx)
		defer s.lobby.wg.Wait()
		defer leave(ErrClosed)
		s.lobby.connect, s.lobby.log = s.connect, s.log
		s.lobby.open(inside)
	}
	for retry := newBackoff(); ; {
		began, moved := time.Now(), s.progress()
		greeted, err := s.once(ctx)
		var fatal *FatalError
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.As(err, &fatal), errors.Is(err, net.ErrClosed) && s.listening && !greeted:
			return err
		case !greeted && !s.known && !s.listening:
			return strange(err)
		}
		if greeted {
			s.known = true
			lasted := time.Since(began)
			if lasted > goodSession || s.progress() > moved {
				retry.reset()
				s.out.since = time.Time{}
			}
			if lasted > longSession {
				s.out = outage{}
			}
		}
		if err := s.pause(ctx, retry, err); err != nil {
			return err
		}
	}
}

func (s *sessions) progress() int64 {
	if s.moved == nil {
		return 0
	}
	return s.moved()
}

// connectError says that there was no connection at all.
type connectError struct{ error }

func (e *connectError) Unwrap() error { return e.error }

// pause waits before the next try. Who listens need not: the next try is to
// accept, unless that is what failed.
func (s *sessions) pause(ctx context.Context, retry *backoff, err error) error {
	s.say(err)
	var none *connectError
	if s.listening && !errors.As(err, &none) {
		return nil
	}
	return retry.wait(ctx)
}

func (s *sessions) once(ctx context.Context) (greeted bool, err error) {
	c, err := s.next(ctx)
	if err != nil {
		return false, &connectError{err}
	}
	if s.lobby.max > 0 && s.listening {
		return s.lobby.attend(ctx, c, s.session)
	}
	return s.session(ctx, c)
}

// strange says more of a connection that ended before the other side had spoken.
func strange(err error) error {
	switch {
	case errors.As(err, new(*connectError)), errors.Is(err, errSilent):
		return err
	case errors.Is(err, io.EOF):
		return fmt.Errorf("the other side closed the connection before it said anything; its log says why: %w", err)
	}
	return fmt.Errorf("the other side is not the other end of a migration, or the connection broke: %w", err)
}

// backoff waits longer and longer between tries.
type backoff struct{ pause time.Duration }

func newBackoff() *backoff { return &backoff{firstBackoff} }

func (b *backoff) reset() { b.pause = firstBackoff }

// wait waits for half of the pause, and up to the other half by chance, so that
// many who lost the same peer do not come back in step.
func (b *backoff) wait(ctx context.Context) error {
	t := time.NewTimer(b.pause/2 + rand.N(b.pause/2+1))
	defer t.Stop()
	b.pause = min(2*b.pause, maxBackoff)
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
