package lazy

import "sync"

// claims hands out blocks to those who change the disk under them. A claim is a
// run of blocks and is had as a whole, in the order of asking, so nobody ever
// holds one part and waits for another: there is no order to keep and no
// deadlock to avoid.
//
// One list and not a table of stripes: a claim costs the same for one block and
// for a run of a gigabyte, and the list is as long as there are operations on
// missing blocks in flight.
type claims struct {
	mu sync.Mutex
	// Guarded by mu:
	head, tail *claim // in the order of asking; some hold, the others wait
	free       *claim // to be used again, so that a claim allocates nothing
}

type claim struct {
	lo, hi     int64
	before     int // earlier claims that overlap and are not yet given back
	ready      chan struct{}
	prev, next *claim
}

// acquire claims the blocks [lo, hi) and waits for all who claimed any of them
// before. They wait for nothing but the disk, so the wait needs no way out.
func (t *claims) acquire(lo, hi int64) *claim {
	t.mu.Lock()
	c := t.free
	if c != nil {
		t.free = c.next
	} else {
		c = &claim{ready: make(chan struct{}, 1)}
	}
	c.lo, c.hi, c.before = lo, hi, 0
	for e := t.head; e != nil; e = e.next {
		if e.lo < hi && lo < e.hi {
			c.before++
		}
	}
	c.prev, c.next = t.tail, nil
	if t.tail != nil {
		t.tail.next = c
	} else {
		t.head = c
	}
	t.tail = c
	wait := c.before > 0
	t.mu.Unlock()
	if wait {
		<-c.ready
	}
	return c
}

// release gives the claim back.
func (t *claims) release(c *claim) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for e := c.next; e != nil; e = e.next {
		if e.lo < c.hi && c.lo < e.hi {
			if e.before--; e.before == 0 {
				e.ready <- struct{}{} // capacity 1, one a wait: never blocks
			}
		}
	}
	if c.prev != nil {
		c.prev.next = c.next
	} else {
		t.head = c.next
	}
	if c.next != nil {
		c.next.prev = c.prev
	} else {
		t.tail = c.prev
	}
	c.prev, c.next = nil, t.free
	t.free = c
}
