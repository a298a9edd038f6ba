// Package connect gives a migration its connections, one after another: it
// dials the other end, or accepts what the other end dials.
package connect

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/addr"
	"github.com/silo-nbd/silo-nbd/internal/tlsdir"
	"github.com/silo-nbd/silo-nbd/pkg/crowd"
)

const (
	// dialTimeout is how long one try may take: a host that is switched off
	// does not answer at all.
	dialTimeout = 10 * time.Second
	// dialPause is between the tries of the first connection.
	dialPause = 100 * time.Millisecond
	// shakeTimeout is how long one that was accepted may take to show who it is.
	shakeTimeout = 10 * time.Second
	// maxShaking is how many may be about to at once; those that say nothing lose
	// their places to others that wait to be accepted.
	maxShaking = 64
	// acceptPause is before the next try when a connection could not be accepted,
	// as without a file descriptor left, at first; it doubles up to maxAcceptPause.
	acceptPause    = 50 * time.Millisecond
	maxAcceptPause = time.Second
	// acceptTold is how often that is told.
	acceptTold = time.Minute
)

// Ends gives connections to the other end.
type Ends interface {
	// Next returns the next connection. It waits for one until ctx ends.
	Next(ctx context.Context) (io.ReadWriteCloser, error)
	// Close lets go of what Next does not need any more. Connections that were
	// returned stay.
	Close() error
}

// Dial gives connections to a, by TLS if certs is not nil. The first is tried
// for as long as first, since the other end may be started a moment later; each
// after it once.
func Dial(a addr.Addr, first time.Duration, certs *tlsdir.Dir) Ends {
	d := &dialer{addr: a, dial: a.Dial, first: first}
	if certs != nil {
		d.dial = func(ctx context.Context) (net.Conn, error) {
			conn, err := a.Dial(ctx)
			if err != nil {
				return nil, err
			}
			if conn, err = certs.Client(ctx, conn, a.Host()); err != nil {
				return nil, fmt.Errorf("connect to %v: %w", a, err)
			}
			return conn, nil
		}
	}
	return d
}

type dialer struct {
	addr  addr.Addr
	dial  func(context.Context) (net.Conn, error)
	first time.Duration
	known atomic.Bool // somebody was there once
}

// Next implements Ends.
func (d *dialer) Next(ctx context.Context) (io.ReadWriteCloser, error) {
	if d.known.Load() {
		return d.once(ctx, dialTimeout)
	}
	began := time.Now()
	var before error // what the try before the last said
	for {
		conn, err := d.once(ctx, min(dialTimeout, d.first-time.Since(began)))
		if err == nil {
			d.known.Store(true)
			return conn, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		var there *tlsdir.HandshakeError
		if errors.As(err, &there) {
			return nil, err // somebody was there, and will be the same in a moment
		}
		if time.Since(began)+dialPause >= d.first {
			if errors.As(err, new(*noAnswerError)) && before != nil {
				err = before // the last one had little time
			}
			return nil, fmt.Errorf("no connection within %v: %w", d.first, err)
		}
		before = err
		if err := pause(ctx, dialPause); err != nil {
			return nil, err
		}
	}
}

// noAnswerError says that a try has taken too long.
type noAnswerError struct{ addr addr.Addr }

func (e *noAnswerError) Error() string { return e.addr.String() + " does not answer" }

func (d *dialer) once(ctx context.Context, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, &noAnswerError{d.addr})
	defer cancel()
	conn, err := d.dial(ctx)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return conn, err
}

// Close implements Ends.
func (*dialer) Close() error { return nil }

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// MaxCallers is how many connections are greeted side by side by whoever takes
// those of Accept.
const MaxCallers = 64

// Accept gives the connections that come to ln, and closes it in the end. One
// that comes while nobody wants it waits. If certs is not nil they are of TLS,
// and one that does not show who it is comes to nothing: the log says why.
func Accept(ln net.Listener, certs *tlsdir.Dir, log *slog.Logger) Ends {
	a := &acceptor{ln: ln, certs: certs, log: log, conns: make(chan net.Conn), ended: make(chan struct{})}
	ctx, stop := context.WithCancelCause(context.Background())
	a.stop = stop
	a.wg.Go(func() { a.acceptLoop(ctx) })
	return a
}

