package migrate

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

const (
	// prepareLimit bounds the first half of a handoff, in which the disks are
	// written as ever, and holdLimit the second, in which writes wait. After that
	// it is taken back. A handoff that the destination has been told of has no
	// limit.
	prepareLimit = 30 * time.Second
	holdLimit    = 5 * time.Second
)

var (
	// ErrFrozen says that there is nothing to hand off.
	ErrFrozen = errors.New("no disk is served here, so there is nothing to hand off: the destination has the disks since it connected")
	// ErrNotConnected says that there is no destination to hand off to.
	ErrNotConnected = errors.New("there is no connection to the destination: nothing has changed: try again when there is one")
	// ErrEnded says that there will be no destination any more.
	ErrEnded = errors.New("the migration has ended, its log says why: nothing has changed: end this process, and start it again to try again")
	// ErrNoHandoff says that there is nothing to abort.
	ErrNoHandoff = errors.New("no handoff is under way")
	// ErrTooLate says that a handoff cannot be aborted any more.
	ErrTooLate = errors.New("it is too late: the disks belong to the destination")

	errAborted = errors.New("the handoff was aborted: the disks are served here as before")
	errLost    = errors.New("the connection broke before the handoff: the disks are served here as before")
)

// hand is the handoff of all live disks of a Source: at most one is under way.
type hand struct {
	ledger Ledger
	noting turn          // of whom prepares a handoff in the ledger
	kick   chan struct{} // capacity 1: somebody asks

	mu sync.Mutex // never held over I/O
	// Guarded by mu:
	attached  bool     // there is a session that can hand off
	contacts  contacts // destinations that were met
	closed    bool     // Run has ended
	asked     *request // nil: nobody asks
	committed bool     // the destination may know: there is no way back
	taken     chan struct{}
	auto      bool
}

// request is a handoff that somebody waits for.
type request struct {
	waiting int           // callers of Handoff that wait
	ended   chan struct{} // closed after err is set
	err     error         // read only after ended

	cancel context.CancelCauseFunc // ends the attempt; nil: it has not begun
	gone   error                   // why nobody wants it any more
}

func newHand(l Ledger, auto, committed bool) *hand {
	if l == nil {
		l = new(noLedger)
	}
	return &hand{ledger: l, noting: newTurn(), auto: auto, committed: committed, kick: make(chan struct{}, 1), taken: make(chan struct{})}
}

// Handoff hands all live disks to the destination now, whatever has not
// travelled yet: the rest follows while they are used there. It returns nil when
// the destination has taken them, the cause of ctx when that ends before, which
// aborts if nobody else waits, and otherwise why the disks are still served here.
//
// If several destinations have been met, it is not clear which one is meant: see
// HandoffTo.
func (s *Source) Handoff(ctx context.Context) error { return s.HandoffTo(ctx, "") }

// HandoffTo is Handoff to the destination that to names: by the UUID of its device, or
// 8 or more digits that the UUID begins with, or by its address with or without the
// port. It returns ErrOtherDestination if another one is connected.
func (s *Source) HandoffTo(ctx context.Context, to string) error {
	h := s.hand
	h.mu.Lock()
	switch {
	case !s.hasLive():
		h.mu.Unlock()
		return ErrFrozen
	case h.asked != nil: // this caller hears the outcome, too, also if it is under way
	case h.committed:
		h.mu.Unlock()
		return h.awaitTaken(ctx)
	case h.closed:
		h.mu.Unlock()
		return ErrEnded
	case !h.attached:
		h.mu.Unlock()
		return ErrNotConnected
	}
	if err := h.contacts.check(to); err != nil && !h.committed {
		h.mu.Unlock()
		return err
	}
	r := h.askLocked()
	r.waiting++
	h.mu.Unlock()
	select {
	case <-r.ended:
		return r.err
	case <-ctx.Done():
		h.leave(r, context.Cause(ctx))
		return context.Cause(ctx)
	}
}

// AbortHandoff takes back a handoff that is under way: when it returns nil the
// disks are served here as before, and are not handed off by themselves any
// more. It returns ErrTooLate when the destination may know already, and
// ErrNoHandoff when there is none.
func (s *Source) AbortHandoff() error {
	h := s.hand
	h.mu.Lock()
	r := h.asked
	switch {
	case h.committed:
		h.mu.Unlock()
		return ErrTooLate
	case r == nil:
		h.mu.Unlock()
		return ErrNoHandoff
	}
	h.auto = false
	r.drop(errAborted)
	if r.cancel == nil { // it has not begun
		h.endLocked(errAborted)
	}
	h.mu.Unlock()
	notify(h.kick)
	<-r.ended
	if errors.Is(r.err, errAborted) {
		return nil
	}
	return fmt.Errorf("the handoff had failed already: %w", r.err)
}

