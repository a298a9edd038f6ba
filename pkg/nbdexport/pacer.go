package nbdexport

import "time"

// pacer decides whether short requests are run by the leader, one after the
// other, or each by a worker of its own. The first is best when the store
// answers from memory, the second when it has to wait for a device; which of
// the two it is shows in how many requests come to their end. It belongs to
// the leader.
//
// Time goes in windows. When much of a window was slow requests, the next one
// tries workers; they are kept while that is clearly faster, and tried again,
// ever more rarely, when it was not. A busy processor makes requests slow too,
// but workers do not help then, so it takes more than slowness to stay.
type pacer struct {
	workers bool // in this window
	trial   bool // this window of workers is compared with the one before

	began time.Time
	count int    // requests read in this window
	slow  int    // of them, those that took long although the leader ran them
	ended uint64 // conn.finished at the beginning

	alone   time.Duration // a request's time when the leader last ran all
	hold    int           // windows until something else may be tried
	backoff int
}

// next counts a request and says whether a worker is to run it. ended is how
// many requests of the connection have come to their end, stuck that the
// leader was found stuck in one.
func (p *pacer) next(ended uint64, stuck bool) (worker bool) {
	if p.began.IsZero() {
		p.began, p.ended = time.Now(), ended
	}
	p.count++ // it is not run yet
	if stuck {
		p.slow += windowRequests
	}
	if p.count >= windowRequests || p.slow >= windowRequests {
		p.turn(ended)
	} else if p.workers && p.count%16 == 0 && time.Since(p.began) > windowTime {
		p.turn(ended)
	}
	return p.workers
}

// ran notes how long the leader took for a request.
func (p *pacer) ran(took time.Duration) {
	if took > slowAfter {
		p.slow++
	}
}

// turn ends a window.
func (p *pacer) turn(ended uint64) {
	done := uint64(p.count - 1) // the leader has run these; workers' end in their own time
	if p.workers {
		done = ended - p.ended
	}
	now := time.Now()
	each := now.Sub(p.began) / time.Duration(max(1, done))
	p.began, p.ended = now, ended
	slow := p.slow >= p.count/4 || p.slow >= windowRequests
	p.count, p.slow = 0, 0
	switch {
	case !p.workers:
		p.alone = each
		if p.hold--; p.hold <= 0 && slow {
			p.workers, p.trial = true, true
		}
	case p.trial && each > p.alone*4/5:
		p.workers, p.trial = false, false
		p.backoff = min(max(2*p.backoff, 4), 256)
		p.hold = p.backoff
	case p.trial:
		p.trial, p.backoff, p.hold = false, 0, 32
	default:
		if p.hold--; p.hold <= 0 {
			p.workers = false
		}
	}
}
