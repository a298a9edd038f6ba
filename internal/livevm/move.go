// Package livevm moves a running virtual machine from one QEMU to another: its memory by QEMU's own migration, its
// disk from the export of a silo-nbd source to that of a dest. A workload in the guest writes records all the while,
// and verifies them afterwards.
package livevm

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/link"
)

// Options of a move. Those that name files have to be given.
type Options struct {
	SiloNBD string // the program
	Kernel  string // vmlinuz of scripts/guest
	Initrd  string // base.cpio of scripts/guest
	Guest   string // the program internal/livevm/guest, static
	Dir     string // where the files of the move lie; it stays
	From    string // the Dir of a Snapshot with the same Size, Cold, Memory and so on; empty: the machine is booted

	Size   int64         // of the disk, in bytes
	Cold   int64         // bytes of it that nobody writes, and that are not zero
	Memory int           // of the machine, in MiB
	Accel  string        // of QEMU
	CPU    string        // of QEMU
	Rate   string        // what the disk's background may take, bytes a second as silo-nbd takes it; 0 is no bound
	Pause  time.Duration // between two records
	Before time.Duration // from the connection between source and dest to the start of the memory's migration
	After  time.Duration // that the guest writes on at the destination, before it verifies
	Abort  bool          // give the first try up when the machine has been stopped for it, and move in a second
	Cut    int64         // the connection breaks once, so many bytes of the source's after the handoff was asked for, below 0 of dest's; 0: it does not
	Limit  time.Duration // on all of it
}

// Defaults are the options that need not be given.
func Defaults() Options {
	return Options{
		Size: 256 << 20, Cold: 96 << 20, Memory: 160, Accel: "tcg", CPU: "max", Rate: "40MiB",
		Pause: 2 * time.Millisecond, Before: 2 * time.Second, After: time.Second, Limit: 5 * time.Minute,
	}
}

// Image takes kernel and initramfs from the directory that scripts/guest --prepare names.
func (o *Options) Image(dir string) {
	o.Kernel, o.Initrd = filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "base.cpio")
}

func (o *Options) within(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, o.Limit, fmt.Errorf("it is not done after %v", o.Limit))
}

// Tools are the programs of others that a move needs.
var Tools = []string{"qemu-system-x86_64", "mkfs.ext4", "e2fsck", "debugfs"}

// warmUp is how many records there are before the move begins.
const warmUp = 50

// maxAsked is how often the handoff is asked for at most.
const maxAsked = 500

// move is one that is under way.
type move struct {
	o       Options
	dir     string
	console *console
	running []*process
	link    *link.Link
	report  Report

	source, dest *process
	old, new     *machine
	sum          uint32 // of what nobody writes
}

// Move moves a machine once. The error is the first thing that was not as it has to be; the report is what is known then.
func Move(ctx context.Context, o Options) (r Report, err error) {
	return moveBy(ctx, o, func(m *move) []step {
		return []step{m.makeDisk, m.boot, m.startDest, m.giveUp, m.attach, m.switchOver, m.verify, m.shutDown, m.complete, m.fsck}
	})
}

type step func(context.Context) error

func moveBy(ctx context.Context, o Options, steps func(*move) []step) (r Report, err error) {
	ctx, cancel := o.within(ctx)
	defer cancel()
	m := &move{o: o, dir: o.Dir, console: newConsole()}
	defer func() {
		err = errors.Join(err, m.close())
		r = m.report
	}()
	for _, do := range steps(m) {
		if err := do(ctx); err != nil {
			return r, err
		}
	}
	return r, nil
}

func (m *move) close() error {
	for _, v := range []*machine{m.old, m.new} {
		if v != nil {
			_ = v.qmp.Close() // what is left of it is killed
		}
	}
	for _, p := range m.running {
		p.kill()
	}
	if m.link != nil {
		return m.link.Close()
	}
	return nil
}

// makeDisk makes a file system with one file that nobody will write.
func (m *move) makeDisk(ctx context.Context) error {
	if m.o.From != "" {
		return m.takeSnapshot(ctx)
	}
	if err := os.Mkdir(m.path("root"), 0o755); err != nil {
		return err
	}
	cold := make([]byte, m.o.Cold)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(cold) // never fails
	m.sum = crc32.Checksum(cold, crc32.MakeTable(crc32.Castagnoli))
	if err := os.WriteFile(m.path("root/cold"), cold, 0o600); err != nil {
		return err
	}
	disk, err := os.Create(m.path("vm.raw"))
	if err != nil {
		return err
	}
	if err := errors.Join(disk.Truncate(m.o.Size), disk.Close()); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "mkfs.ext4", "-q", "-d", m.path("root"), m.path("vm.raw")).CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	return os.RemoveAll(m.path("root"))
}

