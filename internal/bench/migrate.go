package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/internal/addr"
	"github.com/silo-nbd/silo-nbd/internal/disks"
	"github.com/silo-nbd/silo-nbd/internal/identity"
)

// migration is a source and a destination that the measurement looks at.
type migration struct {
	source, dest *child
	uri          string // of the export
	began        time.Time
}

// setup says what a migration looks like.
type setup struct {
	src, dst   string
	listen     string   // where the source listens
	connect    string   // where the destination connects, listen if empty
	sourceArgs []string // further arguments
	destArgs   []string
}

// migrate starts a migration with the NBD export on a unix socket and returns when the export can be attached.
func (b *bench) migrate(ctx context.Context, s setup) (*migration, error) {
	if s.connect == "" {
		s.connect = s.listen
	}
	socket := filepath.Join(b.memory, "nbd.sock")
	if err := os.Remove(s.dst + disks.MapSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err // of an earlier round, whose disk is gone
	}
	if err := forgetMoves(s.src); err != nil {
		return nil, err
	}
	source, err := startChild(ctx, b.silo, append([]string{"source", "--disk", "disk=" + s.src, "--listen", s.listen}, s.sourceArgs...)...)
	if err != nil {
		return nil, err
	}
	m := &migration{source: source}
	if err := waitListening(s.listen); err != nil {
		m.stop()
		return nil, fmt.Errorf("%w\n%s", err, source.stderr.String())
	}
	m.began = time.Now()
	m.dest, err = startChild(ctx, b.silo, append([]string{"dest", "--disk", s.dst, "--connect", s.connect, "--nbd", "unix://" + socket}, s.destArgs...)...)
	if err != nil {
		m.stop()
		return nil, err
	}
	if m.uri, err = m.dest.ready("ready disk "); err != nil {
		m.stop()
		return nil, err
	}
	return m, nil
}

// finish waits for both ends, which complete by themselves, and returns the time since dest was started and the CPU
// time of both.
func (m *migration) finish() (took, sourceCPU, destCPU time.Duration, err error) {
	if sourceCPU, err = m.source.wait(); err == nil {
		destCPU, err = m.dest.wait()
	}
	took = time.Since(m.began)
	m.stop()
	return took, sourceCPU, destCPU, err
}

// stop ends what still runs.
func (m *migration) stop() {
	for _, c := range []*child{m.dest, m.source} {
		if c != nil {
			c.stop()
		}
	}
}

// running says whether a child has not ended yet.
func (c *child) running() bool {
	if c.ended {
		return false
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.cmd.Process.Pid))
	if err != nil {
		return false
	}
	_, after, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(after, "Z") // ended, and not yet waited for
}

// peakMemory is the most memory that the child has had, in bytes.
func (c *child) peakMemory() (int64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			var n int64
			_, err := fmt.Sscan(value, &n)
			return n * kib, err
		}
	}
	return 0, fmt.Errorf("no VmHWM for process %d", c.cmd.Process.Pid)
}

// freePort returns a TCP address on loopback that nobody listens on.
func freePort() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer ln.Close()
	return "tcp://" + ln.Addr().String(), nil
}

// waitListening waits until somebody listens on an address, without connecting: a connection may be taken for a peer.
func waitListening(address string) error {
	at, err := addr.Parse(address)
	if err != nil {
		return err
	}
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		ok, err := addr.Listening(at)
		if ok || err != nil {
			return err
		}
	}
	return fmt.Errorf("nobody listens on %s after 30 s", address)
}

// forgetMoves lets a disk that an earlier round has moved be moved again: what is noted
// at it and beside it says that its destination owns it.
func forgetMoves(disk string) error {
	if err := os.Remove(disk + identity.Suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	err := unix.Removexattr(disk, "user.silo-nbd")
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	return err
}
