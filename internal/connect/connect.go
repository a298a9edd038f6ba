// Package connect gives a migration its connections, one after another: it
// dials the other end, or accepts what the other end dials.
package connect

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/addr"
)

const (
	// dialTimeout is how long one try may take: a host that is switched off
	// does not answer at all.
	dialTimeout = 10 * time.Second
	// dialPause is between the tries of the first connection.
	dialPause = 100 * time.Millisecond
)

// Ends gives connections to the other end.
type Ends interface {
	// Next returns the next connection. It waits for one until ctx ends.
	Next(ctx context.Context) (io.ReadWriteCloser, error)
	// Close lets go of what Next does not need any more. Connections that were
	// returned stay.
	Close() error
}

// Dial gives connections to a. The first is tried for as long as first, since
// the other end may be started a moment later; each after it once.
func Dial(a addr.Addr, first time.Duration) Ends {
	return &dialer{addr: a, dial: a.Dial, first: first}
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
	for {
		conn, err := d.once(ctx, min(dialTimeout, d.first-time.Since(began)))
		if err == nil {
			d.known.Store(true)
			return conn, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if time.Since(began)+dialPause >= d.first {
			return nil, fmt.Errorf("no connection within %v: %w", d.first, err)
		}
		if err := pause(ctx, dialPause); err != nil {
			return nil, err
		}
	}
}

func (d *dialer) once(ctx context.Context, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("%s does not answer", d.addr))
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

// Accept gives the connections that come to ln, and closes it in the end. One
// that comes while nobody wants it waits.
func Accept(ln net.Listener, log *slog.Logger) Ends {
	a := &acceptor{ln: ln, log: log, conns: make(chan net.Conn), closed: make(chan struct{}), ended: make(chan struct{})}
	a.wg.Go(a.acceptLoop)
	return a
}

type acceptor struct {
	ln    net.Listener
	log   *slog.Logger
	wg    sync.WaitGroup // acceptLoop
	conns chan net.Conn

	once   sync.Once
	closed chan struct{} // closed by Close
	ended  chan struct{} // closed by acceptLoop after err is set
	err    error         // why there are no more; read only after ended
}

// acceptLoop hands on what comes until the listener ends.
func (a *acceptor) acceptLoop() {
	defer close(a.ended)
	for {
		conn, err := a.ln.Accept()
		if err != nil {
			a.err = err
			return
		}
		select {
		case a.conns <- conn:
			a.log.Info("connected", "to", conn.LocalAddr().String(), "from", conn.RemoteAddr().String())
		case <-a.closed:
			conn.Close() // nobody spoke on it
			a.err = net.ErrClosed
			return
		}
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
		close(a.closed)
		err = a.ln.Close()
	})
	a.wg.Wait()
	return err
}
