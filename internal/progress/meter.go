package progress

import (
	"fmt"
	"math"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/units"
)

// Row is one disk as it stands now. All sizes are in bytes.
type Row struct {
	Name       string
	Size, Done int64
	Connected  bool          // there is a connection to the other side
	Complete   bool          // nothing is missing, and both sides know
	Waiting    int           // reads that wait for a block
	OldestWait time.Duration // how long the first of them has waited
}

// Percent is how much is done, rounded down: 100 only when the row is
// complete, since bytes that were counted may still have to be confirmed.
func (r Row) Percent() int {
	switch {
	case r.Complete:
		return 100
	case r.Size <= 0:
		return 0
	}
	return max(0, min(99, int(float64(r.Done)/float64(r.Size)*100)))
}

// rateMemory is how far back the shown rate looks.
const rateMemory = 5 * time.Second

// Meter measures how fast a number of bytes grows. The zero value is ready.
type Meter struct {
	started bool
	last    time.Time
	done    int64
	rate    float64       // bytes a second, smoothed
	seen    time.Duration // how long has been measured
}

// Add takes a sample.
func (m *Meter) Add(now time.Time, done int64) {
	dt := now.Sub(m.last)
	if !m.started {
		*m = Meter{started: true, last: now, done: done}
		return
	}
	if dt <= 0 {
		return
	}
	m.seen += dt
	current := float64(done-m.done) / dt.Seconds()
	// At first the plain average, later a mean that forgets.
	weight := max(1-math.Exp(-float64(dt)/float64(rateMemory)), float64(dt)/float64(m.seen)/2)
	if m.seen == dt {
		weight = 1
	}
	m.rate += weight * (current - m.rate)
	m.last, m.done = now, done
}

// Rate is how fast it grows, in bytes a second, over the last few seconds;
// below 0 if it shrinks. ok is false while it was not watched for a second.
func (m *Meter) Rate() (bytesPerSecond int64, ok bool) {
	return int64(m.rate), m.seen >= time.Second
}

// ETA says how long the rest takes at this rate; ok is false if nothing
// sensible can be said, as when nothing moves or more gets missing.
func (m *Meter) ETA(size int64) (left time.Duration, ok bool) {
	if m.rate < 1 {
		return 0, false
	}
	seconds := float64(size-m.done) / m.rate
	if seconds > float64(1000*time.Hour/time.Second) {
		return 0, false
	}
	return time.Duration(seconds * float64(time.Second)), true
}

// describe says in words what a bar cannot show.
func describe(r Row, m *Meter) string {
	if r.Complete {
		return fmt.Sprintf("%s  complete", units.Human(r.Size))
	}
	s := fmt.Sprintf("%s of %s  ", units.Human(min(r.Done, r.Size)), units.Human(r.Size))
	left, ok := m.ETA(r.Size)
	switch {
	case !r.Connected:
		s += "not connected"
	case r.Done >= r.Size:
		s += "finishing"
	case m.seen < time.Second:
		s += "starting"
	case !ok:
		s += "stalled"
	default:
		s += fmt.Sprintf("%s/s  ETA %s", units.Human(int64(m.rate)), Clock(left))
	}
	if r.Waiting > 0 {
		s += fmt.Sprintf("  waiting reads: %d", r.Waiting)
		if r.OldestWait >= time.Second {
			s += fmt.Sprintf(" (since %s)", Clock(r.OldestWait))
		}
	}
	return s
}

// Clock writes a duration as m:ss or h:mm:ss.
func Clock(d time.Duration) string {
	s := int64(d.Round(time.Second) / time.Second)
	if s >= 3600 {
		return fmt.Sprintf("%d:%02d:%02d", s/3600, s/60%60, s%60)
	}
	return fmt.Sprintf("%d:%02d", s/60, s%60)
}
