package migrate

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/silo-nbd/silo-nbd/pkg/crowd"
)

const (
	// maxCopies bounds how many destinations are served at once: each costs memory.
	maxCopies = 256
	// maxCallersOfClone is how many connections may not have said anything yet, if the
	// options do not say.
	maxCallersOfClone = 64
	// maxKnownCopies bounds how many are remembered.
	maxKnownCopies = 1 << 16
)

// Cloner serves disks that nothing writes, such as a golden image, to any number of
// destinations at once, each at its own pace and all within one rate. Each of them
// owns its copy: nothing is handed off. A destination that connects again goes on with
// what it lacks.
type Cloner struct {
	opts  SourceOptions
	log   *slog.Logger
	disks []SourceDisk
	limit *throttle
	lines lineBudget

	mu sync.Mutex
	// Guarded by mu:
	running  map[*Source]bool // sessions; true: the other side has spoken
	copies   map[Device]bool  // destinations that have names, and whether they have everything
	nameless int              // destinations without names that have everything
	sessions int
	sent     int64 // bytes, by sessions that have ended
	asked    int64 // of these, what was asked for
	damaged  int64 // packets, in sessions that have ended
	err      error // the last thing that went wrong
}

// Copies is how many destinations have the disks of a Cloner.
type Copies struct {
	Complete   int // have all of them
	UnderWay   int // are connected, and do not
	Unfinished int // do not, connected or not
}

// NewCloner returns a Cloner for disks, whose names must differ and which must not be
// in use. Of the options those that are for handoffs mean nothing.
func NewCloner(disks []SourceDisk, opts SourceOptions) (*Cloner, error) {
	for i := range disks {
		if disks[i].Live != nil {
			return nil, fmt.Errorf("migrate: disk %s is in use: it cannot be cloned", disks[i].Name)
		}
		if disks[i].Identity == (Identity{}) { // all sessions have to give the same
			_, _ = rand.Read(disks[i].Identity.UUID[:]) // never fails
			disks[i].Identity.Generation = 1
		}
	}
	opts.Listening, opts.MaxCallers, opts.Met, opts.Ledger, opts.AutoHandoff = true, cmp.Or(opts.MaxCallers, maxCallersOfClone), nil, nil, false
	one, err := NewSource(disks, opts)
	if err != nil {
		return nil, err
	}
	return &Cloner{
		opts: one.opts, log: one.log, disks: disks, limit: one.limit,
		running: make(map[*Source]bool), copies: make(map[Device]bool),
	}, nil
}

// Run serves the destinations that connect until ctx is done, and returns its cause, or
// until a disk can no longer be served.
func (c *Cloner) Run(ctx context.Context, connect Connector) error {
	group, ctx := errgroup.WithContext(ctx)
	places := crowd.New(c.opts.MaxCallers)
	group.Go(func() error {
		retry := newBackoff()
		for {
			conn, err := connect(ctx)
			switch {
			case ctx.Err() != nil:
				return context.Cause(ctx)
			case errors.Is(err, net.ErrClosed):
				return err
			case err != nil:
				c.tell(slog.LevelWarn, "no connection can be accepted; trying again", "cause", err)
				if err := retry.wait(ctx); err != nil {
					return err
				}
				continue
			}
			retry.reset()
			from := crowd.Address(conn)
			place, err := places.Enter(ctx, from, func() { _ = conn.Close() }) // nothing that mattered was said on it
			if err != nil {
				_ = conn.Close() // as above
				return err
			}
			group.Go(func() error { return c.serve(ctx, conn, from, place) })
		}
	})
	return group.Wait()
}

// tell logs what a peer can cause as often as it likes.
func (c *Cloner) tell(level slog.Level, what string, more ...any) {
	if skipped, ok := c.lines.take(); ok {
		if skipped > 0 {
			more = append(more, "lines_left_out", skipped)
		}
		c.log.Log(context.Background(), level, what, more...)
	}
}

// serve makes one copy, or a part of it, over conn, which it closes. An error is that of
// a disk, which ends all.
func (c *Cloner) serve(ctx context.Context, conn io.ReadWriteCloser, from string, place *crowd.Place) error {
	s, err := NewSource(c.disks, c.opts)
	if err != nil {
		return errors.Join(err, conn.Close()) // it was made before, of the same disks
	}
	s.limit, s.log = c.limit, c.log.With("from", from)
	for _, d := range s.disks {
		d.clone = true
	}
	call := newCaller(conn)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	wg.Go(func() {
		select {
		case <-call.hello.done:
			place.Leave()
			if !c.begin(s) {
				c.tell(slog.LevelWarn, "too many copies are under way: one has to wait", "most", maxCopies)
				cancel(errCrowded)
			}
		case <-ctx.Done():
		}
	})
	greeted, err := s.session(ctx, call)
	cancel(nil)
	wg.Wait()
	place.Leave()
	return c.end(s, greeted, err)
}

