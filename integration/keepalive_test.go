//go:build integration

package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// attachAndIdle attaches an NBD client, reads once, says so, and then says nothing more.
const attachAndIdle = `
import signal
h.connect_uri("nbd://%s:7001/disk")
h.pread(4096, 0)
print("attached", flush=True)
signal.pause()
`

// TestIdleClientWhoseHostHasGoneIsNoticed attaches a client from a host whose cable is then pulled for good: nothing
// ever says that it has gone, and it has a place among the connections only until it is found silent (5 s and 3 times
// 3 s, as TCP keepalive is set).
func TestIdleClientWhoseHostHasGoneIsNoticed(t *testing.T) {
	t.Parallel() // it waits for the most part
	need(t, "nbdsh")
	c := newCable(t, false)
	disk := randomImage(t, filepath.Join(t.TempDir(), "disk.raw"), mib)
	socket, control := address(t, false), filepath.Join(t.TempDir(), "control")
	source := c.start(newHost, "source", "source", "--disk", "disk="+disk, "--listen", socket)
	dest := c.start(newHost, "dest", "dest", "--disk", filepath.Join(t.TempDir(), "copy.raw"), "--connect", socket,
		"--nbd", c.host(newHost)+":7001", "--insecure", "--control", control)
	dest.line("ready disk ", soon)
	source.succeeds(soon)

	nbdsh, err := exec.LookPath("nbdsh")
	if err != nil {
		t.Fatal(err)
	}
	// The Python that it runs in turn is the one it was installed with.
	client := start(t, "client", "ip", "netns", "exec", c.ends[oldHost], "env", "PATH="+filepath.Dir(nbdsh)+":"+os.Getenv("PATH"),
		nbdsh, "-c", fmt.Sprintf(attachAndIdle, c.host(newHost)))
	client.line("attached", soon)
	if n := nbdClients(t, control); n != 1 {
		t.Fatalf("%d clients are attached, want 1", n)
	}
	c.pull(oldHost)
	pulled := time.Now()
	eventually(t, 2*soon, "the client is gone", func() bool { return nbdClients(t, control) == 0 })
	took := time.Since(pulled)
	t.Logf("noticed after %v", took.Round(100*time.Millisecond))
	if took < 5*time.Second { // it was not keepalive then
		t.Errorf("the client was given up after %v", took)
	}
}

// nbdClients is how many are attached, as the control socket tells.
func nbdClients(t *testing.T, control string) int {
	t.Helper()
	var status struct {
		NBD *struct{ Clients int }
	}
	out := must(t, soon, siloNBD(t), "status", "--json", "--control", control)
	if err := json.Unmarshal([]byte(out), &status); err != nil || status.NBD == nil {
		t.Fatalf("status without its NBD clients (%v): %s", err, out)
	}
	return status.NBD.Clients
}
