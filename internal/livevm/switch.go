package livevm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/addr"
	"github.com/silo-nbd/silo-nbd/internal/control"
	"github.com/silo-nbd/silo-nbd/internal/link"
)

// giveUp makes a first try, if one is wanted, and gives it up in the last moment in which that is possible. The guest
// has to go on at the source as if nothing had been.
func (m *move) giveUp(ctx context.Context) error {
	if !m.o.Abort {
		return nil
	}
	if err := m.attach(ctx); err != nil {
		return err
	}
	if err := m.toSwitchOver(ctx); err != nil {
		return err
	}
	if err := m.old.qmp.Execute(ctx, "migrate_cancel", nil, nil); err != nil {
		return err
	}
	if err := m.old.migration(ctx, "cancelled"); err != nil {
		return err
	}
	stopped, err := m.old.event(ctx, "STOP")
	if err != nil {
		return err
	}
	resumed, err := m.old.event(ctx, "RESUME")
	if err != nil {
		return err
	}
	m.report.GivenUp = resumed.Time.Sub(stopped.Time)
	_ = m.new.qmp.Close() // it has lost its source, and ends with 1
	if err := m.new.wait(ctx); err == nil {
		return errors.New("the machine at the destination ended with 0, though its migration was cancelled")
	} else if ctx.Err() != nil {
		return err
	}
	enough := m.console.look().count + warmUp
	return m.console.await(ctx, m.old.process, "records after a try that was given up", func(c *console) bool { return c.seen.count >= enough })
}

// attach starts the machine that waits for the memory, on the export of dest: before the handoff.
func (m *move) attach(ctx context.Context) (err error) {
	if m.new, err = m.machine(ctx, "new", 1, m.export("dest.nbd"), "-incoming", "defer"); err != nil {
		return err
	}
	if err := m.new.qmp.Execute(ctx, "migrate-incoming", map[string]string{"uri": m.memory()}, nil); err != nil {
		return err
	}
	return pause(ctx, m.o.Before)
}

// toSwitchOver moves the memory until the machine is stopped for the rest of it.
func (m *move) toSwitchOver(ctx context.Context) error {
	if err := m.old.capabilities(ctx, "pause-before-switchover", "events"); err != nil {
		return err
	}
	if err := m.old.qmp.Execute(ctx, "migrate", map[string]string{"uri": m.memory()}, nil); err != nil {
		return err
	}
	return m.old.migration(ctx, "pre-switchover")
}

// switchOver moves the memory, and the disk when the machine has been stopped for that.
func (m *move) switchOver(ctx context.Context) error {
	began := time.Now()
	if err := m.toSwitchOver(ctx); err != nil {
		return err
	}
	if err := m.handOff(ctx); err != nil {
		return err
	}
	if err := m.old.qmp.Execute(ctx, "migrate-continue", map[string]string{"state": "pre-switchover"}, nil); err != nil {
		return err
	}
	if err := m.old.migration(ctx, "completed"); err != nil {
		return err
	}
	stopped, err := m.old.event(ctx, "STOP")
	if err != nil {
		return err
	}
	resumed, err := m.new.event(ctx, "RESUME")
	if err != nil {
		return err
	}
	m.report.Stopped, m.report.Switched = resumed.Time.Sub(stopped.Time), resumed.Time.Sub(began)
	var mem memory
	if err := m.old.qmp.Execute(ctx, "query-migrate", nil, &mem); err != nil {
		return err
	}
	m.report.Memory, m.report.MemoryPasses = mem.RAM.Transferred, mem.RAM.Passes
	return m.quit(ctx)
}

// quit ends the machine that is not needed any more.
func (m *move) quit(ctx context.Context) error {
	if err := m.old.qmp.Execute(ctx, "quit", nil, nil); err != nil {
		return err
	}
	return m.old.wait(ctx)
}

// handOff hands the disk over, which is what silo-nbd handoff does, and looks how far it is.
func (m *move) handOff(ctx context.Context) error {
	source, err := control.NewClient(m.path("source.ctl"))
	if err != nil {
		return err
	}
	before, err := source.Status(ctx)
	if err != nil {
		return err
	}
	m.report.DiskBefore, m.report.DiskPasses = m.travelled(), before.Disks[0].Live.Pass
	m.planCut()
	began := time.Now()
	for err = errors.New("not asked"); err != nil; {
		// With a connection that breaks it may fail, and has to be asked for again, as soon as there is another.
		if m.report.Asked++; m.report.Asked > 1 && pause(ctx, 20*time.Millisecond) != nil || m.report.Asked > maxAsked {
			return fmt.Errorf("handoff: asked for %d times: %w", m.report.Asked-1, err)
		}
		err = source.Handoff(ctx)
	}
	m.report.Handoff = time.Since(began)
	dest, err := control.NewClient(m.path("dest.ctl"))
	if err != nil {
		return err
	}
	after, err := dest.Status(ctx)
	if err != nil {
		return err
	}
	m.report.Missing = after.Disks[0].Size - after.Disks[0].Done
	return nil
}

// planCut breaks the connection once, if that is wanted.
func (m *move) planCut() {
	switch {
	case m.o.Cut > 0:
		m.link.After(link.FromTarget, m.o.Cut, m.link.Cut)
	case m.o.Cut < 0:
		m.link.After(link.ToTarget, -m.o.Cut, m.link.Cut)
	}
}

// connect makes the network between the two.
func (m *move) connect(ctx context.Context) error {
	listen, err := addr.Parse(m.unix("link"))
	if err != nil {
		return err
	}
	target, err := addr.Parse(m.unix("wire"))
	if err != nil {
		return err
	}
	m.link, err = link.Listen(ctx, link.Options{Listen: listen, Target: target})
	return err
}

// travelled is how many bytes have gone from source to dest.
func (m *move) travelled() int64 {
	_, bytes := m.link.Bytes()
	return bytes
}