// begin counts a session whose other side has spoken; false: there are too many.
func (c *Cloner) begin(s *Source) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.running) >= maxCopies {
		return false
	}
	c.running[s] = true
	c.sessions++
	return true
}

// end counts what a session has come to.
func (c *Cloner) end(s *Source, greeted bool, err error) error {
	device := s.disks[0].madeInto()
	c.mu.Lock()
	delete(c.running, s)
	for _, d := range s.disks {
		c.sent += d.counts.sent.Load()
		c.asked += d.counts.asked.Load()
		c.damaged += d.counts.damage.count()
	}
	switch {
	case !greeted:
	case device == Device{} && err == nil:
		c.nameless++
	case device != Device{} && (len(c.copies) < maxKnownCopies || err == nil):
		c.copies[device] = c.copies[device] || err == nil
	}
	if err != nil && greeted {
		c.err = err
	}
	c.mu.Unlock()
	n := c.Copies()
	var fatal *FatalError
	switch {
	case errors.As(err, &fatal):
		return err
	case err == nil:
		c.log.Info("a copy is complete", "copies_complete", n.Complete, "unfinished", n.Unfinished, "under_way", n.UnderWay)
	default:
		c.tell(slog.LevelWarn, "a connection has ended before its copy was complete; it goes on when it is made again",
			"cause", cut(err.Error(), maxReason), "copies_complete", n.Complete, "unfinished", n.Unfinished)
	}
	return nil
}

// Copies is how many copies there are by now.
func (c *Cloner) Copies() (n Copies) {
	c.mu.Lock()
	defer c.mu.Unlock()
	known := make(map[Device]bool) // under way
	for s := range c.running {
		if device := s.disks[0].madeInto(); device == (Device{}) || !c.copies[device] {
			n.UnderWay++
			known[device] = true
			if device == (Device{}) {
				n.Unfinished++
			}
		}
	}
	delete(known, Device{})
	n.Complete = c.nameless
	for device, complete := range c.copies {
		switch {
		case complete:
			n.Complete++
		case !known[device]:
			n.Unfinished++
		}
	}
	n.Unfinished += len(known)
	return n
}

// Status returns how far each disk is, in the order of NewCloner: at the copy that is
// under way and lacks the most.
func (c *Cloner) Status() []DiskStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := make([]DiskStatus, len(c.disks))
	for i, d := range c.disks {
		st := DiskStatus{
			Name: d.Name, Size: int64(d.Store.Size()), BlockSize: c.opts.BlockSize, State: StateWaiting,
			Reconnects: max(0, c.sessions-1), Err: c.err,
		}
		for s := range c.running {
			one := s.disks[i].status(passes{})
			if !st.Connected || one.BytesDone < st.BytesDone {
				st.BytesDone, st.State, st.BytesCompared, st.BytesToCompare = one.BytesDone, one.State, one.BytesCompared, one.BytesToCompare
			}
			st.Connected = true
			st.BytesSent, st.BytesAsked, st.Damaged = st.BytesSent+one.BytesSent, st.BytesAsked+one.BytesAsked, st.Damaged+one.Damaged
		}
		all[i] = st
	}
	// Of sessions that have ended it is not kept which disk it was.
	all[0].BytesSent, all[0].BytesAsked, all[0].Damaged = all[0].BytesSent+c.sent, all[0].BytesAsked+c.asked, all[0].Damaged+c.damaged
	return all
}

// Path is what all connections together do; ok is false without one.
func (c *Cloner) Path() (p Path, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := range c.running {
		one, is := s.Path()
		if !is {
			continue
		}
		if !ok || one.RoundTrip > 0 && one.RoundTrip < p.RoundTrip {
			p.RoundTrip = one.RoundTrip
		}
		p.InFlight, p.Window, p.Rate = p.InFlight+one.InFlight, p.Window+one.Window, p.Rate+one.Rate
		ok = true
	}
	return p, ok
}

// SetRate bounds the background of all copies together, as that of a Source.
func (c *Cloner) SetRate(n int64) { c.limit.set(n) }

// Rate is the bound of SetRate; 0 is none.
func (c *Cloner) Rate() int64 { return c.limit.bound() }

// Pause holds the background of all copies until Resume, as that of a Source.
func (c *Cloner) Pause() { c.limit.pause(true) }

// Resume ends a Pause.
func (c *Cloner) Resume() { c.limit.pause(false) }

// Paused reports whether the background is held by Pause.
func (c *Cloner) Paused() bool { return c.limit.isPaused() }

// madeInto is the destination's device of this connection; zero: it is not known yet,
// or the destination has no name for it.
func (d *sourceDisk) madeInto() Device {
	last, _ := d.peer.get()
	if !last.Met || last.Device == unnamed {
		return Device{}
	}
	return last.Device
}
