package migrate

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/protocol"
)

const (
	// tickEvery is how often rates are measured, and how far apart passes begin
	// that have little to do.
	tickEvery = 500 * time.Millisecond
	// A pass that leaves more than gain of what the one before left does not
	// gain any more.
	gain = 0.75
	// firstRest is the pause after a handoff by itself that came to nothing; it
	// doubles up to maxRest.
	firstRest = time.Second
	maxRest   = 30 * time.Second
)

// line is one disk on one connection.
type line struct {
	disk  *sourceDisk
	order *order
	to    *protocol.ToProtocol
	pump  *pump
	// Set by admission:
	told     told // what the destination says of the device that the disk comes to
	extended bool // it is one of ours
}

// flush makes durable what clients wrote.
func (c *line) flush() error {
	if err := c.disk.Store.Flush(); err != nil {
		return fmt.Errorf("disk %s: flush: %w", c.disk.Name, err)
	}
	return nil
}

// takeBack has the destination forget the stale blocks, or of them only those
// that were asked for.
func (c *line) takeBack(ctx context.Context, asked bool) error {
	list := c.order.collect(asked)
	if len(list) == 0 {
		return nil
	}
	for part := range slices.Chunk(list, maxListed) {
		err := c.disk.peer.step(func() error { return c.to.SendDirtyList(ctx, uint32(c.disk.geo.blockSize), part) })
		if err != nil {
			return err
		}
	}
	c.order.listed(list)
	return nil
}

// maxListed is how many blocks a DirtyList names at most, so that it travels in one
// packet and is one step.
const maxListed = 1 << 18

// liveSession moves the live disks over one connection, in passes, until they
// are handed off. Its fields are used by passLoop alone.
type liveSession struct {
	src    *Source
	lines  []*line // of live disks
	window *window
	ended  chan struct{} // capacity 1: a pass may have ended

	pass    int
	began   time.Time     // the present pass
	idle    bool          // it has ended, and the next one has not begun
	left    int64         // bytes that the last pass left dirty
	few     bool          // they travel in MaxDowntime
	rest    time.Duration // after the next handoff that comes to nothing
	restEnd time.Time     // no handoff by itself before
	written []int64       // by clients so far, of each line, at the last tick
}

// each does something for every line at the same time.
func (l *liveSession) each(ctx context.Context, do func(ctx context.Context, c *line) error) error {
	return each(ctx, l.lines, do)
}

// passLoop sends pass after pass until the disks are handed off.
func (l *liveSession) passLoop(ctx context.Context) error {
	h := l.src.hand
	h.attach(true)
	defer h.attach(false)
	tick := time.NewTicker(tickEvery)
	defer tick.Stop()
	l.written = make([]int64, len(l.lines))
	l.begin()
	notify(l.ended) // there may be nothing to send
	for {
		select {
		case <-l.ended:
		case <-h.kick:
		case <-tick.C:
			l.measure()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if done, err := l.step(ctx); done || err != nil {
			return err
		}
	}
}

// step does what there is to do. done says that the disks were handed off.
func (l *liveSession) step(ctx context.Context) (done bool, err error) {
	if l.src.hand.wanted() {
		if done, err := l.handOff(ctx); done || err != nil {
			return done, err
		}
	}
	for _, c := range l.lines {
		if c.order.takeAsked() {
			if err := c.takeBack(ctx, true); err != nil {
				return false, err
			}
		}
	}
	if !l.drained() {
		return false, nil
	}
	if !l.idle {
		l.passEnded()
		if l.time(time.Now()) {
			if done, err := l.handOffByItself(ctx); done || err != nil {
				return done, err
			}
		}
	} else if l.src.hand.isAuto() && l.dirtyBytes() == 0 && time.Now().After(l.restEnd) {
		if done, err := l.handOffByItself(ctx); done || err != nil {
			return done, err
		}
	}
	if l.dirtyBytes() == 0 || time.Since(l.began) < tickEvery {
		return false, nil // at the next tick
	}
	l.begin()
	if err := l.each(ctx, func(ctx context.Context, c *line) error { return c.takeBack(ctx, false) }); err != nil {
		return false, err
	}
	notify(l.ended) // everything may have been in flight
	return false, nil
}

func (l *liveSession) drained() bool {
	for _, c := range l.lines {
		if !c.order.drained() {
			return false
		}
	}
	return true
}

func (l *liveSession) dirtyBytes() (n int64) {
	for _, c := range l.lines {
		if live := c.disk.Live.dirt.Load(); live != nil {
			n += live.bytes()
		}
	}
	return n
}

func (l *liveSession) begin() {
	l.pass++
	l.began, l.idle = time.Now(), false
	l.src.note(func(p *passes) { p.pass, p.first = l.pass, l.pass == 1 })
}

// passEnded takes stock.
func (l *liveSession) passEnded() {
	left := l.dirtyBytes()
	soon := l.soon(left)
	gains := soon || l.pass == 1 || float64(left) <= gain*float64(l.left)
	l.left, l.idle, l.few = left, true, soon
	l.src.note(func(p *passes) { p.gains, p.first = gains, false })
	l.src.log.Debug("a pass has ended", "pass", l.pass, "took", time.Since(l.began), "dirty", left, "link", l.rate())
}

// time says whether the disks are to be handed off by themselves, after a pass:
// what is left takes little time, or another pass would not leave less.
func (l *liveSession) time(now time.Time) bool {
	if !l.src.hand.isAuto() || now.Before(l.restEnd) {
		return false
	}
	return l.few || !l.src.passes().gains
}

// rate is what the path and the bound allow, in bytes a second; 0 if that is not
// known, since nothing has travelled yet.
func (l *liveSession) rate() float64 {
	r := l.window.stats().rate
	if bound := float64(l.src.limit.bound()); bound > 0 && (r == 0 || bound < r) {
		return bound
	}
	return r
}

// soon reports whether bytes travel in MaxDowntime. Nothing does as long as nothing
// has: the pass may have ended because all of it is dirty for another destination.
func (l *liveSession) soon(bytes int64) bool {
	return bytes == 0 || float64(bytes) <= l.rate()*l.src.opts.MaxDowntime.Seconds()
}

func (l *liveSession) handOffByItself(ctx context.Context) (done bool, err error) {
	done, err = l.handOff(ctx)
	if !done {
		l.rest = min(max(firstRest, 2*l.rest), maxRest)
		l.restEnd = time.Now().Add(l.rest)
	}
	return done, err
}

// measure ends a period: what was written in it is the hottest there is.
func (l *liveSession) measure() {
	for i, c := range l.lines {
		d := c.disk.Live.dirt.Load()
		now := d.written.Load()
		c.disk.rate.add(float64(now-l.written[i]) / tickEvery.Seconds())
		l.written[i] = now
		d.age()
	}
	link := l.rate()
	l.src.note(func(p *passes) { p.link = link })
}
