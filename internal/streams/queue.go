// Package streams writes to standard output and standard error so that a reader
// who is slow, stopped or gone holds up nothing.
package streams

import (
	"io"
	"sync"
	"time"
)

// maxQueued is how many bytes may wait to be written; what comes beyond is dropped.
const maxQueued = 1 << 20

// Queue writes to an output from a goroutine of its own, so that Write never
// waits. What does not fit is dropped and counted. Errors of the output are
// dropped too: a log whose reader has gone must not end the service.
type Queue struct {
	out  io.Writer
	lost func(out io.Writer, writes int)
	wake chan struct{} // capacity 1
	done chan struct{} // closed when the last has been written

	mu sync.Mutex
	// Guarded by mu:
	chunks  [][]byte
	bytes   int
	dropped int
	closed  bool
}

// NewQueue returns a Queue that writes to out. lost is told how many writes were
// dropped, as soon as out takes something again; nil: it is not told. Close it.
func NewQueue(out io.Writer, lost func(out io.Writer, writes int)) *Queue {
	q := &Queue{out: out, lost: lost, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go q.writeLoop()
	return q
}

// Write implements io.Writer. p is written whole or dropped whole; that is never
// an error.
func (q *Queue) Write(p []byte) (int, error) {
	q.mu.Lock()
	if q.closed || q.bytes+len(p) > maxQueued {
		q.dropped++
	} else {
		q.chunks = append(q.chunks, append([]byte(nil), p...))
		q.bytes += len(p)
	}
	q.mu.Unlock()
	q.signal()
	return len(p), nil
}

func (q *Queue) signal() {
	select {
	case q.wake <- struct{}{}:
	default: // it is awake
	}
}

// writeLoop writes what waits until Close, and then the rest.
func (q *Queue) writeLoop() {
	defer close(q.done)
	for range q.wake {
		for {
			chunk, dropped, closed := q.next()
			switch {
			case chunk != nil:
				_, _ = q.out.Write(chunk) // nothing else can be told of it
			case dropped > 0 && q.lost != nil:
				q.lost(q.out, dropped)
			case closed:
				return
			}
			if chunk == nil && dropped == 0 {
				break
			}
		}
	}
}

// next takes the oldest chunk; with none left, how many were dropped meanwhile.
func (q *Queue) next() (chunk []byte, dropped int, closed bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.chunks) == 0 {
		dropped, q.dropped = q.dropped, 0
		q.chunks = nil
		return nil, dropped, q.closed
	}
	chunk = q.chunks[0]
	q.chunks[0], q.chunks = nil, q.chunks[1:]
	q.bytes -= len(chunk)
	return chunk, 0, false
}

// Close writes what waits, for at most patience. A reader that does not read
// leaves the writing goroutine behind.
func (q *Queue) Close(patience time.Duration) {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.signal()
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case <-q.done:
	case <-t.C:
	}
}
