package migrate

import (
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// SetRate bounds the background to n bytes a second, over all disks, from now
// on; 0 or less is no bound. What was sent already is paid for at the new rate.
// It may be called at any time.
func (s *Source) SetRate(n int64) { s.limit.set(n) }

// Rate is the bound of the background in bytes a second; 0 is none.
func (s *Source) Rate() int64 { return s.limit.bound() }

// Pause holds the background until Resume, also over connections to come. What
// is asked for is sent all the same. At most a packet a disk still goes out. It
// may be called at any time.
func (s *Source) Pause() { s.limit.pause(true) }

// Resume ends a Pause. It may be called at any time.
func (s *Source) Resume() { s.limit.pause(false) }

// Paused says whether the background is held by Pause.
func (s *Source) Paused() bool { return s.limit.isPaused() }

// throttle says when the background of all disks of a Source may go on.
type throttle struct {
	blockSize int64

	mu sync.Mutex
	// Guarded by mu:
	limiter *rate.Limiter // its tokens are bytes; below 0 they are owed
	rate    int64         // bytes a second; 0: no bound
	paused  bool
	changed chan struct{} // closed when rate, paused or whose turn it is changes
	waiting []*payer
	turn    int64 // the least that a payer which begins to wait has paid: as the last one that went
}

// payer is one disk on one connection at a throttle: of those that wait, the one that
// has sent the least goes next. It is used by one goroutine, apart from owe.
type payer struct {
	limit *throttle
	paid  int64 // bytes; guarded by the throttle's mu
}

func (t *throttle) payer() *payer { return &payer{limit: t} }

// leave ends the wait of a payer that has something else to do.
func (p *payer) leave() {
	p.limit.mu.Lock()
	defer p.limit.mu.Unlock()
	p.limit.leaveLocked(p)
}

func (t *throttle) leaveLocked(p *payer) {
	if i := slices.Index(t.waiting, p); i >= 0 {
		t.waiting = slices.Delete(t.waiting, i, i+1)
		if len(t.waiting) > 0 {
			t.changedLocked()
		}
	}
}

// firstLocked reports whether no payer that waits has sent less than p.
func (t *throttle) firstLocked(p *payer) bool {
	for _, other := range t.waiting {
		if other.paid < p.paid {
			return false
		}
	}
	return true
}

func newThrottle(blockSize, bytesPerSecond int64) *throttle {
	t := &throttle{blockSize: blockSize, limiter: rate.NewLimiter(rate.Inf, 0), changed: make(chan struct{})}
	t.set(bytesPerSecond)
	return t
}

// set is called with bytes a second; 0 or less is no bound.
func (t *throttle) set(n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	t.rate = max(0, n)
	if t.rate == 0 {
		t.limiter = rate.NewLimiter(rate.Inf, 0) // owes nothing
	} else {
		t.limiter.SetBurstAt(now, int(burst(t.blockSize, t.rate)))
		t.limiter.SetLimitAt(now, rate.Limit(t.rate))
	}
	t.changedLocked()
}

// burst is what the background may send at once, in bytes: what the rate allows
// in a twentieth of a second, and at least a block.
func burst(blockSize, rate int64) int64 {
	return max(blockSize, min(maxPacket, rate/20))
}

func (t *throttle) pause(on bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.paused = on
	t.changedLocked()
}

func (t *throttle) changedLocked() {
	close(t.changed)
	t.changed = make(chan struct{})
}

func (t *throttle) bound() int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.rate
}

func (t *throttle) isPaused() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.paused
}

// packet is the most that one packet should hold, in bytes, at most n.
func (t *throttle) packet(n int64) int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.rate == 0 {
		return n
	}
	return min(n, burst(t.blockSize, t.rate))
}

// owe adds n bytes to what is to be paid before the next packet.
func (p *payer) owe(n int64) {
	t := p.limit
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.rate == 0 {
		return
	}
	p.paid += n
	now := time.Now()
	for most := burst(t.blockSize, t.rate); n > 0; n -= most { // it takes no more at once
		t.limiter.ReserveN(now, int(min(n, most)))
	}
}

// hold says whether the payer has to wait, for how long (0 or less: until changed is
// closed), and what is closed when that is not true any more. One that has to wait
// calls it again, or leave.
func (p *payer) hold() (held bool, wait time.Duration, changed <-chan struct{}) {
	t := p.limit
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.paused {
		return true, 0, t.changed
	}
	if t.rate == 0 {
		t.leaveLocked(p)
		return false, 0, nil
	}
	if !slices.Contains(t.waiting, p) {
		p.paid = max(p.paid, t.turn)
		t.waiting = append(t.waiting, p)
	}
	if owed := -t.limiter.TokensAt(time.Now()); owed > 0 {
		// Not less than a nanosecond, which is not until changed.
		return true, max(1, time.Duration(owed/float64(t.rate)*float64(time.Second))), t.changed
	}
	if !t.firstLocked(p) {
		return true, 0, t.changed
	}
	t.turn = p.paid
	t.leaveLocked(p)
	return false, 0, nil
}
