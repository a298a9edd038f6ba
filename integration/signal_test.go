//go:build integration

package integration

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestSignalsEndBothCleanly interrupts a migration under way: each side ends by itself, soon, says so in its exit
// code, and leaves no socket behind.
func TestSignalsEndBothCleanly(t *testing.T) {
	for _, sig := range []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			disk := randomImage(t, filepath.Join(t.TempDir(), "disk.raw"), oddSize)
			m := migrate(t, how{rate: mib}, disk)
			m.streaming("attaching")
			sockets := []string{socketOf(m.uris[0]), strings.TrimPrefix(argument(m.source, "--listen"), "unix://")}
			m.dest.signal(sig)
			code := m.dest.wait(soon)
			if code <= 0 {
				t.Errorf("dest ended with %v, want an exit code that says the disk is not complete", m.dest.cmd.ProcessState)
			}
			m.source.signal(sig)
			if code := m.source.wait(soon); code <= 0 {
				t.Errorf("source ended with %v, want an exit code that says the disk was not moved", m.source.cmd.ProcessState)
			}
			for _, s := range sockets {
				if exists(s) {
					t.Errorf("the socket %s is left behind", s)
				}
			}
			for _, p := range []*process{m.source, m.dest} {
				gaveUp(t, result{code: p.cmd.ProcessState.ExitCode(), stderr: p.stderr.String()}, 75, "interrupted")
			}
		})
	}
}

// TestSignalAfterCompletionIsASuccess ends a destination that serves on after all has arrived.
func TestSignalAfterCompletionIsASuccess(t *testing.T) {
	need(t, "qemu-io")
	for _, sig := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			disk := randomImage(t, filepath.Join(t.TempDir(), "disk.raw"), 4*mib+5)
			m := migrate(t, how{stay: true}, disk)
			m.source.succeeds(soon)
			must(t, soon, "qemu-io", "-f", "raw", m.uris[0], "-c", "write -P 9 0 4096")
			if !m.dest.running() {
				t.Fatal("dest ended by itself without --exit-when-complete")
			}
			m.dest.signal(sig)
			m.dest.succeeds(soon)
			if s := socketOf(m.uris[0]); exists(s) {
				t.Errorf("the socket %s is left behind", s)
			}
			if err := compareFiles(disk, m.copies[0], []patch{pattern(9, 0, 4096)}); err != nil {
				t.Error(err)
			}
		})
	}
}

// socketOf is the path of the unix socket in an NBD URI.
func socketOf(uri string) string {
	_, path, _ := strings.Cut(uri, "socket=")
	return path
}

// argument is the value of a flag that a process was started with.
func argument(p *process, flag string) string {
	for i, a := range p.cmd.Args {
		if a == flag {
			return p.cmd.Args[i+1]
		}
	}
	return ""
}
