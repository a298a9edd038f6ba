package migrate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// admission decides, once for a connection, whether the destination at its other end
// gets data. Until it has, nothing is sent but announcements and questions.
//
// A disk that was handed off goes to its owner alone. A frozen one is handed off here,
// to the first destination that takes it. Of one in use it is found out whether what
// the destination holds is what it held when the source saw it last.
type admission struct {
	src   *Source
	lines []*line // all of the connection
	conn  any     // it itself; what tells its address
}

// refusalTime bounds how long a destination may take to hear why it gets nothing.
const refusalTime = 2 * time.Second

// customRefused is the type of the custom event that tells a destination why its
// connection ends.
const customRefused = 'R'

// errOldPeer means that the destination would use the disks at once. It ends the
// connection, and another destination may come.
var errOldPeer = errors.New("the destination knows no live source: use the same version of silo-nbd on both sides, or stop the virtual machine and move the disks frozen")

// notOwnerError says why a destination gets nothing of a disk that was handed off.
type notOwnerError struct {
	disk string
	err  error
}

func (e *notOwnerError) Error() string {
	return fmt.Sprintf("disk %q was handed off, and the destination that has connected is not its owner: %v: nothing was sent: "+
		"the disk has one owner: let that one connect, or take the disk back with --force-reclaim", e.disk, e.err)
}

func (e *notOwnerError) Unwrap() error { return e.err }

// run admits the destination, or returns why it gets nothing.
func (a *admission) run(ctx context.Context) error {
	if err := each(ctx, a.lines, a.learn); err != nil {
		return err
	}
	for _, c := range a.lines { // before anything is noted of any of them
		if err := a.check(ctx, c); err != nil {
			return err
		}
	}
	if err := each(ctx, a.lines, a.compare); err != nil {
		return err
	}
	for _, c := range a.lines {
		if err := a.confirm(c); err != nil {
			return err
		}
	}
	if err := a.handOff(); err != nil {
		return err
	}
	if err := each(ctx, a.lines, a.take); err != nil {
		return err
	}
	a.meet()
	for _, c := range a.lines {
		close(c.pump.admitted)
	}
	a.src.noteTaken() // only now: nobody has to wait for it
	return nil
}

// meet notes which destination this is, for those that ask for a handoff.
func (a *admission) meet() {
	c := newContact(a.lines, a.conn)
	if all := a.src.hand.meet(c); all != "" && a.src.hasLive() && !a.src.HandedOff() {
		a.src.log.Warn("several destinations have connected, so there is no handoff by itself: say which one gets the disks, with silo-nbd handoff --to", "destinations", all)
	}
}

// each does something for every line at the same time.
func each(ctx context.Context, lines []*line, do func(ctx context.Context, c *line) error) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, c := range lines {
		group.Go(func() error { return do(ctx, c) })
	}
	return group.Wait()
}

// learn finds out who the destination is. The question is answered behind all that
// the device claims, and behind the answer to DevInfo if the destination gives one, so
// that a slow one is not taken for a plain Silo.
func (a *admission) learn(ctx context.Context, c *line) error {
	var err error
	if c.order.live != nil {
		err = c.to.SendDirtyList(ctx, uint32(c.disk.geo.blockSize), nil)
	} else {
		err = c.to.SendEvent(ctx, &wire.Event{Type: wire.EventPreLock})
	}
	if err != nil {
		return err
	}
	c.pump.greeted()
	ext, extended := c.to.Peer()
	c.told, c.extended = toldBy(ext, extended), extended
	return nil
}

// check refuses a destination that must not have the disk.
func (a *admission) check(ctx context.Context, c *line) error {
	last, owned := c.disk.peer.get()
	switch {
	case owned:
		if err := last.owns(c.told); err != nil {
			return a.refuse(ctx, c, &notOwnerError{c.disk.Name, err})
		}
	case c.order.live != nil && c.extended && c.told.plain:
		return errOldPeer
	case !c.disk.clone && c.told.Live && slices.Contains(c.disk.Former, c.told.device()):
		return a.refuse(ctx, c, fmt.Errorf("disk %q was taken back from this destination, which still uses it: nothing was sent: "+
			"to move it there again begin anew with --overwrite", c.disk.Name))
	}
	return nil
}