func (h *hand) awaitTaken(ctx context.Context) error {
	select {
	case <-h.taken:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (h *hand) askLocked() *request {
	if h.asked == nil {
		h.asked = &request{ended: make(chan struct{})}
		notify(h.kick)
	}
	return h.asked
}

// leave is what a caller does who does not wait any more.
func (h *hand) leave(r *request, why error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if r.waiting--; r.waiting == 0 && !h.committed {
		r.drop(why)
		notify(h.kick)
	}
}

// drop is called with the hand's lock held.
func (r *request) drop(why error) {
	if r.gone == nil {
		r.gone = why
	}
	if r.cancel != nil {
		r.cancel(r.gone)
	}
}

// attach tells whether there is a session that can hand off. Without one nobody
// waits for what cannot come.
func (h *hand) attach(is bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.attached = is
	if !is && !h.committed {
		h.endLocked(errLost)
	}
}

// close tells that there is no session any more, nor will be.
func (h *hand) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	if !h.committed {
		h.endLocked(ErrEnded)
	}
}

func (h *hand) endLocked(err error) {
	if r := h.asked; r != nil {
		r.err = err
		close(r.ended)
		h.asked = nil
	}
}

// isAuto reports whether the disks are handed off without being asked: not if it is not
// clear to which destination.
func (h *hand) isAuto() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.auto && !h.contacts.several()
}

// meet notes which destination is connected. It returns all that were met if that keeps
// the handoff from coming by itself.
func (h *hand) meet(c contact) (all string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.contacts.enter(c)
	if h.auto && h.contacts.several() {
		return h.contacts.String()
	}
	return ""
}

// part notes that no destination is connected.
func (h *hand) part() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.contacts.here = nil
}

// destination is the one that is connected; ok is false if there is none.
func (h *hand) destination() (c contact, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.contacts.here == nil {
		return c, false
	}
	return *h.contacts.here, true
}

// wanted says whether somebody asks for a handoff; one that nobody wants any
// more is ended.
func (h *hand) wanted() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.asked != nil && h.asked.gone != nil {
		h.endLocked(h.asked.gone)
	}
	return h.asked != nil
}

// begin starts an attempt, which ends with the context that it returns.
func (h *hand) begin(ctx context.Context) (*request, context.Context, context.CancelCauseFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.askLocked()
	r.cancel = cancel
	if r.gone != nil {
		cancel(r.gone)
	}
	return r, ctx, cancel
}

// commit is the point of no return: what drops the request later is too late. HandOff
// has no limit, though writes are held: while it is not known what is noted, nothing may
// be written here that a source which is started again would not know of. It is little
// more than renames, and Prepare has synced all else.
func (h *hand) commit(r *request) error {
	h.mu.Lock()
	if r.gone != nil {
		h.mu.Unlock()
		return r.gone
	}
	h.committed = true
	h.mu.Unlock()
	err := h.ledger.HandOff()
	if err == nil {
		return nil
	}
	err = fmt.Errorf("the handoff could not be noted: %w", err)
	if back := h.ledger.TakeBack(); back != nil {
		return &FatalError{fmt.Errorf("%w; nor that it was taken back (%w): nobody may serve the disks until the source is started again, which knows how far it came", err, back)}
	}
	h.mu.Lock()
	h.committed = false
	h.mu.Unlock()
	return err
}

// failed ends an attempt that came to nothing.
func (h *hand) failed(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.endLocked(err)
}

// confirm notes that the destination has taken the disks.
func (h *hand) confirm() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.endLocked(nil)
	select {
	case <-h.taken:
	default:
		close(h.taken)
	}
}