type acceptor struct {
	ln    net.Listener
	certs *tlsdir.Dir
	log   *slog.Logger
	wg    sync.WaitGroup // acceptLoop and the handshakes
	conns chan net.Conn

	once  sync.Once
	stop  context.CancelCauseFunc // called by Close: ends what acceptLoop began
	ended chan struct{}           // closed by acceptLoop after err is set
	err   error                   // why there are no more; read only after ended
}

// acceptLoop hands on what comes until the listener ends.
func (a *acceptor) acceptLoop(ctx context.Context) {
	defer close(a.ended)
	shaking, trouble := crowd.New(maxShaking), acceptTrouble{log: a.log}
	for {
		conn, err := a.ln.Accept()
		if err != nil {
			if !passes(err) || ctx.Err() != nil {
				a.err = err
				return
			}
			trouble.pause(ctx, err)
			continue
		}
		trouble.over()
		if a.certs == nil {
			a.hand(ctx, conn, conn)
			continue
		}
		place, err := shaking.Enter(ctx, crowd.Address(conn), func() { conn.Close() })
		if err != nil {
			conn.Close() // nothing was said on it
			continue     // the listener is closed
		}
		a.wg.Go(func() { a.shake(ctx, conn, place) })
	}
}

// acceptTrouble is what is known of errors of Accept.
type acceptTrouble struct {
	log    *slog.Logger
	next   time.Duration // pause before the next try
	told   time.Time
	untold int // errors since
}

// pause waits before the next try, longer each time, and says once in a while why.
func (t *acceptTrouble) pause(ctx context.Context, err error) {
	t.untold++
	if now := time.Now(); now.Sub(t.told) >= acceptTold {
		t.log.Warn("cannot accept a connection now", "error", err, "times", t.untold)
		t.told, t.untold = now, 0
	}
	t.next = min(max(2*t.next, acceptPause), maxAcceptPause)
	_ = pause(ctx, t.next) // cut short, the listener is closed and says so
}

// over says that a connection was accepted.
func (t *acceptTrouble) over() { t.next = 0 }

// passes says whether an error of Accept is of this moment, as EMFILE, and not
// the end of the listener.
func passes(err error) bool {
	var ne net.Error
	//lint:ignore SA1019 it is what tells EMFILE and its like from the end of the listener
	return errors.As(err, &ne) && ne.Temporary()
}

// shake makes a connection one of TLS and hands it on.
func (a *acceptor) shake(life context.Context, conn net.Conn, place *crowd.Place) {
	ctx, cancel := context.WithTimeoutCause(life, shakeTimeout, fmt.Errorf("no TLS handshake within %v: has the other side --tls?", shakeTimeout))
	defer cancel()
	secure, err := a.certs.Server(ctx, conn)
	kept := place.Leave()
	switch {
	case !kept: // others have, and it is closed
	case err == nil:
		a.hand(life, conn, secure, "certificate", tlsdir.Names(secure.ConnectionState().PeerCertificates[0]))
	case life.Err() == nil:
		a.log.Warn("a connection was refused", "from", conn.RemoteAddr().String(), "error", err)
	}
}

// hand gives ready, which lies over conn, to whoever wants the next.
func (a *acceptor) hand(ctx context.Context, conn, ready net.Conn, who ...any) {
	select {
	case a.conns <- ready:
		a.log.Info("connected", append([]any{"to", conn.LocalAddr().String(), "from", conn.RemoteAddr().String()}, who...)...)
	case <-ctx.Done():
		conn.Close() // nobody spoke on it
	}
}

// Next implements Ends.
func (a *acceptor) Next(ctx context.Context) (io.ReadWriteCloser, error) {
	select {
	case conn := <-a.conns:
		return conn, nil
	case <-a.ended:
		return nil, fmt.Errorf("no more connections are accepted: %w", a.err)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Close implements Ends.
func (a *acceptor) Close() error {
	var err error
	a.once.Do(func() {
		a.stop(net.ErrClosed)
		err = a.ln.Close()
	})
	a.wg.Wait()
	return err
}
