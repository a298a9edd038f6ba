package livevm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/silo-nbd/silo-nbd/internal/livevm/record"
)

// Lose moves a machine whose memory is lost on the way: the QEMU at the destination dies when the disk has been handed
// off. The old one lets its guest go on, which must not get a write through any more; and the disk at the destination
// must hold all that the guest has been told is there.
func Lose(ctx context.Context, o Options) (r Report, err error) {
	return moveBy(ctx, o, func(m *move) []step {
		return []step{m.makeDisk, m.boot, m.startDest, m.giveUp, m.attach, m.loseMemory, m.complete, m.recover}
	})
}

// loseMemory hands the disk off, and lets the migration of the memory fail then.
func (m *move) loseMemory(ctx context.Context) error {
	if err := m.toSwitchOver(ctx); err != nil {
		return err
	}
	if err := m.handOff(ctx); err != nil {
		return err
	}
	m.new.kill()
	if err := m.old.qmp.Execute(ctx, "migrate-continue", map[string]string{"state": "pre-switchover"}, nil); err != nil {
		return err
	}
	if err := m.old.migration(ctx, "failed"); err != nil {
		return err
	}
	// The guest goes on, until a request of its disk fails: the device is set up to stop the machine then.
	if _, err := m.old.event(ctx, "BLOCK_IO_ERROR"); err != nil {
		return err
	}
	return m.quit(ctx)
}

// recover looks at what is left, as the start of the machine at the destination would.
func (m *move) recover(ctx context.Context) error {
	s := m.console.look()
	m.report.Records, m.report.RecordsBefore, m.report.PauseBefore = s.last, s.last, s.atSource.host
	disk := m.path("moved.raw")
	var exit *exec.ExitError
	out, err := exec.CommandContext(ctx, "e2fsck", "-p", disk).CombinedOutput() // it replays the journal: 1
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
		return fmt.Errorf("e2fsck -p: %w: %s", err, out)
	}
	if err := m.fsck(ctx); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "debugfs", "-R", "dump /records "+m.path("records"), disk).CombinedOutput(); err != nil {
		return fmt.Errorf("debugfs: %w: %s", err, out)
	}
	f, err := os.Open(m.path("records"))
	if err != nil {
		return err
	}
	defer f.Close() // only read
	var lost []string
	m.report.Places, m.report.Mismatches, err = record.Verify(f, s.last, 1, func(s string) { lost = append(lost, s) })
	if err == nil && len(lost) > 0 {
		err = errors.New(strings.Join(lost, "; "))
	}
	return err
}