// handOff makes one attempt to hand off. done says that the disks are the
// destination's now, which it has confirmed if err is nil. If neither, they are
// served here as before.
func (l *liveSession) handOff(session context.Context) (done bool, err error) {
	began := time.Now()
	h := l.src.hand
	r, ctx, cancel := h.begin(session)
	defer cancel(nil)
	held, err := l.lock(ctx)
	if err == nil {
		err = h.commit(r)
	}
	var fatal *FatalError
	switch {
	case errors.As(err, &fatal):
		l.give() // it may be noted that they are not ours
		h.failed(err)
		return true, err
	case err != nil:
		l.unlock()
		h.failed(err)
		l.src.log.Warn("no handoff: the disks are served here as before", "cause", err)
		return false, nil
	}
	l.give()
	err = l.each(session, func(ctx context.Context, c *line) error {
		post := func() error { return c.to.SendEvent(ctx, &wire.Event{Type: wire.EventPostLock}) }
		if err := c.disk.peer.step(post); err != nil {
			return err
		}
		c.disk.peer.own(true)
		return nil
	})
	if err != nil {
		l.src.log.Warn("the connection broke in the handoff: the disks belong to the destination, which has only to connect again", "cause", err)
		return true, err
	}
	left := l.dirtyBytes()
	for _, c := range l.lines {
		c.order.handOver()
	}
	l.src.noteTaken()
	l.src.log.Info("handed off: the destination serves the disks now", "passes", l.pass,
		"took", time.Since(began), "writes waited", time.Since(held), "left", left)
	return true, nil
}

// lock brings everything to where it can be handed off: no write and no data is
// in flight, what was written is on stable storage, and the destination holds
// nothing that is not as it is here, durably. held is when writes began to wait.
func (l *liveSession) lock(ctx context.Context) (held time.Time, err error) {
	if err := l.prepare(ctx); err != nil {
		return held, err
	}
	held = time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, holdLimit,
		fmt.Errorf("the handoff held up writes for %v: it was taken back: is the network or a disk too slow?", holdLimit))
	defer cancel()
	return held, l.each(ctx, func(ctx context.Context, c *line) error {
		if err := c.disk.Live.hold(ctx); err != nil {
			return err
		}
		if err := l.flush(ctx, c); err != nil {
			return err
		}
		return c.takeBack(ctx, false)
	})
}

// prepare does what can be done while writes go on, so that what is left to do
// while they wait is little.
func (l *liveSession) prepare(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, prepareLimit,
		fmt.Errorf("the destination did not get ready for the handoff in %v", prepareLimit))
	defer cancel()
	for _, c := range l.lines {
		c.order.halt(true)
	}
	group, both := errgroup.WithContext(ctx)
	group.Go(func() error { return l.awaitLanded(both) })
	group.Go(func() error {
		return l.each(both, func(ctx context.Context, c *line) error {
			// A step, so that a copy of the device from before is told apart.
			lock := func() error { return c.to.SendEvent(ctx, &wire.Event{Type: wire.EventPreLock}) }
			if err := c.disk.peer.step(lock); err != nil {
				return err
			}
			return l.flush(ctx, c)
		})
	})
	if err := group.Wait(); err != nil {
		return err
	}
	if err := l.each(ctx, func(ctx context.Context, c *line) error { return c.takeBack(ctx, false) }); err != nil {
		return err
	}
	h, to := l.src.hand, l.owners()
	if err := l.src.turns.do(ctx, h.noting, func() error { return h.ledger.Prepare(to) }); err != nil {
		return fmt.Errorf("the handoff cannot be noted: %w", err)
	}
	return nil
}

// flush makes durable what clients wrote, and leaves a sync that hangs alone when ctx
// ends.
func (l *liveSession) flush(ctx context.Context, c *line) error {
	return l.src.turns.do(ctx, c.disk.flush, c.flush)
}

// awaitLanded waits until no data packet is in flight: one that arrived after
// the DirtyList with its block would bring old bytes back (trap M12).
func (l *liveSession) awaitLanded(ctx context.Context) error {
	for !l.landed() {
		select {
		case <-l.ended:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

func (l *liveSession) landed() bool {
	for _, c := range l.lines {
		if !c.order.landed() {
			return false
		}
	}
	return true
}

// unlock undoes lock.
func (l *liveSession) unlock() {
	for _, c := range l.lines {
		c.disk.Live.release()
		c.order.halt(false)
	}
}

// give ends all service here.
func (l *liveSession) give() {
	for _, c := range l.lines {
		c.disk.peer.own(false)
		c.disk.Live.give(c.told.device())
	}
}

// owners is the destination's device for each disk.
func (l *liveSession) owners() map[string]Owner {
	to := make(map[string]Owner)
	for _, c := range l.lines {
		to[c.disk.Name] = c.disk.peer.owner()
	}
	return to
}
