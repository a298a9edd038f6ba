//go:build integration

package integration

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
)

// cable is two network namespaces with a cable of 100 Mbit/s between them.
type cable struct {
	t          *testing.T
	ends       [2]string // the names of the namespaces
	addrs      [2]string // with their prefix length
	addressing []string  // arguments of ip address add behind the address
}

var cables atomic.Int32

func newCable(t *testing.T, ipv6 bool) *cable {
	t.Helper()
	needRoot(t)
	need(t, "ip", "tc")
	c := &cable{t: t, addrs: [2]string{"10.77.0.1/24", "10.77.0.2/24"}}
	if ipv6 {
		c.addrs = [2]string{"fd77::1/64", "fd77::2/64"}
		c.addressing = []string{"nodad"} // nobody else can have it
	}
	number := cables.Add(1)
	for i := range c.ends {
		name := fmt.Sprintf("silo-%d-%d%c", os.Getpid(), number, 'a'+i)
		if r := command(t, soon, "ip", "netns", "add", name); r.code != 0 {
			lacking(t, "no network namespaces here: %s", r.stderr)
		}
		t.Cleanup(func() { must(t, soon, "ip", "netns", "del", name) })
		c.ends[i] = name
	}
	must(t, soon, "ip", "-n", c.ends[0], "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", c.ends[1])
	for i, end := range c.ends {
		must(t, soon, "tc", "-n", end, "qdisc", "add", "dev", "veth0", "root", "tbf", "rate", "100mbit", "burst", "64kb", "latency", "50ms")
		must(t, soon, "ip", "-n", end, "link", "set", "lo", "up")
		c.plug(i)
	}
	return c
}

// plug puts the cable into one of its ends. An IPv6 address goes with the link, and so is given again.
func (c *cable) plug(end int) {
	c.t.Helper()
	must(c.t, soon, "ip", "-n", c.ends[end], "link", "set", "veth0", "up")
	args := append([]string{"-n", c.ends[end], "address", "replace", c.addrs[end], "dev", "veth0"}, c.addressing...)
	must(c.t, soon, "ip", args...)
}

// pull takes it out.
func (c *cable) pull(end int) {
	c.t.Helper()
	must(c.t, soon, "ip", "-n", c.ends[end], "link", "set", "veth0", "down")
}

// start runs the command under test at one of the ends.
func (c *cable) start(end int, label string, args ...string) *process {
	return start(c.t, label, "ip", append([]string{"netns", "exec", c.ends[end], siloNBD(c.t)}, args...)...)
}

// host is the address of an end, as it stands in host:port.
func (c *cable) host(end int) string {
	return []string{"10.77.0.1", "10.77.0.2", "[fd77::1]", "[fd77::2]"}[end+2*len(c.addressing)]
}

// TestCableIsPulledForAWhile moves a disk over a cable of 100 Mbit/s, which is pulled for 20 s in the middle: at the
// end of the side that dials with IPv4, where the address stays, and of the side that listens with IPv6, where it
// goes. What is local is served meanwhile, what is missing waits, and all is there in the end.
func TestCableIsPulledForAWhile(t *testing.T) {
	for _, c := range []struct{ ipv6, destListens bool }{{false, false}, {true, true}} {
		t.Run(fmt.Sprintf("ipv6=%v,destListens=%v", c.ipv6, c.destListens), func(t *testing.T) {
			t.Parallel() // they wait for the most part
			cableIsPulled(t, newCable(t, c.ipv6), c.destListens)
		})
	}
}

// The ends of the cable.
const (
	oldHost = 0
	newHost = 1
)

func cableIsPulled(t *testing.T, c *cable, destListens bool) {
	const size = 80 * mib
	const outage = 20 * time.Second
	disk := randomImage(t, filepath.Join(t.TempDir(), "disk.raw"), size)
	copied := filepath.Join(t.TempDir(), "copy.raw")
	source := []string{"source", "--disk", "disk=" + disk}
	dest := []string{"dest", "--disk", "disk=" + copied, "--nbd", address(t, false), "--exit-when-complete"}
	if destListens {
		dest = append(dest, "--listen", c.host(newHost)+":7000", "--insecure")
		source = append(source, "--connect", c.host(newHost)+":7000")
	} else {
		source = append(source, "--listen", c.host(oldHost)+":7000", "--insecure")
		dest = append(dest, "--connect", c.host(oldHost)+":7000")
	}
	m := &migration{t: t, source: c.start(oldHost, "source", source...), dest: c.start(newHost, "dest", dest...)}
	client, err := nbdclient.Dial(t.Context(), readyURI(m.dest, "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close() // closed below; this is for a test that failed

	w := pattern(0xa5, 48*mib, 64*kib)
	if _, err := client.WriteAt(w.data, w.off); err != nil {
		t.Fatal(err)
	}
	begin := make([]byte, 4*kib)
	if _, err := client.ReadAt(begin, 0); err != nil { // fetched from now on
		t.Fatal(err)
	}
	eventually(t, soon, "a part of the disk has come", func() bool { return allocated(t, copied) > 10*mib })
	c.pull(newHost)
	m.streaming("pulling the cable")
	waited := make(chan error, 1)
	go func() {
		_, err := client.ReadAt(make([]byte, 4*kib), size-4*kib) // its turn has not come yet
		waited <- err
	}()
	slowest := localReads(t, client, w, begin, outage)
	select {
	case err := <-waited:
		t.Fatalf("the end of the disk was read without a cable: %v", err)
	default:
	}
	c.plug(newHost)
	back := time.Now()
	select {
	case err := <-waited:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(soon):
		t.Fatalf("a read still waits, %v after the cable is back", soon)
	}
	t.Logf("local reads took at most %v without the cable; the one that waited %v after its return", slowest.Round(time.Millisecond), time.Since(back).Round(100*time.Millisecond))
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	m.finish()
	if err := compareFiles(disk, copied, []patch{w}); err != nil {
		t.Error(err)
	}
}

// localReads reads for a time what was written and what was fetched, and returns how long the slowest read took.
func localReads(t *testing.T, client *nbdclient.Client, w patch, begin []byte, during time.Duration) (slowest time.Duration) {
	t.Helper()
	p := make([]byte, len(begin))
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(during); time.Now().Before(end); <-tick.C {
		for off, want := range map[int64][]byte{0: begin, w.off + 8*kib: w.data[:len(p)]} {
			began := time.Now()
			if _, err := client.ReadAt(p, off); err != nil {
				t.Fatal(err)
			}
			slowest = max(slowest, time.Since(began))
			if !bytes.Equal(p, want) {
				t.Fatalf("other bytes at %d than before", off)
			}
		}
	}
	if slowest > 3*time.Second { // a busy machine
		t.Errorf("a local read took %v", slowest)
	}
	return slowest
}

// allocated is how much of a sparse file is there, in bytes.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}
