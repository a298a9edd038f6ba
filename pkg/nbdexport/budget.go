package nbdexport

import (
	"container/list"
	"sync"
	"sync/atomic"
)

// budget is memory that all connections of a server share. It counts bytes; it
// owns none.
type budget struct {
	limit int64
	used  atomic.Int64
	queue atomic.Int32 // how many wait; kept with waiters

	mu sync.Mutex
	// Guarded by mu:
	waiters list.List // of *budgetWaiter, first come first served
}

type budgetWaiter struct {
	n     int64
	given chan struct{} // closed when n has been taken for the waiter
}

// try takes n bytes if they are free and nobody waits for some.
func (b *budget) try(n int64) bool {
	return b.queue.Load() == 0 && b.take(n)
}

func (b *budget) take(n int64) bool {
	if b.used.Add(n) <= b.limit {
		return true
	}
	b.used.Add(-n)
	return false
}

// acquire takes n bytes, at most limit, and waits for them until done is
// closed. It says whether it got them.
func (b *budget) acquire(n int64, done <-chan struct{}) bool {
	n = min(n, b.limit)
	if b.try(n) {
		return true
	}
	w := &budgetWaiter{n: n, given: make(chan struct{})}
	b.mu.Lock()
	b.queue.Add(1)
	e := b.waiters.PushBack(w)
	b.giveLocked() // what was freed before queue was counted up woke nobody
	b.mu.Unlock()
	select {
	case <-w.given:
		return true
	case <-done:
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case <-w.given:
		b.used.Add(-w.n)
	default:
		b.waiters.Remove(e)
		b.queue.Add(-1)
	}
	b.giveLocked()
	return false
}

func (b *budget) release(n int64) {
	b.used.Add(-n)
	if b.queue.Load() > 0 {
		b.mu.Lock()
		b.giveLocked()
		b.mu.Unlock()
	}
}

func (b *budget) giveLocked() {
	for e := b.waiters.Front(); e != nil; e = b.waiters.Front() {
		w := e.Value.(*budgetWaiter)
		if !b.take(w.n) {
			return
		}
		b.waiters.Remove(e)
		b.queue.Add(-1)
		close(w.given)
	}
}
