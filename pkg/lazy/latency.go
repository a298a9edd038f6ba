package lazy

import (
	"sync/atomic"
	"time"
)

// LatencyBounds are the upper bounds of all buckets of a Latency but the last.
var LatencyBounds = [...]time.Duration{
	100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond,
	time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond,
	10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2500 * time.Millisecond, 5 * time.Second,
	10 * time.Second, 30 * time.Second, time.Minute,
}

// Latency says how often something took how long.
type Latency struct {
	// Counts has for each of LatencyBounds how often it took no longer than that
	// and longer than the one before; the last is of what took longer still.
	Counts [len(LatencyBounds) + 1]uint64
	Sum    time.Duration // of all of them
}

// Count is how often it happened.
func (l *Latency) Count() (n uint64) {
	for _, c := range l.Counts {
		n += c
	}
	return n
}

// histogram counts latencies. It takes no lock and no memory.
type histogram struct {
	counts [len(LatencyBounds) + 1]atomic.Uint64
	sum    atomic.Int64 // nanoseconds
}

func (h *histogram) observe(took time.Duration) {
	i := 0
	for i < len(LatencyBounds) && took > LatencyBounds[i] {
		i++
	}
	h.counts[i].Add(1)
	h.sum.Add(int64(took))
}

func (h *histogram) latency() (l Latency) {
	for i := range h.counts {
		l.Counts[i] = h.counts[i].Load()
	}
	l.Sum = time.Duration(h.sum.Load())
	return l
}
