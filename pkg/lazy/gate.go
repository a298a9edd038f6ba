package lazy

import (
	"sync"
	"sync/atomic"
)

// gate counts those inside, and can be shut: then nobody comes in any more, and
// the one who shut it can wait until the last has left.
type gate struct {
	n    atomic.Int64 // those inside, plus gateShut once shut
	once sync.Once
	idle chan struct{} // closed when the gate is shut and nobody is inside
}

const gateShut = -1 << 62

func newGate() *gate { return &gate{idle: make(chan struct{})} }

// enter says whether the caller may come in. If so it must leave.
func (g *gate) enter() bool {
	if g.n.Add(1) > 0 {
		return true
	}
	g.leave()
	return false
}

func (g *gate) leave() {
	if g.n.Add(-1) == gateShut {
		g.once.Do(func() { close(g.idle) })
	}
}

// shut closes the gate. It does not wait; idle is closed when all have left. It
// may be called again.
func (g *gate) shut() {
	for {
		n := g.n.Load()
		if n < 0 {
			return
		}
		if g.n.CompareAndSwap(n, n+gateShut) {
			if n == 0 {
				g.once.Do(func() { close(g.idle) })
			}
			return
		}
	}
}

// isShut says whether the gate was shut.
func (g *gate) isShut() bool { return g.n.Load() < 0 }
