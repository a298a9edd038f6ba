package migrate

import (
	"sync"
	"time"
)

const (
	// The window is windowGain times what the path holds, plus two packets. A gain
	// over 1 lets the window grow by a quarter each round trip while the path takes
	// it, and leaves a quarter of a round trip queued when it does not: a demand
	// read waits behind no more than that.
	windowGain = 1.25
	// While somebody asks for blocks, and for demandLife after, there is no such
	// quarter: the background may fill the path and queues no more than its two
	// packets.
	demandGain = 1.0
	demandLife = time.Second
	// A packet of the background is about what the path moves in packetTime,
	// since a demand read waits for the packet that is on its way.
	packetTime = 500 * time.Microsecond
	maxPacket  = 1 << 20
	// From fastPath on, in bytes a second, what a packet costs the processors
	// counts for more than what it costs a demand read: packets grow with the
	// square of the rate, and there are three of them beyond what the path holds:
	// one is read, one is on its way, one is written.
	fastPath = 256 << 20
	// On such a path, while somebody asks, packets are of demandPacket at most. When
	// that begins the window is closed for one round trip: that of a large packet is
	// mostly its own time, and what the path seems to hold then is a queue. If the
	// path does not get empty in probeLife, as long as much is asked for, it is tried
	// again later.
	demandPacket = 256 << 10
	probeLife    = 100 * time.Millisecond
	// A round trip of up to endsTime is then taken for the time that the two ends
	// need. One packet is in flight: with two, both ends are always busy, and a read
	// waits for a processor in each of the four places that it comes through.
	endsTime = 2 * time.Millisecond
	// firstWindow is the window until the path has been measured.
	firstWindow = 256 << 10
	maxWindow   = 64 << 20
	// rttLife is how long the smallest round trip is trusted; then the window
	// is closed for one round trip to measure it again.
	rttLife = 10 * time.Second
	// rateLife is the shortest time for which a delivery rate is remembered.
	rateLife = 250 * time.Millisecond
)

// window bounds the bytes of background data in flight (sent, not yet
// answered) on one connection to what the path needs: its delivery rate times
// its smallest round trip. The idea, and the measuring of the rate between two
// answers, are those of the BBR congestion control (Cardwell and others, 2016).
type window struct {
	blockSize int64

	mu sync.Mutex
	// Guarded by mu:
	wake          chan struct{} // closed when there may be room; nil: nobody waits
	maxPackets    int
	lanes         []*lane
	delivered     int64     // bytes answered so far
	deliveredAt   time.Time // when the last of them was
	minRTT        time.Duration
	minRTTAt      time.Time
	probing       bool      // closed to one packet, to see the path empty
	probingAt     time.Time // since when
	rate, oldRate float64   // bytes a second: the best of this rate period and of the last
	rateAt        time.Time // when this rate period began
	demandAt      time.Time // when somebody asked last
}

// flightMark is what the window needs to know of a packet when it comes back.
type flightMark struct {
	bytes       int64
	sentAt      time.Time
	delivered   int64
	deliveredAt time.Time
	probe       bool // sent alone, to measure the round trip
}

func newWindow(blockSize int64, maxPackets int) *window {
	return &window{blockSize: blockSize, maxPackets: maxPackets}
}

// demand notes that a block goes out which somebody asked for.
func (w *window) demand() {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	if w.rateLocked() > fastPath && !w.demandedLocked(now) {
		w.probeLocked(now)
	}
	w.demandAt = now
}

// demandedLocked says whether somebody has asked of late.
func (w *window) demandedLocked(now time.Time) bool {
	return !w.demandAt.IsZero() && now.Sub(w.demandAt) < demandLife
}

// probeLocked closes the window until a packet that is alone has come back.
func (w *window) probeLocked(now time.Time) {
	if !w.probing {
		w.probing, w.probingAt = true, now
	}
}

// rateLocked is the best rate of late, 0 if there is none.
func (w *window) rateLocked() float64 { return max(w.rate, w.oldRate) }

// wakeLocked has all who wait look again.
func (w *window) wakeLocked() {
	if w.wake != nil {
		close(w.wake)
		w.wake = nil
	}
}

// setMaxPackets bounds the packets in flight.
func (w *window) setMaxPackets(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.maxPackets = n
	w.wakeLocked()
}

func (w *window) measureLocked(m flightMark, now time.Time) {
	w.delivered += m.bytes
	w.deliveredAt = now
	if rtt := now.Sub(m.sentAt); w.minRTT == 0 || rtt <= w.minRTT || m.probe {
		w.minRTT, w.minRTTAt, w.probing = max(rtt, time.Microsecond), now, false
	} else if now.Sub(w.minRTTAt) > rttLife {
		w.probeLocked(now)
	}
	span := now.Sub(m.deliveredAt)
	if span <= 0 {
		return
	}
	if now.Sub(w.rateAt) > max(rateLife, 8*w.minRTT) {
		w.oldRate, w.rate, w.rateAt = w.rate, 0, now
	}
	w.rate = max(w.rate, float64(w.delivered-m.delivered)/span.Seconds())
}

func (w *window) limitLocked() int64 {
	rate := w.rateLocked()
	if rate == 0 {
		return firstWindow
	}
	packets, gain, span := int64(2), windowGain, w.minRTT
	switch demanded, fast := w.demandedLocked(time.Now()), rate > fastPath; {
	case demanded && fast && span <= endsTime:
		packets, span = 1, 0
	case demanded:
		gain = demandGain
	case fast:
		packets = 3
	}
	return min(maxWindow, int64(gain*rate*span.Seconds())+packets*w.packetLocked())
}

// packet is the size in bytes of the next packet of the background: whole
// blocks, at least one.
func (w *window) packet() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.packetLocked()
}

func (w *window) packetLocked() int64 {
	rate := w.rateLocked()
	n := rate * packetTime.Seconds()
	if w.demandedLocked(time.Now()) {
		n = min(n, demandPacket)
	} else if rate > fastPath {
		n *= rate / fastPath
	}
	return max(int64(min(n, maxPacket))/w.blockSize*w.blockSize, w.blockSize)
}

// Path is what a Source has found out about the way to the destination.
type Path struct {
	InFlight, Window int64         // bytes of the background sent and not answered, and how many there may be
	Rate             float64       // bytes a second, the best of late; 0: not known yet
	RoundTrip        time.Duration // of a packet of the background, the least of late; 0: not known yet
}

// Path says what is known of the present connection; ok is false without one.
func (s *Source) Path() (p Path, ok bool) {
	w := s.path.Load()
	if w == nil {
		return Path{}, false
	}
	st := w.stats()
	return Path{InFlight: st.inFlight, Window: st.limit, Rate: st.rate, RoundTrip: st.minRTT}, true
}

// windowStats is what the window has found out about the path.
type windowStats struct {
	inFlight, limit int64         // bytes
	rate            float64       // bytes a second
	minRTT          time.Duration // of a packet of the background
}

func (w *window) stats() windowStats {
	w.mu.Lock()
	defer w.mu.Unlock()
	var flying int64
	for _, l := range w.lanes {
		flying += l.bytes
	}
	return windowStats{flying, w.limitLocked(), w.rateLocked(), w.minRTT}
}