// compare has the destination compare what it has of a frozen disk, if it asks for that.
func (a *admission) compare(ctx context.Context, c *line) error {
	if !c.told.Compare || c.order.live != nil {
		return nil
	}
	err := a.src.compare(ctx, c)
	if err != nil {
		c.disk.note(err)
	}
	return err
}

// refuse tells the destination, if it is one of ours, that it gets nothing.
func (a *admission) refuse(ctx context.Context, c *line, why error) error {
	if !c.extended {
		return why
	}
	ctx, cancel := context.WithTimeout(ctx, refusalTime)
	defer cancel()
	// If this is lost, the destination does not hear why the connection ends.
	_ = c.to.SendEvent(ctx, &wire.Event{Type: wire.EventCustom, CustomType: customRefused, Payload: []byte(why.Error())})
	return why
}

// confirm makes it durable that this device was met, in this state. From then on its
// claims count.
func (a *admission) confirm(c *line) error {
	last, owned := c.disk.peer.get()
	now := c.told.owner()
	now.Taken = now.Taken || owned && last.Taken
	if live := c.order.live; live != nil && last.Met {
		if err := last.same(c.told); err != nil {
			a.mistrust(c, err)
		}
	}
	if last.Owner != now || last.Pending != 0 {
		if err := a.src.hand.ledger.Confirm(c.disk.Name, now); err != nil {
			return fmt.Errorf("disk %q: it cannot be noted which destination was met, so nothing is sent: %w", c.disk.Name, err)
		}
	}
	c.disk.peer.confirm(now)
	if c.extended {
		c.order.learned()
	}
	return nil
}

// mistrust makes all of a disk in use dirty: the device that has connected is not in
// the state in which the source knows what it holds.
func (a *admission) mistrust(c *line, why error) {
	if c.told.plain {
		return // it claims nothing
	}
	c.disk.Live.markAll()
	a.src.log.Warn("what the destination has from before is not trusted, and is sent again", "disk", c.disk.Name, "cause", why)
}

// handOff hands the frozen disks off that have no owner yet: all of them together, and
// durably before any of them is told.
func (a *admission) handOff() error {
	to := make(map[string]Owner)
	for _, c := range a.lines {
		if _, owned := c.disk.peer.get(); owned || c.disk.clone || c.order.live != nil {
			continue
		}
		to[c.disk.Name] = c.disk.peer.owner()
		if c.told.Live && !c.told.plain {
			a.src.log.Warn("the destination uses the disk already, with these contents: it is noted as the owner", "disk", c.disk.Name)
		}
	}
	if len(to) == 0 {
		return nil
	}
	ledger := a.src.hand.ledger
	err := ledger.Prepare(to)
	if err == nil {
		if err = ledger.HandOff(); err != nil {
			err = errors.Join(err, ledger.TakeBack()) // the next destination's overwrites what is left of it
		}
	}
	if err != nil {
		return fmt.Errorf("it cannot be noted to whom the disks belong, so nothing is sent: %w", err)
	}
	for _, c := range a.lines {
		if o, ok := to[c.disk.Name]; ok {
			c.disk.peer.own(o.Taken)
		}
	}
	return nil
}

// take has the device of a disk that was handed off go live, if it is not.
func (a *admission) take(ctx context.Context, c *line) error {
	last, owned := c.disk.peer.get()
	if !owned {
		return nil
	}
	if !last.Taken {
		post := func() error { return c.to.SendEvent(ctx, &wire.Event{Type: wire.EventPostLock}) }
		if err := c.disk.peer.step(post); err != nil {
			return err
		}
	}
	c.disk.peer.own(true)
	return nil
}
