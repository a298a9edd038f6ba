// Package link is a network to try things on: a proxy between two addresses
// whose rate, delay and failures are chosen. It behaves like one wire that all
// of its connections share: a bounded queue in front of a transmitter of a
// fixed rate, and a delay behind it. Who sends faster than the rate fills the
// queue and is then held back, as on a real link.
package link

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/addr"
)

// Options of a link.
type Options struct {
	Listen addr.Addr     // where the link is reached; port 0 chooses one
	Target addr.Addr     // what it leads to, dialed for each connection
	Rate   int64         // bytes per second, each way; 0: as fast as it goes
	Delay  time.Duration // one way; a round trip takes twice as long
}

// Link is a running proxy. All methods may be called from any goroutine.
type Link struct {
	target addr.Addr
	delay  time.Duration
	ln     net.Listener // nil in tests of connections alone
	stop   context.CancelFunc
	wg     sync.WaitGroup // acceptLoop and all that belongs to a connection

	toTarget, fromTarget direction
	gate                 gate
	refuse               atomic.Bool

	mu sync.Mutex // never held over I/O
	// Guarded by mu:
	closed bool
	conns  map[*conn]struct{}
}

// direction is one way of the link, shared by all connections.
type direction struct {
	bucket bucket
	bytes  atomic.Int64 // delivered
	noise  noise
	faults faults
}

// Listen starts a link. The context bounds only the start; Close ends the link.
func Listen(ctx context.Context, o Options) (*Link, error) {
	if o.Rate < 0 || o.Delay < 0 {
		return nil, fmt.Errorf("link: rate %d and delay %v: want none below zero", o.Rate, o.Delay)
	}
	ln, err := o.Listen.Listen(ctx)
	if err != nil {
		return nil, fmt.Errorf("link: %w", err)
	}
	l, life := newLink(o)
	l.ln = ln
	l.wg.Go(func() { l.acceptLoop(life) })
	return l, nil
}

// newLink returns a link without a listener, and its life, which Close ends.
func newLink(o Options) (*Link, context.Context) {
	life, stop := context.WithCancel(context.Background())
	l := &Link{target: o.Target, delay: o.Delay, stop: stop, conns: make(map[*conn]struct{})}
	l.gate.set(true)
	l.SetRate(o.Rate)
	return l, life
}

// Addr is where the link is reached, with the real port.
func (l *Link) Addr() addr.Addr { return addr.Of(l.ln.Addr()) }

// SetRate changes the rate, in bytes per second each way, for what is sent
// from now on; 0: as fast as it goes.
func (l *Link) SetRate(rate int64) {
	l.toTarget.bucket.setRate(rate)
	l.fromTarget.bucket.setRate(rate)
}

// Cut breaks every connection in both directions: a reset over TCP, an end
// over unix sockets. What was under way is lost. New connections are taken.
func (l *Link) Cut() {
	l.mu.Lock()
	broken := make([]*conn, 0, len(l.conns))
	for c := range l.conns {
		broken = append(broken, c)
	}
	l.mu.Unlock()
	for _, c := range broken {
		c.cut()
	}
}

// Stall stops all bytes, and keeps the connections open, until it is called
// with false: a network that has gone silent. New connections are accepted,
// but reach the target only afterwards.
func (l *Link) Stall(on bool) { l.gate.set(!on) }

// Refuse breaks new connections as soon as they are made, until it is called
// with false. Those that exist go on.
func (l *Link) Refuse(on bool) { l.refuse.Store(on) }

// Bytes returns how many bytes were delivered to the target and from it.
func (l *Link) Bytes() (toTarget, fromTarget int64) {
	return l.toTarget.bytes.Load(), l.fromTarget.bytes.Load()
}

// Connections is how many connections there are now.
func (l *Link) Connections() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.conns)
}

// Close stops listening, cuts every connection and waits for all goroutines.
func (l *Link) Close() error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.stop()
	var err error
	if l.ln != nil {
		err = l.ln.Close()
	}
	l.Cut()
	l.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil // the second Close
	}
	return err
}

func (l *Link) acceptLoop(life context.Context) {
	for {
		client, err := l.ln.Accept()
		if life.Err() != nil {
			if err == nil {
				reset(client)
			}
			return
		}
		if err != nil {
			// Out of file descriptors, or a client that left at once: the next
			// one may fare better.
			if !sleepUntil(life, time.Now().Add(10*time.Millisecond)) {
				return
			}
			continue
		}
		if l.refuse.Load() {
			reset(client)
			continue
		}
		l.wg.Go(func() { l.serve(life, client) })
	}
}

// serve carries one accepted connection until it ends.
func (l *Link) serve(life context.Context, client net.Conn) {
	ctx, cancel := context.WithCancel(life)
	defer cancel()
	c := &conn{link: l, client: client, cancel: cancel}
	if !l.add(c) {
		reset(client)
		return
	}
	defer l.remove(c)
	if !l.gate.wait(ctx) {
		c.cut()
		return
	}
	target, err := l.target.Dial(ctx)
	if err != nil {
		c.cut() // the client sees what it would see of a dead target
		return
	}
	c.run(ctx, target)
}

func (l *Link) add(c *conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	l.conns[c] = struct{}{}
	return true
}

func (l *Link) remove(c *conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.conns, c)
}

// gate is open or shut; who finds it shut waits.
type gate struct {
	mu sync.Mutex
	// Guarded by mu:
	open chan struct{} // closed while the gate is open
	is   bool
}

func (g *gate) set(open bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case open && g.open == nil:
		g.open = make(chan struct{})
		close(g.open)
	case open && !g.is:
		close(g.open)
	case !open && g.is:
		g.open = make(chan struct{})
	}
	g.is = open
}

// wait returns true when the gate is open, false when ctx has ended.
func (g *gate) wait(ctx context.Context) bool {
	g.mu.Lock()
	open := g.open
	g.mu.Unlock()
	select {
	case <-open:
		return true
	case <-ctx.Done():
		return false
	}
}

// sleepUntil returns true at the time t, false when ctx has ended before.
func sleepUntil(ctx context.Context, t time.Time) bool {
	d := time.Until(t)
	if d <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
