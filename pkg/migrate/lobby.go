package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/crowd"
	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

const (
	// firstPacket is the longest first packet that is taken, in bytes: a DevInfo
	// with the longest name, schema and extension, or an answer to one.
	firstPacket = 64<<10 + wire.MaxSchema + wire.MaxExtension + 1<<10
	// plainAfter is how long a peer that was told of the disks may say nothing
	// before it is tried as a plain Silo, which says nothing before it has data.
	plainAfter = 2 * time.Second
	// trialTime is how long such a trial may last while others wait.
	trialTime = 3 * time.Second
)

var (
	errCrowded = errors.New("migrate: newer connections took its place")
	errOutdone = errors.New("migrate: another connection spoke first")
)

// caller is a connection, and what was heard on it before its session. Read is
// for one goroutine.
type caller struct {
	conn  io.ReadWriteCloser
	hello *greeting
	hi    *announced // a source's end of it; nil: a destination's
	mute  bool       // it is tried although it has said nothing

	heard   []byte
	err     error           // of the connection, after heard
	pending chan firstWords // a Read that is under way; nil: none is

	place   *crowd.Place
	dropped chan struct{} // closed when it has lost its place
}

type firstWords struct {
	b   []byte
	err error
}

func newCaller(conn io.ReadWriteCloser) *caller {
	return &caller{conn: conn, hello: newGreeting(), dropped: make(chan struct{})}
}

// Read implements io.Reader: first what was heard already.
func (c *caller) Read(p []byte) (int, error) {
	if len(c.heard) == 0 && c.pending != nil {
		c.take(<-c.pending)
	}
	switch {
	case len(c.heard) > 0:
		n := copy(p, c.heard)
		c.heard = c.heard[n:]
		return n, nil
	case c.err != nil:
		return 0, c.err
	}
	return c.conn.Read(p)
}

// Close closes the connection, which ends a Read.
func (c *caller) Close() error {
	if c.hi != nil {
		c.hi.p.Abort(errCrowded) // which closes conn
		return nil
	}
	return c.conn.Close()
}

func (c *caller) take(w firstWords) {
	c.heard, c.err, c.pending = append(c.heard, w.b...), w.err, nil
}

// lobby greets the connections of a listener side by side: the first that speaks
// as the other end does gets the session, so that those that say nothing keep
// nothing out. While a session runs, the others wait.
type lobby struct {
	connect Connector
	max     int
	// prepare makes a source's end of a connection, and announce says on it which
	// disks there are; nil: it is the other side that speaks first.
	prepare  func(ctx context.Context, c *caller)
	announce func(c *caller) error
	// proper returns an error if no other end of a migration begins with the packet.
	proper func(h wire.Header, command wire.Command) error
	log    *slog.Logger

	callers *crowd.Crowd // without the one that has the session
	ready   chan *caller // it has said its first word
	mute    chan *caller // it was told of the disks, and says nothing
	failed  chan error   // of connect
	wg      sync.WaitGroup

	mu   sync.Mutex
	free chan struct{} // guarded by mu; closed while there is no session, made anew with one
}

// open begins to take connections, until ctx ends. Wait for wg then.
func (l *lobby) open(ctx context.Context) {
	l.ready, l.mute, l.failed = make(chan *caller), make(chan *caller), make(chan error)
	l.callers = crowd.New(l.max)
	l.free = make(chan struct{})
	close(l.free)
	l.wg.Go(func() { l.acceptLoop(ctx) })
}

func (l *lobby) acceptLoop(ctx context.Context) {
	for ctx.Err() == nil {
		conn, err := l.connect(ctx)
		if err != nil {
			select {
			case l.failed <- err:
			case <-ctx.Done():
			}
			continue
		}
		c := newCaller(conn)
		if l.prepare != nil {
			l.prepare(ctx, c)
		}
		c.place, err = l.callers.Enter(ctx, crowd.Address(conn), func() {
			close(c.dropped)
			_ = c.Close() // nothing that mattered was said on it
		})
		if err != nil {
			_ = c.Close() // nothing was said on it
			continue
		}
		l.wg.Go(func() { l.greet(ctx, c) })
	}
}

// greet waits for the first word of a connection, and offers it then.
func (l *lobby) greet(ctx context.Context, c *caller) {
	err := l.hear(ctx, c)
	if err == nil {
		return
	}
	if c.place.Leave() {
		_ = c.Close() // nothing that mattered was said on it
		if ctx.Err() == nil {
			l.log.Warn("a connection came to nothing", "from", crowd.Address(c.conn), "cause", err)
		}
	}
}

