package link

import (
	"math/rand/v2"
	"slices"
	"sync"
)

// Direction is one of the two ways through a link.
type Direction int

const (
	// ToTarget is from who connects to the link.
	ToTarget Direction = iota
	// FromTarget is back.
	FromTarget
)

// CorruptAt changes one bit of the byte that passes in a direction after n more
// have, counted over all connections. It may be called for many n at once.
func (l *Link) CorruptAt(d Direction, n int64) {
	l.way(d).noise.at(n)
}

// CorruptEvery changes one bit at random places that lie mean bytes apart in the
// mean, until it is called with 0.
func (l *Link) CorruptEvery(d Direction, mean int64) {
	l.way(d).noise.every(mean)
}

// Corrupted returns how many bits were changed so far to the target and from it.
func (l *Link) Corrupted() (toTarget, fromTarget int64) {
	return l.toTarget.noise.count(), l.fromTarget.noise.count()
}

func (l *Link) way(d Direction) *direction {
	if d == ToTarget {
		return &l.toTarget
	}
	return &l.fromTarget
}

// noise changes bits of what passes.
type noise struct {
	mu sync.Mutex
	// Guarded by mu:
	passed  int64   // bytes
	due     []int64 // places to change, in bytes from the start, rising
	mean    int64   // of random places; 0: none
	random  int64   // the next of them
	flipped int64
}

func (n *noise) at(after int64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.due = append(n.due, n.passed+after)
	slices.Sort(n.due)
}

func (n *noise) every(mean int64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.mean = mean
	n.drawLocked(n.passed)
}

// drawLocked chooses the next random place, at from or behind it.
func (n *noise) drawLocked(from int64) {
	if n.mean > 0 {
		n.random = from + rand.Int64N(2*n.mean)
	}
}

// pass changes what is due in b, which is what passes now.
func (n *noise) pass(b []byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	end := n.passed + int64(len(b))
	for len(n.due) > 0 && n.due[0] < end {
		n.flipLocked(b, n.due[0])
		n.due = n.due[1:]
	}
	for n.mean > 0 && n.random < end {
		n.flipLocked(b, n.random)
		n.drawLocked(n.random + 1)
	}
	n.passed = end
}

func (n *noise) flipLocked(b []byte, at int64) {
	b[at-n.passed] ^= 1 << rand.IntN(8)
	n.flipped++
}

func (n *noise) count() int64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.flipped
}
