//go:build integration

package integration

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/link"
	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
	"github.com/silo-nbd/silo-nbd/pkg/nbdexport"
)

// relay is what a hypervisor is to its virtual machine in a handoff: a disk that uses the source's export until that
// refuses, and the destination's from then on. Its clients notice nothing.
type relay struct {
	here, there *nbdclient.Client
	moved       atomic.Bool

	// How many requests the source and the destination did, and how many the source refused, which the destination did
	// instead.
	before, after, refused atomic.Int64
}

// newRelay serves a relay from one export to another, until the end of the test. uri is where.
func newRelay(t *testing.T, here, there string) (r *relay, uri string) {
	t.Helper()
	r = &relay{here: dialNBD(t, here), there: dialNBD(t, there)}
	server := nbdexport.NewServer(nbdexport.Options{})
	if err := server.AddExport(nbdexport.Export{Name: "disk", Backend: r}); err != nil {
		t.Fatal(err)
	}
	path := strings.TrimPrefix(address(t, false), "unix://")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(ln) }()
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Errorf("relay: %v", err)
		}
		if err := <-served; !errors.Is(err, nbdexport.ErrServerClosed) {
			t.Errorf("relay: %v", err)
		}
	})
	return r, "nbd+unix:///disk?socket=" + path
}

func dialNBD(t *testing.T, uri string) *nbdclient.Client {
	t.Helper()
	c, err := nbdclient.Dial(t.Context(), uri)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() }) // the server may have ended
	return c
}

// do does one request, at the destination if the source does not serve the disk any more.
func (r *relay) do(request func(c *nbdclient.Client) error) error {
	if !r.moved.Load() {
		err := request(r.here)
		if !errors.Is(err, syscall.ESHUTDOWN) {
			r.before.Add(1)
			return err
		}
		r.refused.Add(1)
		r.moved.Store(true)
	}
	r.after.Add(1)
	return request(r.there)
}

func (r *relay) Size() (int64, error) { return r.here.Size(), nil }

func (r *relay) ReadAt(p []byte, off int64) (n int, err error) {
	err = r.do(func(c *nbdclient.Client) error { n, err = c.ReadAt(p, off); return err })
	return n, err
}

func (r *relay) WriteAt(p []byte, off int64) (n int, err error) {
	err = r.do(func(c *nbdclient.Client) error { n, err = c.WriteAt(p, off); return err })
	return n, err
}

func (r *relay) Sync() error { return r.do((*nbdclient.Client).Flush) }

// liveMove is a migration of disks that are in use.
type liveMove struct {
	source, dest *process
	control      string // of the source
	copies       []string
	here, there  []string // the URIs of the exports
	relays       []*relay
	relayed      []string // their URIs
}

// linkDelay is one way. Much is written while a list of what is old travels.
const linkDelay = 3 * time.Millisecond

// moveLive starts to move disks, which are used through relays.
func moveLive(t *testing.T, disks []string, args ...string) *liveMove {
	t.Helper()
	dir, wire, between := t.TempDir(), address(t, false), address(t, false)
	m := &liveMove{control: filepath.Join(socketDir(t), "control")}
	source := append([]string{"source", "--listen", wire, "--nbd", address(t, false), "--control", m.control}, args...)
	dest := []string{"dest", "--connect", between, "--nbd", address(t, false)}
	var names []string
	for i, disk := range disks {
		name := fmt.Sprintf("disk%d", i)
		copied := filepath.Join(dir, name+".copy")
		names, m.copies = append(names, name), append(m.copies, copied)
		source = append(source, "--disk", name+"="+disk)
		dest = append(dest, "--disk", name+"="+copied)
	}
	m.source = start(t, "source", siloNBD(t), source...)
	for _, name := range names {
		m.here = append(m.here, readyURI(m.source, name))
	}
	waitListening(t, wire)
	l, err := link.Listen(t.Context(), link.Options{Listen: parseAddr(t, between), Target: parseAddr(t, wire), Delay: linkDelay})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() }) // it has nothing to say that the test would want to know
	m.dest = start(t, "dest", siloNBD(t), dest...)
	for i, name := range names {
		m.there = append(m.there, readyURI(m.dest, name))
		r, uri := newRelay(t, m.here[i], m.there[i])
		m.relays, m.relayed = append(m.relays, r), append(m.relayed, uri)
	}
	return m
}
