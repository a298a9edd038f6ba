// Package protocol speaks the Silo protocol over any reader and writer: many
// devices and many requests at once on one connection, with bounded memory and
// with urgent packets before bulk data.
//
// ProtocolRW is the connection. At the source, ToProtocol is a device as a
// storage.StorageProvider whose writes travel; at the destination,
// FromProtocol applies what arrives to a store. What both cost and take is in
// limits.go; the bytes are in package wire and docs/PROTOCOL.md.
//
// One goroutine at a time reads, as long as Handle runs. It never waits for a
// consumer longer than a moment (see turn), with one exception: received data is
// bounded by Options.Memory, and while that is used up nothing more is read. A
// device has a share of the memory that no other can take, and the rest is for
// whoever needs it.
package protocol

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// DevInfo announces a device.
type DevInfo = wire.DevInfo

// Protocol is the connection as ToProtocol and FromProtocol need it. It is
// implemented by *ProtocolRW, and by what embeds one.
type Protocol interface {
	// Done is closed when the connection has ended.
	Done() <-chan struct{}
	// Err says why it ended, and is nil before.
	Err() error

	connection() *ProtocolRW
}

// Options are limits of a ProtocolRW. The zero value of each takes its default.
type Options struct {
	// Memory bounds received data that is not yet in storage, in bytes: 64 MiB
	// by default. Most of it is dealt out to devices as shares of their own.
	Memory int64
	// MaxPacket is the longest packet that is taken, in bytes: 64 MiB by default.
	MaxPacket int
	// MaxData is the largest data packet that an extended peer is told to send,
	// in bytes: 1 MiB by default, 16 MiB at most.
	MaxData uint32
	// MaxDevices is how many devices a connection may have: 1,024 by default, and
	// no more than one for each 64 KiB of Memory.
	MaxDevices int
	// Workers is how many requests of a device go to its store at once: 4 by
	// default.
	Workers int
}

func (o Options) withDefaults() Options {
	if o.Memory <= 0 {
		o.Memory = defaultMemory
	}
	o.Memory = max(o.Memory, minMemory)
	if o.MaxPacket <= 0 {
		o.MaxPacket = defaultMaxPacket
	}
	if o.MaxData == 0 {
		o.MaxData = defaultMaxData
	}
	o.MaxData = min(o.MaxData, maxData, uint32(min(o.Memory/2, maxData)))
	if o.MaxDevices <= 0 {
		o.MaxDevices = defaultMaxDevices
	}
	o.MaxDevices = int(min(int64(o.MaxDevices), o.Memory/memoryPerDevice))
	if o.Workers <= 0 {
		o.Workers = defaultWorkers
	}
	return o
}

// ProtocolRW is one connection. Its methods may be called from any goroutine.
type ProtocolRW struct {
	opts      Options
	newDevice func(p Protocol, dev uint32)
	r         io.Reader
	w         io.Writer
	stopCtx   func() bool

	waiters sync.Pool // of *waiter; not shared by connections, as channels belong to a synctest bubble

	calls   calls  // our requests that wait for an answer
	sender  sender // who may write to w, and when
	outbox  outbox // small packets on their way to sender
	budget  budget // memory for received data
	check   checking
	drainer drainer // the work after the peer has hung up

	life    lifeline
	done    chan struct{} // closed by end after err is set
	err     error         // why the connection ended; read only after done
	settled chan struct{} // closed by end when every call is completed
	endOnce sync.Once
	wg      sync.WaitGroup // Handle and every goroutine of a device

	turn turn // whose turn it is to read
	// Used by the goroutine that reads alone:
	br      *bufio.Reader // over life
	scratch []byte
	own     *incoming // whose ownJob the reader takes to the store itself, or nil
	ownJob  job

	mu sync.Mutex // guards state; never held while writing, or while calling out
	// Guarded by mu:
	devices map[uint32]*device
	handled bool
	ended   bool
	stray   uint64
}

// NewProtocolRW makes a connection of a reader and a writer, which may be the
// same. When a device is seen for the first time, by a packet that is sent or
// received, newDevice is called once for it on a goroutine of its own; it may
// be nil, may send, and should not take long. The connection ends with Close, with ctx, or with an
// error; then r and w are closed if they can be. A connection on which nothing
// can be closed only ends when its read does.
func NewProtocolRW(ctx context.Context, r io.Reader, w io.Writer, newDevice func(p Protocol, dev uint32), opts ...Options) *ProtocolRW {
	var o Options
	if len(opts) > 0 {
		o = opts[0]
	}
	p := &ProtocolRW{
		opts:      o.withDefaults(),
		newDevice: newDevice,
		r:         r,
		w:         w,
		done:      make(chan struct{}),
		settled:   make(chan struct{}),
		devices:   make(map[uint32]*device),
	}
	p.life.r, p.life.gone = r, func() { p.end(ErrSilent) }
	p.br = bufio.NewReaderSize(&p.life, readBuffer)
	p.turn.ended = make(chan error, 1)
	p.drainer.moved = make(chan struct{}, 1)
	p.sender.init(w)
	p.outbox.init(p)
	p.budget.init(p.opts.Memory)
	stop := context.AfterFunc(ctx, func() { p.end(context.Cause(ctx)) })
	p.mu.Lock()
	p.stopCtx = stop
	p.mu.Unlock()
	return p
}

