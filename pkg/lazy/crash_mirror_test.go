package lazy

import (
	"sync"
	"sync/atomic"

	"github.com/silo-nbd/silo-nbd/pkg/storage/bootfile"
)

// bootMemory is memory that outlives a process and not a power cut.
type bootMemory struct {
	mu sync.Mutex
	// Guarded by mu:
	b     []byte
	valid bool
	kept  int // how often it was of use
}

func (m *bootMemory) losePower() {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.b, m.valid = nil, false
}

// open gives a process the memory. What it stores there stays, up to its death.
func (m *bootMemory) open(p *process, size int64) *processMemory {
	m.mu.Lock()
	defer m.mu.Unlock()
	o := &processMemory{boot: m, p: p, b: make([]byte, size), kept: m.valid && int64(len(m.b)) == size}
	if o.kept {
		copy(o.b, m.b)
		m.kept++
	}
	o.valid.Store(o.kept)
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.dead {
		p.leaves = o.leave
	}
	return o
}

// processMemory is a bootMemory as a process has it mapped.
type processMemory struct {
	boot  *bootMemory
	p     *process
	b     []byte
	kept  bool
	valid atomic.Bool
}

// leave is the death of the process, or its end: what it has stored stays. The bits
// come last: with a bit that was set later the masks may be of before.
func (o *processMemory) leave() {
	o.boot.mu.Lock()
	defer o.boot.mu.Unlock()
	was, is := bootfile.Words(o.b), make([]byte, len(o.b))
	to := bootfile.Words(is)
	for i := len(was) - 1; i >= 0; i-- {
		to[i].Store(was[i].Load())
	}
	o.boot.b, o.boot.valid = is, o.valid.Load()
}

func (o *processMemory) Kept() bool               { return o.kept }
func (o *processMemory) Bytes() []byte            { return o.b }
func (o *processMemory) Reserve(_, _ int64) error { return nil }
func (o *processMemory) Validate()                { o.valid.Store(true) }
func (o *processMemory) Invalidate()              { o.valid.Store(false) }

func (o *processMemory) Forget() error {
	o.Invalidate()
	return nil
}

func (o *processMemory) Close() error {
	o.p.mu.Lock()
	defer o.p.mu.Unlock()
	if !o.p.dead && o.p.leaves != nil {
		o.p.leaves = nil
		o.leave()
	}
	return nil
}
