// Package qmp speaks QEMU's machine protocol, JSON lines over a unix socket: as
// much of it as it takes to watch and steer a virtual machine.
package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

const (
	// maxLine is the longest message that is read, in bytes: an answer of QEMU is some KiB.
	maxLine = 4 << 20
	// maxEvents is how many events are kept for those who will ask for them. The oldest are dropped.
	maxEvents = 1024
)

// ErrClosed says that the Client was closed.
var ErrClosed = errors.New("qmp: closed")

// Event is something that QEMU has told unasked.
type Event struct {
	Name string
	Time time.Time // of QEMU's host clock
	Data json.RawMessage
}

// String is the event as QEMU wrote it.
func (e Event) String() string { return e.Name + " " + string(e.Data) }

// Error is a refusal: QEMU has understood a command and does not do it.
type Error struct {
	Command, Class, Desc string
}

func (e *Error) Error() string { return fmt.Sprintf("qmp: %s: %s", e.Command, e.Desc) }

// Client is a connection to a QEMU. All methods may be called from any goroutine.
type Client struct {
	conn net.Conn
	wg   sync.WaitGroup

	done chan struct{} // closed after err is set
	err  error         // why the connection has ended; read only after done

	sending sync.Mutex // one command at a time: held until its answer is here, or nobody waits for it any more

	mu sync.Mutex // never held over I/O
	// Guarded by mu:
	closed bool
	id     int            // of the last command
	reply  chan<- message // of the command that waits for its answer; nil: none
	events []Event        // that nobody has taken, oldest first
	more   chan struct{}  // closed and replaced when there is one more
}

// message is everything that QEMU says.
type message struct {
	QMP    json.RawMessage `json:"QMP"`
	ID     int             `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
}

// command is what QEMU is told.
type command struct {
	Execute   string `json:"execute"`
	Arguments any    `json:"arguments,omitempty"`
	ID        int    `json:"id"`
}

// New greets the QEMU at the other end of conn, which is the Client's from now on, also if it fails.
func New(ctx context.Context, conn net.Conn) (*Client, error) {
	c := &Client{conn: conn, done: make(chan struct{}), more: make(chan struct{})}
	greeted := make(chan struct{})
	c.wg.Go(func() { c.readLoop(greeted) })
	select {
	case <-greeted:
	case <-c.done:
		return nil, c.err
	case <-ctx.Done():
		return nil, errors.Join(fmt.Errorf("qmp: no greeting: %w", context.Cause(ctx)), c.Close())
	}
	if err := c.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// Execute gives a command and waits for its answer, which it decodes into answer. Both args and answer may be nil. A
// refusal is an *Error. When ctx ends the command may be carried out nevertheless.
func (c *Client) Execute(ctx context.Context, name string, args, answer any) error {
	c.sending.Lock()
	defer c.sending.Unlock()
	reply := make(chan message, 1) // so that the reader never waits for us
	id := c.expect(reply)
	defer c.expect(nil)
	line, err := json.Marshal(command{name, args, id})
	if err != nil {
		return fmt.Errorf("qmp: %s: %w", name, err)
	}
	if _, err := c.conn.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("qmp: %s: %w", name, errors.Join(c.ended(), err))
	}
	select {
	case m := <-reply:
		if m.Error != nil {
			return &Error{name, m.Error.Class, m.Error.Desc}
		}
		if answer == nil {
			return nil
		}
		if err := json.Unmarshal(m.Return, answer); err != nil {
			return fmt.Errorf("qmp: %s: the answer cannot be understood: %w", name, err)
		}
		return nil
	case <-c.done:
		return fmt.Errorf("qmp: %s: %w", name, c.err)
	case <-ctx.Done():
		return fmt.Errorf("qmp: %s: no answer: %w", name, context.Cause(ctx))
	}
}

// Await returns the first event that matches, of those that have come and those that will. Each event is given out
// once; those that do not match stay.
func (c *Client) Await(ctx context.Context, match func(Event) bool) (Event, error) {
	for seen := false; ; {
		e, more, ok := c.take(match)
		switch {
		case ok:
			return e, nil
		case seen:
			return e, c.err // what had come before the end was looked at
		}
		select {
		case <-more:
		case <-c.done:
			seen = true
		case <-ctx.Done():
			return e, context.Cause(ctx)
		}
	}
}

// Close ends the connection. The QEMU runs on. It returns when nothing of the Client is left.
func (c *Client) Close() error {
	c.mu.Lock()
	first := !c.closed
	c.closed = true
	c.mu.Unlock()
	var err error
	if first {
		err = c.conn.Close()
	}
	c.wg.Wait()
	return err
}

// expect says where the next answer goes, and returns the id of its command.
func (c *Client) expect(reply chan<- message) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.id++
	c.reply = reply
	return c.id
}

// take removes an event that matches. Without one, more is closed when another has come.
func (c *Client) take(match func(Event) bool) (e Event, more <-chan struct{}, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, e := range c.events {
		if match(e) {
			c.events = append(c.events[:i], c.events[i+1:]...)
			return e, nil, true
		}
	}
	return Event{}, c.more, false
}

// ended is why the connection has ended, or nil.
func (c *Client) ended() error {
	select {
	case <-c.done:
		return c.err
	default:
		return nil
	}
}

// readLoop reads what QEMU says until the connection ends, and says then why.
func (c *Client) readLoop(greeted chan<- struct{}) {
	err := c.read(greeted)
	_ = c.conn.Close() // nobody reads it any more; err says why
	c.mu.Lock()
	if c.closed {
		err = ErrClosed
	}
	c.closed = true
	c.mu.Unlock()
	c.err = err
	close(c.done)
}

func (c *Client) read(greeted chan<- struct{}) error {
	lines := bufio.NewScanner(c.conn)
	lines.Buffer(nil, maxLine)
	for first := true; lines.Scan(); {
		line := bytes.TrimSpace(lines.Bytes())
		if len(line) == 0 {
			continue
		}
		var m message
		if err := json.Unmarshal(line, &m); err != nil {
			return fmt.Errorf("qmp: %.100q is no message: %w", line, err)
		}
		switch {
		case first && m.QMP == nil:
			return fmt.Errorf("qmp: %.100q is no greeting of QEMU", line)
		case first:
			first = false
			close(greeted)
		case m.Event != "":
			at := time.Unix(m.Timestamp.Seconds, m.Timestamp.Microseconds*1000)
			c.tell(Event{m.Event, at, m.Data})
		default:
			c.answer(m)
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("qmp: %w", err)
	}
	return errors.New("qmp: QEMU has hung up")
}

// tell keeps an event and wakes those who wait for one.
func (c *Client) tell(e Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.events = append(c.events, e)
	if over := len(c.events) - maxEvents; over > 0 {
		c.events = append(c.events[:0], c.events[over:]...)
	}
	close(c.more)
	c.more = make(chan struct{})
}

// answer hands an answer to the one who waits for it. One that comes after its command was given up has another id.
func (c *Client) answer(m message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reply != nil && m.ID == c.id {
		c.reply <- m
		c.reply = nil
	}
}