// boot starts source, and the machine on its export.
func (m *move) boot(ctx context.Context) (err error) {
	if m.source, err = m.silo(ctx, "source", "--disk", m.path("vm.raw"), "--nbd", m.unix("source.nbd"), "--listen", m.unix("wire"),
		"--control", m.path("source.ctl"), "--handoff", "manual", "--rate", m.o.Rate); err != nil {
		return err
	}
	if err := m.makeInitrd(); err != nil {
		return err
	}
	if m.o.From == "" {
		if m.old, err = m.machine(ctx, "old", 0, m.export("source.nbd")); err != nil {
			return err
		}
		return m.warm(ctx)
	}
	if m.old, err = m.machine(ctx, "old", 0, m.export("source.nbd"), "-incoming", "defer"); err != nil {
		return err
	}
	if err := m.restore(ctx); err != nil {
		return err
	}
	return m.warm(ctx)
}

func (m *move) makeInitrd() error {
	args := fmt.Sprintf("%08x %v", m.sum, m.o.Pause)
	return makeInitrd(m.path("initrd"), m.o.Initrd, m.o.Guest, args)
}

// warm waits until the guest has written for a while.
func (m *move) warm(ctx context.Context) error {
	return m.console.await(ctx, m.old.process, "the first records", func(c *console) bool { return c.seen.count >= warmUp })
}

// startDest starts dest: from here on the disk travels.
func (m *move) startDest(ctx context.Context) (err error) {
	if err := m.connect(ctx); err != nil {
		return err
	}
	m.dest, err = m.silo(ctx, "dest", "--disk", m.path("moved.raw"), "--connect", m.link.Addr().String(), "--nbd", m.unix("dest.nbd"),
		"--control", m.path("dest.ctl"))
	return err
}

// verify lets the guest write on, and then verify what it has written on both hosts.
func (m *move) verify(ctx context.Context) error {
	if err := pause(ctx, m.o.After); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(m.new.in, "enough"); err != nil {
		return err
	}
	err := m.console.await(ctx, m.new.process, "the guest's verdict", func(c *console) bool { return c.verified != "" })
	s := m.console.look()
	m.report.Records, m.report.RecordsBefore = s.wrote, s.before
	m.report.Pause, m.report.GuestPause = s.across.host, s.across.guest
	m.report.PauseBefore, m.report.PauseAfter = s.atSource.host, s.atDest.host
	if err != nil {
		return err
	}
	if !scan(m.console.verdict(), "verified %d places %d bytes %d mismatches", &m.report.Places, &m.report.Cold, &m.report.Mismatches) {
		return fmt.Errorf("the guest's verdict is %q", m.console.verdict())
	}
	switch {
	case m.report.Mismatches > 0:
		return fmt.Errorf("the guest has found %d mismatches", m.report.Mismatches)
	case s.wrote != s.last || s.last <= s.before || s.before < warmUp || m.report.Cold != m.o.Cold:
		return fmt.Errorf("the guest has not done what it should: %+v", m.report)
	}
	return nil
}

// shutDown waits for the end of the guest.
func (m *move) shutDown(ctx context.Context) error {
	if err := m.new.wait(ctx); err != nil {
		return err
	}
	said, err := os.ReadFile(m.path("new.console"))
	if err != nil {
		return err
	}
	if !strings.Contains(string(said), "guest-exit: 0") {
		return fmt.Errorf("the guest did not end in order: its console is %q", said)
	}
	return nil
}

// complete waits until all of the disk is at the destination, and ends dest.
func (m *move) complete(ctx context.Context) error {
	if err := m.source.wait(ctx); err != nil { // with 0: all is there
		return err
	}
	m.report.DiskAfter = m.travelled() - m.report.DiskBefore
	if err := m.dest.terminate(ctx); err != nil {
		return err
	}
	return os.Remove(m.path("vm.raw")) // it is not needed any more
}

// fsck looks at the file system that is left.
func (m *move) fsck(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, "e2fsck", "-fn", m.path("moved.raw")).CombinedOutput()
	if err != nil {
		return fmt.Errorf("e2fsck: %w: %s", err, out)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	m.report.Fsck = "clean: " + strings.TrimPrefix(lines[len(lines)-1], m.dir+"/")
	return nil
}

// export is QEMU's view of a disk that is served at a socket.
func (m *move) export(name string) string {
	return "driver=nbd,export=vm,server.type=unix,server.path=" + m.path(name)
}

func (m *move) unix(name string) string { return "unix://" + m.path(name) }
func (m *move) memory() string          { return "unix:" + m.path("memory") }

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
