//go:build integration

package integration

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/addr"
	"github.com/silo-nbd/silo-nbd/internal/link"
)

// soon bounds what needs no time by itself; the machine may be busy.
const soon = 20 * time.Second

// silo is the command under test, built once.
var silo = sync.OnceValues(func() (string, error) {
	bin := filepath.Join(scratch, "silo-nbd")
	if other := os.Getenv("SILO_NBD"); other != "" {
		return other, nil
	}
	return bin, build(bin, "./cmd/silo-nbd")
})

// siloNBD returns the path of the command under test.
func siloNBD(t *testing.T) string {
	t.Helper()
	bin, err := silo()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

// migration is a source and a destination with a link of a known rate between them.
type migration struct {
	t            *testing.T
	source, dest *process
	link         *link.Link
	disks        []string // the source's
	copies       []string // the destination's
	uris         []string // of the exports, in the order of disks
}

// how says what a migration looks like. The zero value: unix sockets, the source listens, 30 MiB/s.
type how struct {
	rate        int64         // of the link, bytes per second each way; negative: no limit
	delay       time.Duration // of the link, one way
	tcp         bool          // the wire and NBD over TCP instead of unix sockets
	destListens bool
	stay        bool     // without --exit-when-complete
	sourceArgs  []string // further arguments
	destArgs    []string
}

// migrate starts to move the disks and returns when all exports can be attached.
func migrate(t *testing.T, h how, disks ...string) *migration {
	t.Helper()
	bin := siloNBD(t)
	m := &migration{t: t, disks: disks}
	if h.rate == 0 {
		h.rate = 30 * mib
	}
	listen, nbd, between := address(t, h.tcp), address(t, h.tcp), address(t, h.tcp)
	l, err := link.Listen(t.Context(), link.Options{
		Listen: parseAddr(t, between), Target: parseAddr(t, listen), Rate: max(h.rate, 0), Delay: h.delay,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() }) // it has nothing to say that the test would want to know
	m.link = l

	source := slices.Concat([]string{"source"}, h.sourceArgs)
	dest := slices.Concat([]string{"dest", "--nbd", nbd}, h.destArgs)
	if !h.stay {
		dest = append(dest, "--exit-when-complete")
	}
	dir := t.TempDir()
	for i, disk := range disks {
		source = append(source, "--disk", fmt.Sprintf("disk%d=%s", i, disk))
		m.copies = append(m.copies, filepath.Join(dir, fmt.Sprintf("copy%d.raw", i)))
		dest = append(dest, "--disk", fmt.Sprintf("disk%d=%s", i, m.copies[i]))
	}
	if h.destListens {
		m.dest = start(t, "dest", bin, append(dest, "--listen", listen)...)
		waitListening(t, listen)
		m.source = start(t, "source", bin, append(source, "--connect", between)...)
	} else {
		m.source = start(t, "source", bin, append(source, "--listen", listen)...)
		waitListening(t, listen)
		m.dest = start(t, "dest", bin, append(dest, "--connect", between)...)
	}
	for i := range disks {
		name := fmt.Sprintf("disk%d", i)
		m.uris = append(m.uris, readyURI(m.dest, name))
	}
	return m
}

// readyURI waits until the export can be attached and returns its URI.
func readyURI(dest *process, name string) string {
	dest.t.Helper()
	return strings.TrimPrefix(dest.line("ready "+name+" ", soon), "ready "+name+" ")
}

// streaming fails the test unless the transfer is still going on: then what was just done proves nothing.
func (m *migration) streaming(done string) {
	m.t.Helper()
	if !m.source.running() {
		m.t.Fatalf("the transfer had finished before this was done: %s", done)
	}
}

// finish waits until the migration is complete and both ends have said so by their exit code.
func (m *migration) finish() {
	m.t.Helper()
	m.source.succeeds(2 * time.Minute)
	m.dest.succeeds(soon)
}

// address returns an address that nobody listens on.
func address(t *testing.T, tcp bool) string {
	t.Helper()
	if tcp {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		return "tcp://" + ln.Addr().String()
	}
	return "unix://" + filepath.Join(socketDir(t), "socket")
}

// socketDir is a directory with a path short enough for a unix socket.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(scratch, "s")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func parseAddr(t *testing.T, s string) addr.Addr {
	t.Helper()
	a, err := addr.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// waitListening waits until somebody listens on the address, without connecting to it: a connection is a peer.
func waitListening(t *testing.T, address string) {
	t.Helper()
	eventually(t, soon, "somebody listens on "+address, func() bool { return listening(t, address) })
}

// listening looks into the kernel's tables of sockets.
func listening(t *testing.T, address string) bool {
	t.Helper()
	if path, ok := strings.CutPrefix(address, "unix://"); ok {
		table, err := os.ReadFile("/proc/net/unix")
		if err != nil {
			t.Fatal(err)
		}
		for l := range strings.Lines(string(table)) {
			f := strings.Fields(l)
			if len(f) == 8 && f[7] == path && f[3] == "00010000" { // __SO_ACCEPTCON: it listens
				return true
			}
		}
		return false
	}
	_, port, err := net.SplitHostPort(strings.TrimPrefix(address, "tcp://"))
	if err != nil {
		t.Fatal(err)
	}
	var n int
	if _, err := fmt.Sscan(port, &n); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		table, err := os.ReadFile(file)
		if err != nil {
			continue // a kernel without IPv6
		}
		for l := range strings.Lines(string(table)) {
			f := strings.Fields(l)
			if len(f) > 3 && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", n)) && f[3] == "0A" { // TCP_LISTEN
				return true
			}
		}
	}
	return false
}
