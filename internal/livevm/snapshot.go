package livevm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// Snapshot boots a machine and leaves its state and its disk in o.Dir, so that many moves may begin there (Options.From)
// without the time that a boot takes. Nothing of ours is used.
func Snapshot(ctx context.Context, o Options) (err error) {
	ctx, cancel := o.within(ctx)
	defer cancel()
	m := &move{o: o, dir: o.Dir, console: newConsole()}
	defer func() { err = errors.Join(err, m.close()) }()
	if err := errors.Join(m.makeDisk(ctx), m.makeInitrd()); err != nil {
		return err
	}
	if m.old, err = m.machine(ctx, "boot", 0, "driver=file,filename="+m.path("vm.raw")); err != nil {
		return err
	}
	if err := m.warm(ctx); err != nil {
		return err
	}
	if err := m.old.qmp.Execute(ctx, "stop", nil, nil); err != nil { // which flushes its disk
		return err
	}
	if err := m.old.capabilities(ctx, "events"); err != nil {
		return err
	}
	if err := m.old.qmp.Execute(ctx, "migrate", map[string]string{"uri": "exec:cat >" + m.path("state")}, nil); err != nil {
		return err
	}
	if err := m.old.migration(ctx, "completed"); err != nil {
		return err
	}
	return m.quit(ctx)
}

// takeSnapshot takes the disk of a snapshot.
func (m *move) takeSnapshot(ctx context.Context) error {
	from, to := filepath.Join(m.o.From, "vm.raw"), m.path("vm.raw")
	if out, err := exec.CommandContext(ctx, "cp", "--sparse=always", from, to).CombinedOutput(); err != nil {
		return fmt.Errorf("cp: %w: %s", err, out)
	}
	return nil
}

// restore lets the machine go on where the snapshot was taken.
func (m *move) restore(ctx context.Context) error {
	state := filepath.Join(m.o.From, "state")
	if _, err := os.Stat(state); err != nil {
		return err
	}
	if err := m.old.capabilities(ctx, "events"); err != nil {
		return err
	}
	if err := m.old.qmp.Execute(ctx, "migrate-incoming", map[string]string{"uri": "exec:cat " + state}, nil); err != nil {
		return err
	}
	if err := m.old.migration(ctx, "completed"); err != nil {
		return err
	}
	if err := m.old.qmp.Execute(ctx, "cont", nil, nil); err != nil {
		return err
	}
	_, err := m.old.event(ctx, "RESUME") // this one: others are waited for later
	return err
}
