package migrate

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/protocol"
	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

const (
	// A plain Silo destination stalls with more than 32 requests of one kind
	// unanswered; the background and demand share them.
	plainBulkPackets   = 24
	plainDemandPackets = 8
	// Of a destination that knows our extension these many are asked.
	bulkPackets   = 256
	demandPackets = 64
	// A hole travels as zero runs, a few at a time. A run is from firstZeroRun to
	// maxZeroRun long, in bytes, so long that the destination is done with it in
	// about zeroTime: what is asked for meanwhile waits behind it there.
	firstZeroRun = 8 << 20
	maxZeroRun   = 1 << 30
	zeroSlots    = 2
	zeroTime     = 10 * time.Millisecond
	// wayTime is how long a packet of the background waits for demand in flight.
	wayTime = 2 * time.Millisecond
	// zeroCost is what a zero run counts for in the window: it measures nothing.
	zeroCost = 0
)

// sender is what the pump needs of a protocol.ToProtocol.
type sender interface {
	StartWrite(pri protocol.Priority, p []byte, off int64, c protocol.Completion) error
	StartZero(pri protocol.Priority, off, length int64, c protocol.Completion) error
	PeerKnown() <-chan struct{}
	Peer() (wire.Extension, bool)
}

// pump moves one disk's blocks over one connection: what the order says is
// next, the background within the window and the rate, demand beside them.
type pump struct {
	disk   SourceDisk
	order  *order
	to     sender
	window *lane  // of the window that the disks of a connection share
	limit  *payer // of the throttle that all disks share
	counts *counters
	log    *slog.Logger

	// runBytes is the largest data packet that the other side takes; one block
	// until it has said more.
	runBytes     atomic.Int64
	demandOut    atomic.Int64  // demand packets in flight
	demandLanded chan struct{} // capacity 1: the last of them has landed
	demandSlots  chan struct{} // capacity demandPackets; one taken for each demand packet in flight
	holes        chan struct{} // capacity zeroSlots; one taken for each zero run of a hole in flight
	zeroRun      atomic.Int64  // bytes of the next of them
	zeroBest     atomic.Int64  // nanoseconds of the quickest answer to one
	flights      sync.Pool     // of *flight
	greeted      func()        // called for every answer
	toldFull     time.Time     // when the log was told that the destination is full; bulkLoop's

	admitted chan struct{} // closed by admission: data may be sent

	failOnce sync.Once
	failed   chan struct{} // closed after err is set
	err      error         // why the disk cannot be moved; read only after failed
}

// counters are what is kept of one disk over all connections.
type counters struct {
	sent   atomic.Int64 // bytes of data packets
	asked  atomic.Int64 // of these, in packets that somebody waits for
	damage damage
	taken  atomic.Int64 // packets that were acknowledged
}

func newPump(disk SourceDisk, o *order, to sender, w *window, l *throttle, c *counters, greeted func(), log *slog.Logger) *pump {
	p := &pump{
		disk: disk, order: o, to: to, window: w.lane(), limit: l.payer(), counts: c, greeted: greeted, log: log,
		demandSlots:  make(chan struct{}, demandPackets),
		demandLanded: make(chan struct{}, 1),
		holes:        make(chan struct{}, zeroSlots),
		admitted:     make(chan struct{}),
		failed:       make(chan struct{}),
	}
	p.flights.New = func() any { return &flight{pump: p} }
	p.runBytes.Store(o.geo.blockSize)
	p.zeroRun.Store(max(firstZeroRun, o.geo.blockSize))
	for range demandPackets - plainDemandPackets {
		p.demandSlots <- struct{}{} // a plain peer until it says otherwise
	}
	return p
}

// upgrade begins to send runs of blocks, once the other side has said that it
// takes them.
func (p *pump) upgradeLoop(ctx context.Context) error {
	select {
	case <-p.to.PeerKnown():
	case <-ctx.Done():
		return nil
	}
	ext, ok := p.to.Peer()
	if !ok {
		return nil
	}
	p.greeted()
	bs := p.order.geo.blockSize
	p.runBytes.Store(max(bs, min(int64(ext.MaxData), maxPacket)/bs*bs))
	p.window.setMaxPackets(bulkPackets)
	for range demandPackets - plainDemandPackets {
		<-p.demandSlots
	}
	return nil
}

