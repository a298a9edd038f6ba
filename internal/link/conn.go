package link

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

const (
	// receiveBuffer keeps the kernel from adding a long queue of its own to
	// that of a link with a rate, in bytes.
	receiveBuffer = 64 << 10
	// maxParcels bounds what may be under way in small pieces.
	maxParcels = 4 << 10
)

// conn is one connection through the link: two flows.
type conn struct {
	link   *Link
	client net.Conn
	cancel context.CancelFunc

	mu sync.Mutex
	// Guarded by mu:
	target net.Conn // nil until run
	broken bool
}

// run carries the connection until both ways have ended or it is cut.
func (c *conn) run(ctx context.Context, target net.Conn) {
	c.mu.Lock()
	c.target = target
	broken := c.broken
	c.mu.Unlock()
	if broken { // cut while the target was being dialed
		reset(target)
		return
	}
	up := newFlow(c, &c.link.toTarget, c.client, target)
	down := newFlow(c, &c.link.fromTarget, target, c.client)
	var wg sync.WaitGroup
	wg.Go(func() { up.readLoop(ctx) })
	wg.Go(func() { up.deliverLoop(ctx) })
	wg.Go(func() { down.readLoop(ctx) })
	wg.Go(func() { down.deliverLoop(ctx) })
	wg.Wait()
	c.client.Close() // both ways have ended: there is nobody to tell
	target.Close()
}

// cut breaks the connection at both ends at once.
func (c *conn) cut() {
	c.mu.Lock()
	c.broken = true
	target := c.target
	c.mu.Unlock()
	c.cancel()
	reset(c.client)
	if target != nil {
		reset(target)
	}
}

// socket is what lies under c.
func socket(c net.Conn) net.Conn {
	if w, ok := c.(interface{ NetConn() net.Conn }); ok {
		return w.NetConn()
	}
	return c
}

// reset closes a connection so that the peer notices at once: over TCP by RST.
func reset(c net.Conn) {
	if tcp, ok := socket(c).(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // fails only when it is closed already
	}
	c.Close() // what is lost with it is meant to be
}

// flow is one direction of one connection.
type flow struct {
	conn     *conn
	dir      *direction
	src, dst net.Conn
	underway *semaphore.Weighted // bytes between readLoop and deliverLoop
	parcels  chan parcel
}

// parcel is some bytes under way. No bytes: the end of the stream.
type parcel struct {
	bytes   []byte
	arrives time.Time
}

func newFlow(c *conn, dir *direction, src, dst net.Conn) *flow {
	limit := dir.bucket.underway(c.link.delay)
	if limit != unlimitedUnderway {
		if s, ok := socket(src).(*net.TCPConn); ok {
			_ = s.SetReadBuffer(receiveBuffer) // fails only when the peer is gone, which Read tells
		}
	}
	return &flow{
		conn: c, dir: dir, src: src, dst: dst,
		underway: semaphore.NewWeighted(limit),
		parcels:  make(chan parcel, maxParcels),
	}
}

// readLoop takes bytes from the sender as fast as the queue drains.
func (f *flow) readLoop(ctx context.Context) {
	defer close(f.parcels)
	buf := make([]byte, maxChunk)
	for f.conn.link.gate.wait(ctx) {
		n, err := f.src.Read(buf[:f.dir.bucket.chunk()])
		if n > 0 {
			if f.underway.Acquire(ctx, int64(n)) != nil {
				return
			}
			sent, next := f.dir.bucket.reserve(time.Now(), n)
			if !f.hand(ctx, parcel{bytes.Clone(buf[:n]), sent.Add(f.conn.link.delay)}) || !sleepUntil(ctx, next) {
				return
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			sent, _ := f.dir.bucket.reserve(time.Now(), 0)
			f.hand(ctx, parcel{nil, sent.Add(f.conn.link.delay)})
			return
		case err != nil:
			f.conn.cut()
			return
		}
	}
}

func (f *flow) hand(ctx context.Context, p parcel) bool {
	select {
	case f.parcels <- p:
		return true
	case <-ctx.Done():
		return false
	}
}

// deliverLoop hands to the receiver what has arrived.
func (f *flow) deliverLoop(ctx context.Context) {
	for p := range f.parcels {
		if !sleepUntil(ctx, p.arrives) || !f.conn.link.gate.wait(ctx) {
			return
		}
		if len(p.bytes) == 0 {
			f.endOfStream()
			continue
		}
		f.dir.noise.pass(p.bytes)
		if !f.deliver(ctx, p.bytes) {
			return
		}
		f.underway.Release(int64(len(p.bytes)))
	}
}

// deliver hands over bytes that have arrived, and lets happen what is to happen
// between them. It says whether the flow goes on.
func (f *flow) deliver(ctx context.Context, p []byte) bool {
	for {
		n, happen := f.dir.faults.next(f.dir.bytes.Load(), len(p))
		if _, err := f.dst.Write(p[:n]); err != nil {
			f.conn.cut()
			return false
		}
		f.dir.bytes.Add(int64(n))
		if happen == nil {
			return true
		}
		happen()
		if ctx.Err() != nil || !f.conn.link.gate.wait(ctx) {
			return false
		}
		p = p[n:]
	}
}

// endOfStream passes on that the sender has closed its direction; the other
// one may go on.
func (f *flow) endOfStream() {
	half, ok := f.dst.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		f.conn.cut()
	}
}
