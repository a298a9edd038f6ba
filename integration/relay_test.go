//go:build integration

package integration

import (
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

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