// bulkLoop sends the background until ctx is done or the disk fails.
func (p *pump) bulkLoop(ctx context.Context) error {
	if err := p.awaitAdmission(ctx); err != nil {
		return err
	}
	defer p.limit.leave()
	r := p.newReader()
	for {
		delayed := p.order.release(time.Now())
		from, hint, ok := p.order.peekBulk()
		if !ok || hint {
			p.limit.leave()
		}
		if !ok {
			p.sayFull()
			if err := p.waitBulk(ctx, delayed); err != nil {
				return err
			}
			continue
		}
		if !hint {
			held, err := p.waitRate(ctx, delayed)
			if err != nil {
				return err
			}
			if held {
				continue // a hint may have come
			}
		}
		if err := p.sendBulk(ctx, r, from); err != nil {
			return err
		}
	}
}

// waitBulk waits for something to send; delayed, if not 0, is when a block
// that failed is due.
func (p *pump) waitBulk(ctx context.Context, delayed time.Duration) error {
	var due <-chan time.Time
	if delayed > 0 {
		t := time.NewTimer(delayed)
		defer t.Stop()
		due = t.C
	}
	return p.waitFor(ctx, due, nil)
}

// waitFor waits for the order to wake the background, for due, or for changed.
func (p *pump) waitFor(ctx context.Context, due <-chan time.Time, changed <-chan struct{}) error {
	select {
	case <-p.order.bulkWake:
		return nil
	case <-due:
		return nil
	case <-changed:
		return nil
	case <-p.failed:
		return p.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// sendBulk sends the run that begins at block from: a hole as one zero run,
// data as one packet for each stretch of it. It waits for the window before it
// takes the run: until then demand may have any block of it.
func (p *pump) sendBulk(ctx context.Context, r *reader, from int64) error {
	limit, hole, err := r.run(from, p.packet())
	if err != nil {
		return p.fail(err)
	}
	if hole {
		return p.sendHole(ctx, r, from, limit)
	}
	bs := p.order.geo.blockSize
	n, err := p.window.await(ctx, func() int64 { return min(limit*bs, p.packet()) })
	if err != nil {
		return err
	}
	p.giveWay(ctx)
	s, ok := p.order.takeBulk(from, n/bs)
	if !ok {
		return nil // demand was faster
	}
	return p.sendData(ctx, r, s, protocol.PriorityBulk)
}

// sendHole sends a zero run of at most limit blocks from block from on.
func (p *pump) sendHole(ctx context.Context, r *reader, from, limit int64) error {
	if _, err := p.window.await(ctx, func() int64 { return zeroCost }); err != nil {
		return err
	}
	if p.runBytes.Load() == p.order.geo.blockSize { // a plain peer takes one block
		s, ok := p.order.takeBulk(from, 1)
		if !ok {
			return nil
		}
		if ok, err := p.stillHole(r, s); !ok {
			return err
		}
		return p.sendZeroes(ctx, s, protocol.PriorityBulk)
	}
	select {
	case p.holes <- struct{}{}:
	case <-p.failed:
		return p.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	s, ok := p.order.takeBulk(from, min(limit, p.zeroRun.Load()/p.order.geo.blockSize))
	if !ok {
		<-p.holes
		return nil // demand was faster
	}
	if ok, err := p.stillHole(r, s); !ok {
		<-p.holes
		return err
	}
	f, err := p.takeOff(ctx, s, zeroCost, protocol.PriorityBulk)
	if err != nil {
		return err
	}
	f.hole = true
	off, length := p.order.geo.bytes(s)
	return f.sent(p.to.StartZero(protocol.PriorityBulk, off, length, f))
}

// stillHole looks once more whether s, which has been taken, is a hole, if
// somebody may have written there since the first look; if it is none, s is put
// back. Only what is read after a block was taken counts.
func (p *pump) stillHole(r *reader, s span) (bool, error) {
	if p.disk.Live == nil {
		return true, nil
	}
	off, length := p.order.geo.bytes(s)
	end, hole, err := r.ext.ExtentAt(off)
	if err != nil {
		return false, p.fail(err)
	}
	if hole && end >= off+length {
		return true, nil
	}
	r.extFrom, r.extTo = 0, 0 // what it knows is out of date
	p.order.putBack(s)
	return false, nil
}

// holeLanded makes the next zero run longer or shorter by what this one took.
func (p *pump) holeLanded(took time.Duration) {
	<-p.holes
	best := p.zeroBest.Load()
	if best == 0 || int64(took) < best {
		best = int64(took)
		p.zeroBest.Store(best)
	}
	run := p.zeroRun.Load()
	if int64(took)-best < int64(zeroTime) {
		run = min(2*run, maxZeroRun)
	} else {
		run = max(run/2, firstZeroRun/8, p.order.geo.blockSize)
	}
	p.zeroRun.Store(run)
}

// giveWay lets demand in flight have the processors and the path for a moment
// before the next packet of the background.
func (p *pump) giveWay(ctx context.Context) {
	if p.demandOut.Load() == 0 {
		return
	}
	t := time.NewTimer(wayTime)
	defer t.Stop()
	select {
	case <-p.demandLanded:
	case <-t.C:
	case <-ctx.Done():
	}
}

// packet is the most that one packet of the background should hold, in bytes.
func (p *pump) packet() int64 {
	return p.limit.limit.packet(min(p.runBytes.Load(), p.window.packet()))
}

// waitRate waits if what the background has sent does not fit the rate yet, or
// if it is paused: until that may have changed, a hint may have come, or a block
// that failed is due (delayed, if not 0).
func (p *pump) waitRate(ctx context.Context, delayed time.Duration) (held bool, err error) {
	held, wait, changed := p.limit.hold()
	if !held {
		return false, nil
	}
	if wait <= 0 || delayed > 0 && delayed < wait {
		wait = delayed
	}
	var due <-chan time.Time
	if wait > 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		due = t.C
	}
	return true, p.waitFor(ctx, due, changed)
}

// demandLoop sends what is asked for until ctx is done or the disk fails.
func (p *pump) demandLoop(ctx context.Context) error {
	if err := p.awaitAdmission(ctx); err != nil {
		return err
	}
	r := p.newReader()
	for {
		s, ok := p.order.nextUrgent(max(1, p.runBytes.Load()/p.order.geo.blockSize))
		if ok {
			if err := p.sendData(ctx, r, s, protocol.PriorityUrgent); err != nil {
				return err
			}
			continue
		}
		select {
		case <-p.order.urgentWake:
		case <-p.failed:
			return p.err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// sendData reads s and sends it: zero blocks as zero runs, the others as data.
// A block that cannot be read is tried again later.
func (p *pump) sendData(ctx context.Context, r *reader, s span, pri protocol.Priority) error {
	data, err := r.read(s)
	if err != nil {
		return p.retry(s, err)
	}
	for s.from < s.to {
		n, zero := r.stretch(data)
		part := span{s.from, s.from + n}
		_, length := p.order.geo.bytes(part)
		if zero {
			err = p.sendZeroes(ctx, part, pri)
		} else {
			err = p.sendPacket(ctx, part, data[:length], pri)
		}
		if err != nil {
			return err
		}
		data, s.from = data[length:], part.to
	}
	return nil
}

func (p *pump) sendPacket(ctx context.Context, s span, data []byte, pri protocol.Priority) error {
	f, err := p.takeOff(ctx, s, int64(len(data)), pri)
	if err != nil {
		return err
	}
	off, _ := p.order.geo.bytes(s)
	p.counts.sent.Add(int64(len(data)))
	if f.demand {
		p.counts.asked.Add(int64(len(data)))
	}
	return f.sent(p.to.StartWrite(pri, data, off, f))
}

func (p *pump) sendZeroes(ctx context.Context, s span, pri protocol.Priority) error {
	f, err := p.takeOff(ctx, s, zeroCost, pri)
	if err != nil {
		return err
	}
	off, length := p.order.geo.bytes(s)
	return f.sent(p.to.StartZero(pri, off, length, f))
}

// takeOff counts a packet of n bytes as sent. Demand waits here for a bound on
// its packets, and never for the background, which has waited for the window and
// the rate before it took the blocks.
func (p *pump) takeOff(ctx context.Context, s span, n int64, pri protocol.Priority) (*flight, error) {
	f := p.flights.Get().(*flight)
	f.span, f.demand, f.hole = s, pri == protocol.PriorityUrgent, false
	_, known := p.to.Peer()
	f.early = !known
	if !f.demand {
		p.limit.owe(n)
		f.mark = p.window.begin(n)
		return f, nil
	}
	p.window.demand()
	select {
	case p.demandSlots <- struct{}{}:
		p.demandOut.Add(1)
		return f, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}
