//go:build integration

package integration

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestBrokenConnectionIsRedialled breaks the wire twenty times within one migration, at moments that do not depend on
// what is under way, while a client reads and writes.
func TestBrokenConnectionIsRedialled(t *testing.T) {
	need(t, "qemu-io")
	for _, destListens := range []bool{false, true} {
		t.Run(fmt.Sprintf("destListens=%v", destListens), func(t *testing.T) {
			disk := randomImage(t, filepath.Join(t.TempDir(), "odd.raw"), oddSize)
			m := migrate(t, how{rate: 4 * mib, tcp: destListens, destListens: destListens}, disk)
			var writes []patch
			for i := range 20 {
				eventually(t, soon, "the wire is up again", func() bool { return m.link.Connections() > 0 })
				before := m.arrived()
				eventually(t, soon, "something has crossed it", func() bool { return m.arrived() > before })
				time.Sleep(rand.N(200 * time.Millisecond)) // any moment: there is nothing to wait for
				m.link.Cut()
				w := pattern(byte(i+1), int64(i)*3*mib+int64(i)*512, 5000)
				must(t, soon, "qemu-io", "-f", "raw", m.uris[0], "-c", fmt.Sprintf("write -P %d %d %d", w.data[0], w.off, len(w.data)),
					"-c", fmt.Sprintf("read %d 4096", oddSize/512*512-rand.Int64N(32*mib)/512*512-4096))
				writes = append(writes, w)
			}
			m.streaming("breaking the wire twenty times")
			m.link.SetRate(0)
			m.finish()
			if err := compareFiles(disk, m.copies[0], writes); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestEveryWayRound moves three disks at once, over both kinds of socket, with either side listening.
func TestEveryWayRound(t *testing.T) {
	need(t, "nbdcopy")
	for _, tcp := range []bool{false, true} {
		for _, destListens := range []bool{false, true} {
			t.Run(fmt.Sprintf("tcp=%v,destListens=%v", tcp, destListens), func(t *testing.T) {
				dir := t.TempDir()
				disks := []string{
					randomImage(t, filepath.Join(dir, "one.raw"), 24*mib),
					randomImage(t, filepath.Join(dir, "two.img"), 10*mib+77),
					randomImage(t, filepath.Join(dir, "three"), 4097),
				}
				m := migrate(t, how{rate: 8 * mib, tcp: tcp, destListens: destListens, stay: true}, disks...)
				m.streaming("attaching all exports")
				for i, uri := range m.uris {
					copied := filepath.Join(t.TempDir(), "copy")
					must(t, patient, "nbdcopy", uri, copied)
					sameBytes(t, disks[i], copied)
				}
				m.source.succeeds(patient)
				m.dest.signal(syscall.SIGTERM)
				m.dest.succeeds(soon)
				for i := range disks {
					sameBytes(t, disks[i], m.copies[i])
				}
			})
		}
	}
}

// TestReadIsServedAheadOfTheStream reads blocks whose turn would come late, while the stream fills the wire.
func TestReadIsServedAheadOfTheStream(t *testing.T) {
	need(t, "qemu-io")
	disk := randomImage(t, filepath.Join(t.TempDir(), "disk.raw"), 96*mib)
	m := migrate(t, how{rate: 2 * mib, delay: 5 * time.Millisecond}, disk)
	var slowest time.Duration
	for i := range 10 {
		off := int64(90-3*i) * mib
		r := command(t, soon, "qemu-io", "-r", "-f", "raw", m.uris[0], "-c", fmt.Sprintf("read %d 4096", off))
		if r.code != 0 {
			t.Fatalf("read at %d: exit code %d\n%s%s", off, r.code, r.stdout, r.stderr)
		}
		slowest = max(slowest, r.took)
	}
	t.Logf("the slowest of ten reads took %v", slowest.Round(time.Millisecond))
	if slowest > 3*time.Second { // in its turn the block would have come half a minute later
		t.Errorf("a read took %v", slowest)
	}
	m.streaming("ten reads of missing blocks")
	m.link.SetRate(0)
	m.finish()
}

// TestSilenceIsNotTheEnd stops the wire for a while without closing it: all goes on afterwards.
func TestSilenceIsNotTheEnd(t *testing.T) {
	disk := randomImage(t, filepath.Join(t.TempDir(), "odd.raw"), oddSize)
	m := migrate(t, how{rate: 16 * mib, tcp: true}, disk)
	m.link.Stall(true)
	still := m.arrived()
	time.Sleep(2 * time.Second) // the silence
	if now := m.arrived(); now > still+mib {
		t.Errorf("%d bytes crossed the silent wire", now-still)
	}
	m.streaming("two seconds of silence")
	m.link.Stall(false)
	m.finish()
	sameBytes(t, disk, m.copies[0])
}

// TestSilentWireIsRedialled stops the wire for good, without closing it: both ends notice, although nothing of theirs
// is under way, and no TCP can tell, since the proxy's is well.
func TestSilentWireIsRedialled(t *testing.T) {
	need(t, "qemu-io")
	for _, c := range []struct{ tcp, destListens bool }{{false, false}, {true, true}} {
		t.Run(fmt.Sprintf("tcp=%v,destListens=%v", c.tcp, c.destListens), func(t *testing.T) {
			t.Parallel() // it waits for the most part
			disk := randomImage(t, filepath.Join(t.TempDir(), "odd.raw"), oddSize)
			m := migrate(t, how{tcp: c.tcp, destListens: c.destListens, sourceArgs: []string{"--rate", "64KiB"}}, disk)
			must(t, soon, "qemu-io", "-r", "-f", "raw", m.uris[0], "-c", fmt.Sprintf("read %d 4096", 40*mib)) // each has heard the other
			began := time.Now()
			m.link.Stall(true)
			caller, listener := m.dest, m.source
			if c.destListens {
				caller, listener = m.source, m.dest
			}
			const silent = "nothing was heard from the peer for 12s"
			caller.says("no connection to the other side; trying again until it is back", soon)
			listener.says("the connection has ended; waiting for the next", soon)
			took := time.Since(began)
			t.Logf("noticed after %v", took.Round(100*time.Millisecond))
			if took > 15*time.Second {
				t.Errorf("the silence was noticed after %v", took)
			}
			for _, p := range []*process{caller, listener} {
				if !strings.Contains(p.stderr.String(), silent) {
					t.Errorf("%s has not noticed the silence by itself", p.name)
				}
			}
			m.link.Stall(false)
			m.link.SetRate(0)
			listener.says("connected", soon)
			must(t, soon, "qemu-io", "-r", "-f", "raw", m.uris[0], "-c", fmt.Sprintf("read %d 4096", 50*mib))
			m.streaming("a read after the silence")
			m.source.signal(syscall.SIGKILL)
			m.source.wait(soon)
		})
	}
}

// silent accepts connections, reads what comes and says nothing.
func silent(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return // closed at the test's end
			}
			go func() {
				_, _ = io.Copy(io.Discard, c) // until the other side leaves
				c.Close()
			}()
		}
	}()
	return "tcp://" + ln.Addr().String()
}