func (l *lobby) hear(ctx context.Context, c *caller) error {
	l.mu.Lock()
	free := l.free
	l.mu.Unlock()
	if l.announce != nil {
		select {
		case <-free:
		case <-c.dropped:
			return errCrowded
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		stuck := time.AfterFunc(greetTimeout, func() { _ = c.Close() }) // it does not read
		err := l.announce(c)
		stuck.Stop()
		if err != nil {
			return err
		}
	}
	late := time.NewTimer(greetTimeout)
	defer late.Stop()
	tryPlain := time.NewTimer(plainAfter)
	defer tryPlain.Stop()
	var mute chan *caller
	for {
		done, err := l.judge(c)
		if err != nil {
			return err
		}
		if done {
			return l.offer(ctx, c)
		}
		if c.pending == nil {
			l.read(c)
		}
		select {
		case w := <-c.pending:
			c.take(w)
		case mute <- c:
			return nil
		case <-tryPlain.C:
			if l.announce != nil {
				c.mute, mute = true, l.mute
				late.Stop() // its turn comes
			}
		case <-late.C:
			return errSilent
		case <-c.dropped:
			return errCrowded
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// offer hands over a connection that has said its first word.
func (l *lobby) offer(ctx context.Context, c *caller) error {
	c.mute = false
	select {
	case l.ready <- c:
		return nil
	case <-c.dropped:
		return errCrowded
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// read begins one Read of a connection.
func (l *lobby) read(c *caller) {
	pending := make(chan firstWords, 1)
	c.pending = pending
	l.wg.Go(func() {
		b := make([]byte, 4<<10)
		n, err := c.conn.Read(b)
		pending <- firstWords{b[:n], err}
	})
}

// judge reports whether the first packet is there, and is one.
func (l *lobby) judge(c *caller) (done bool, err error) {
	var h wire.Header
	switch {
	case len(c.heard) <= wire.HeaderSize:
		return false, c.err
	case h.UnmarshalBinary(c.heard[:wire.HeaderSize]) != nil || h.Length == 0 || h.Length > firstPacket:
		return false, fmt.Errorf("it is not the other end of a migration: it begins with %x", c.heard[:wire.HeaderSize])
	}
	command := wire.Command(c.heard[wire.HeaderSize])
	if err := l.proper(h, command); err != nil {
		return false, fmt.Errorf("it is not the other end of a migration: %w", err)
	}
	if uint32(len(c.heard)-wire.HeaderSize) >= h.Length {
		return true, nil
	}
	return false, c.err
}

// next returns a connection that has spoken, or if there is none, one that may be
// a plain Silo.
func (l *lobby) next(ctx context.Context) (*caller, error) {
	for {
		var c *caller
		select {
		case c = <-l.ready:
		case c = <-l.mute:
		case err := <-l.failed:
			return nil, err
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		if c.place.Leave() {
			return c, nil
		}
	}
}

// begin makes the others wait: c has the session. Those that were told of the
// disks are told anew when it has ended, on a new connection, since what holds of
// the disks will be another.
func (l *lobby) begin() (end func()) {
	free := make(chan struct{})
	l.mu.Lock()
	l.free = free
	l.mu.Unlock()
	if l.announce != nil {
		l.callers.Clear()
	}
	return func() { close(free) }
}

// attend runs the session of c. One that has not spoken loses it to one that has,
// and to one that waits after trialTime.
func (l *lobby) attend(ctx context.Context, c *caller, session func(context.Context, *caller) (bool, error)) (bool, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	end := func() {}
	var better *caller
	wg.Go(func() {
		trial := time.NewTicker(trialTime)
		defer trial.Stop()
		for c.mute {
			select {
			case <-c.hello.done:
				end = l.begin()
				return
			case better = <-l.ready:
				cancel(errOutdone)
				return
			case <-trial.C:
				if l.callers.Len() > 0 {
					cancel(errSilent)
					return
				}
			case <-ctx.Done():
				return
			}
		}
		end = l.begin()
	})
	greeted, err := session(ctx, c)
	cancel(nil)
	wg.Wait()
	end()
	if better != nil {
		l.wg.Go(func() {
			if err := l.offer(ctx, better); err != nil && better.place.Leave() {
				_ = better.Close() // nothing that mattered was said on it
			}
		})
	}
	return greeted, err
}

// properSource returns an error if no source begins with the packet.
func properSource(_ wire.Header, command wire.Command) error {
	if command != wire.CommandDevInfo && command != wire.CommandChecked {
		return fmt.Errorf("its first packet is %v, want DevInfo", command)
	}
	return nil
}

// properDestination returns an error if no destination of so many disks begins
// with the packet.
func properDestination(disks int) func(wire.Header, wire.Command) error {
	return func(h wire.Header, command wire.Command) error {
		asks := command == wire.CommandNeedAt || command == wire.CommandDontNeedAt || command == wire.CommandChecked || command == wire.CommandAlive
		switch {
		case !asks && !command.IsResponse():
			return fmt.Errorf("its first packet is %v, want an answer to DevInfo", command)
		case h.Dev < firstDevice || h.Dev >= firstDevice+uint32(disks):
			return fmt.Errorf("its first packet is for device %d, of which it was not told", h.Dev)
		}
		return nil
	}
}
