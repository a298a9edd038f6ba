package link

import (
	"sync"
	"time"
)

const (
	queueTime = 50 * time.Millisecond // of the rate, that the queue holds
	minQueue  = 64 << 10              // bytes, that the queue holds at least

	// slack is how far the transmitter may catch up after an idle moment, or
	// after it was woken late. Timers are late by about a millisecond.
	slack = 5 * time.Millisecond

	maxChunk = 64 << 10 // bytes read at once
	minChunk = 2 << 10
)

// bucket is a token bucket kept as a clock: the time at which all that was
// reserved will have been transmitted.
type bucket struct {
	mu sync.Mutex
	// Guarded by mu:
	rate int64     // bytes per second; 0: no limit
	free time.Time // when the transmitter is free again
}

func (b *bucket) setRate(rate int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rate = rate
}

// reserve puts n bytes into the queue: the last is transmitted at sent, and the
// queue has room for more from next on.
func (b *bucket) reserve(now time.Time, n int) (sent, next time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rate == 0 {
		return now, now
	}
	if earliest := now.Add(-slack); b.free.Before(earliest) {
		b.free = earliest
	}
	b.free = b.free.Add(duration(int64(n), b.rate))
	sent = b.free
	if sent.Before(now) {
		sent = now // to catch up makes up for lost rate, and never takes from the delay
	}
	return sent, b.free.Add(-max(queueTime, duration(minQueue, b.rate)))
}

// chunk is how many bytes to reserve at once: small enough that connections
// take turns often.
func (b *bucket) chunk() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rate == 0 {
		return maxChunk
	}
	return int(min(max(b.rate/500, minChunk), maxChunk))
}

// underway is how many bytes may have been read and not yet been delivered, with a
// delay behind the queue.
func (b *bucket) underway(delay time.Duration) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rate == 0 {
		return unlimitedUnderway
	}
	return int64(float64(b.rate)*(queueTime+delay).Seconds()) + minQueue + 2*maxChunk
}

// unlimitedUnderway bounds the memory of a direction without a rate, in bytes:
// enough for 1 GB/s at 30 ms.
const unlimitedUnderway = 32 << 20

func duration(n, rate int64) time.Duration {
	return time.Duration(float64(n) / float64(rate) * float64(time.Second))
}
