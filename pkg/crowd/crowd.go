// Package crowd deals out a bounded number of places to connections that have not
// shown yet who they are, so that those that say nothing, however many and however
// often renewed, keep nobody out.
package crowd

import (
	"context"
	"net"
	"slices"
	"sync"
	"time"
)

// Tenure is how long a connection keeps its place however many wait: several
// round trips. Of n places this makes 2n a second free, to be taken in the order
// in which connections were accepted: renewing them gets nobody ahead.
const Tenure = 500 * time.Millisecond

// Crowd is the places. It is made by New; its methods may be called from any
// goroutine.
type Crowd struct {
	max  int
	left chan struct{} // a place has become free, perhaps; capacity 1

	mu sync.Mutex // never held while calling out
	// Guarded by mu:
	places []*Place // the oldest first
}

// Place is a connection's.
type Place struct {
	crowd *Crowd
	from  string
	since time.Time
	drop  func()
}

// New returns a Crowd of max places.
func New(max int) *Crowd { return &Crowd{max: max, left: make(chan struct{}, 1)} }

// Address returns what tells apart who makes connections; "" if nothing does.
func Address(conn any) string {
	if c, is := conn.(interface{ RemoteAddr() net.Addr }); is {
		if a, is := c.RemoteAddr().(*net.TCPAddr); is {
			return a.IP.String()
		}
	}
	return ""
}

// Enter gives a connection from an address a place. If there is none, the oldest of
// the address that has the most loses its own, once it had it for Tenure: its drop
// is called, which is to close the connection and must not block. Enter waits for
// that until ctx ends.
func (c *Crowd) Enter(ctx context.Context, from string, drop func()) (*Place, error) {
	p := &Place{crowd: c, from: from, drop: drop}
	for {
		wait := c.try(p)
		if wait <= 0 {
			return p, nil
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-c.left:
		case <-ctx.Done():
		}
		t.Stop()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
}

// try gives p a place, or returns when one may be taken away at the earliest.
func (c *Crowd) try(p *Place) (wait time.Duration) {
	c.mu.Lock()
	var out *Place
	if len(c.places) >= c.max {
		at := c.oldestLocked()
		if wait = Tenure - time.Since(c.places[at].since); wait > 0 {
			c.mu.Unlock()
			return wait
		}
		out = c.places[at]
		c.places = slices.Delete(c.places, at, at+1)
	}
	p.since = time.Now()
	c.places = append(c.places, p)
	c.mu.Unlock()
	if out != nil {
		out.drop()
	}
	return 0
}

// oldestLocked finds the oldest of the address that has the most places.
func (c *Crowd) oldestLocked() int {
	count := make(map[string]int)
	for _, p := range c.places {
		count[p.from]++
	}
	at := 0
	for i, p := range c.places {
		if count[p.from] > count[c.places[at].from] {
			at = i
		}
	}
	return at
}

// Len is how many places are taken.
func (c *Crowd) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.places)
}

// Clear takes all places away.
func (c *Crowd) Clear() {
	c.mu.Lock()
	all := c.places
	c.places = nil
	c.mu.Unlock()
	for _, p := range all {
		p.drop()
	}
	c.signal()
}

// Leave gives the place back. It reports false if it had been taken away.
func (p *Place) Leave() bool {
	c := p.crowd
	c.mu.Lock()
	i := slices.Index(c.places, p)
	if i >= 0 {
		c.places = slices.Delete(c.places, i, i+1)
	}
	c.mu.Unlock()
	c.signal()
	return i >= 0
}

func (c *Crowd) signal() {
	select {
	case c.left <- struct{}{}:
	default: // Enter knows
	}
}
