package livevm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// console is what the guest says, first at the one machine and then at the other, which goes on in the middle of a line
// if need be.
type console struct {
	mu sync.Mutex
	// Guarded by mu:
	rest     []byte // the line that is not complete
	seen     seen
	verified string        // the last line, when all is done
	bad      []string      // what the guest complains about
	more     chan struct{} // closed and replaced when there is news
}

// seen is what there is to know of the records: when the host has read of one on the console, and how long after the one
// before the guest says that it was.
type seen struct {
	last   int64 // the number of the last record; 0: none
	count  int64 // how many there were; the machine of a snapshot begins with another than 1
	at     time.Time
	where  int   // the machine that said so, 0 or 1
	before int64 // the last record at the source
	wrote  int64 // all, by the guest's account at the end

	atSource, across, atDest gap // the longest between two records at the source, that from there to the destination, ...
}

// gap is the time between two records.
type gap struct{ host, guest time.Duration } // by whose clock

func (g *gap) grow(by gap) { g.host, g.guest = max(g.host, by.host), max(g.guest, by.guest) }

func newConsole() *console { return &console{more: make(chan struct{})} }

// readLoop takes what one of the machines prints, until it ends.
func (c *console) readLoop(where int, out io.Reader) {
	p := make([]byte, 4096)
	for {
		n, err := out.Read(p)
		now := time.Now()
		if n > 0 {
			c.take(where, now, p[:n])
		}
		if err != nil {
			return
		}
	}
}

func (c *console) take(where int, now time.Time, p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rest = append(c.rest, p...)
	for {
		line, rest, ok := bytes.Cut(c.rest, []byte("\n"))
		if !ok {
			break
		}
		c.rest = rest
		c.lineLocked(where, now, strings.TrimSuffix(string(line), "\r"))
	}
	close(c.more)
	c.more = make(chan struct{})
}

func (c *console) lineLocked(where int, now time.Time, line string) {
	s := &c.seen
	var n, own int64
	switch {
	case scan(line, "r %d %d", &n, &own):
		if s.count++; n != s.last+1 && s.count > 1 {
			c.bad = append(c.bad, fmt.Sprintf("record %d came after record %d", n, s.last))
		}
		g := gap{now.Sub(s.at), time.Duration(own) * time.Microsecond}
		switch {
		case s.count == 1: // there was none before
		case where == 0:
			s.atSource.grow(g)
		case s.where == 0:
			s.across = g
		default:
			s.atDest.grow(g)
		}
		if where == 0 {
			s.before = n
		}
		s.last, s.at, s.where = n, now, where
	case scan(line, "wrote %d", &s.wrote):
	case strings.HasPrefix(line, "verified "):
		c.verified = line
	default:
		c.bad = append(c.bad, line)
	}
}

// scan says whether a line is just of this form.
func scan(line, format string, into ...any) bool {
	n, err := fmt.Sscanf(line, format, into...)
	return err == nil && n == len(into)
}

// await waits until the guest has said what done looks for, and fails when it complains, or when the machine on which
// it is has ended.
func (c *console) await(ctx context.Context, on *process, what string, done func(*console) bool) error {
	for gone := false; ; {
		c.mu.Lock()
		ok, bad, more, last := done(c), strings.Join(c.bad, "; "), c.more, c.seen.last
		c.mu.Unlock()
		switch {
		case bad != "":
			return fmt.Errorf("the guest says: %s", bad)
		case ok:
			return nil
		case gone:
			return errors.Join(fmt.Errorf("%s ended before %s, after record %d", on.name, what, last), on.failed())
		}
		select {
		case <-more:
		case <-on.done:
			gone = true // what it said at its end has been read
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s, after record %d: %w", what, last, context.Cause(ctx))
		}
	}
}

func (c *console) look() seen {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.seen
}

func (c *console) verdict() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.verified
}