func (p *ProtocolRW) connection() *ProtocolRW { return p }

// Handle reads until the connection ends and returns why, never nil. It is run
// once, on a goroutine of the caller. A peer that closed the connection between
// two packets is io.EOF, after its devices were opened and what it sent has been
// taken to the stores, as long as there is progress; Close is ErrClosed.
func (p *ProtocolRW) Handle() error {
	p.mu.Lock()
	if p.handled {
		p.mu.Unlock()
		return errors.New("protocol: Handle was called twice")
	}
	p.handled = true
	ended := p.ended
	if !ended {
		p.wg.Add(1)
	}
	p.mu.Unlock()
	if ended {
		<-p.done
		return p.err
	}
	defer p.wg.Done()
	p.turn.timer = time.AfterFunc(math.MaxInt64, p.relieve)
	defer p.turn.timer.Stop()
	// Not here: who reads may be at a store when another one reads the end.
	p.start(p.readLoop)
	select {
	case err := <-p.turn.ended:
		if errors.Is(err, io.EOF) {
			p.drain()
		}
		p.end(err)
	case <-p.done: // perhaps nobody reads any more
	}
	<-p.done
	return p.err
}

// Close ends the connection, wakes everybody who waits for it and returns when
// Handle has returned and no goroutine of a device is left. So it waits for
// calls into stores that are running, and must not be called from one of them,
// nor from any other callback: see Abort.
func (p *ProtocolRW) Close() error {
	p.end(ErrClosed)
	<-p.settled
	p.wg.Wait()
	return nil
}

// Abort ends the connection as Close does, with err as the reason, and does not
// wait. It may be called from callbacks.
func (p *ProtocolRW) Abort(err error) {
	p.end(err)
}

// Done is closed when the connection has ended.
func (p *ProtocolRW) Done() <-chan struct{} {
	return p.done
}

// Err says why the connection ended; nil before.
func (p *ProtocolRW) Err() error {
	select {
	case <-p.done:
		return p.err
	default:
		return nil
	}
}

// Stats are counters of a connection.
type Stats struct {
	Received       int64  // bytes of data that are received and not yet in storage
	Unanswered     int    // our requests that wait for an answer
	StrayResponses uint64 // responses that nobody waited for; they are ignored
	Damaged        uint64 // WriteAts that were refused since their checksum did not match
}

// Stats returns the counters as they stand.
func (p *ProtocolRW) Stats() Stats {
	p.mu.Lock()
	stray := p.stray
	p.mu.Unlock()
	return Stats{
		Received: p.budget.inUse(), Unanswered: p.calls.len(), StrayResponses: stray,
		Damaged: p.check.damaged.Load(),
	}
}

// start runs f on a goroutine that Close waits for, unless the connection has
// ended.
func (p *ProtocolRW) start(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.ended {
		p.wg.Go(f)
	}
}

// end ends the connection: the first reason counts, and everybody who waits is
// woken with it.
func (p *ProtocolRW) end(err error) {
	first := false
	p.endOnce.Do(func() {
		first = true
		p.err = fmt.Errorf("protocol: connection ended: %w", err)
		p.mu.Lock()
		p.ended = true
		devices := make([]*device, 0, len(p.devices))
		for _, d := range p.devices {
			devices = append(devices, d)
		}
		stop := p.stopCtx
		if p.drainer.late != nil {
			p.drainer.late.Stop()
		}
		p.mu.Unlock()
		// Before anybody can know of the end: who knows of it sends nothing any more.
		p.sender.close()
		p.outbox.close()
		close(p.done)
		if stop != nil {
			stop()
		}
		// Whoever is in a Read or Write now is woken by this; a second Close of the
		// same conn says so, which is no news.
		for _, c := range []any{p.w, p.r} {
			if c, ok := c.(io.Closer); ok {
				_ = c.Close() // the connection is over, and err says why
			}
		}
		p.budget.close()
		for _, d := range devices {
			d.close()
		}
	})
	if !first {
		return
	}
	for _, c := range p.calls.end(p.err) { // not inside Do: a Complete may call Abort
		c.finish(p.err)
	}
	close(p.settled)
}
