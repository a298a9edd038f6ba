package main

import (
	"bufio"
	"context"
	"fmt"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/addr"
	"github.com/silo-nbd/silo-nbd/internal/disks"
	"github.com/silo-nbd/silo-nbd/internal/link"
)

// demandSeconds is the histogram of how long reads of missing blocks have waited.
const demandSeconds = "silo_nbd_dest_demand_read_seconds"

// bootMigrating boots from the export of a destination that has just been started.
func bootMigrating(ctx context.Context, b *bootBench, r *bootRun) error {
	metrics := filepath.Join(b.memory, "metrics.sock")
	s := setup{src: b.disk, dst: filepath.Join(b.memory, "local.raw"), destArgs: []string{"--metrics", "unix://" + metrics}}
	var err error
	if s.listen, err = freePort(); err != nil {
		return err
	}
	if err := r.through(ctx, s.listen); err != nil {
		return err
	}
	s.connect = r.link.Addr().String()
	r.onStop(func() { os.Remove(s.dst); os.Remove(s.dst + disks.MapSuffix) })
	m, err := b.migrate(ctx, s)
	if err != nil {
		return err
	}
	r.onStop(m.stop)
	r.began, r.local = m.began, s.dst
	r.reads = func() (reads bootReads, err error) {
		if reads.reads, err = scrape(ctx, metrics, demandSeconds+"_count"); err == nil {
			reads.waited, err = scrape(ctx, metrics, demandSeconds+"_sum")
		}
		return reads, err
	}
	return r.machine(ctx, b, "if=virtio,format=raw,cache=writeback,discard=unmap,file="+m.uri, "")
}

// bootLocal boots from a copy of the disk.
func bootLocal(ctx context.Context, b *bootBench, r *bootRun) error {
	r.local = filepath.Join(b.memory, "local.raw")
	r.onStop(func() { os.Remove(r.local) })
	if _, _, err := output(ctx, "cp", "--sparse=always", b.disk, r.local); err != nil {
		return err
	}
	r.began = time.Now()
	return r.machine(ctx, b, "if=virtio,format=raw,cache=writeback,discard=unmap,file="+r.local, "")
}

// bootPlain boots from nbdkit at the source.
func bootPlain(ctx context.Context, b *bootBench, r *bootRun) error {
	if err := r.nbdkit(ctx, b); err != nil {
		return err
	}
	r.began = time.Now()
	return r.machine(ctx, b, "if=virtio,format=raw,cache=writeback,discard=unmap,file="+r.nbdURI(), "")
}

// bootCopyOnRead boots from an empty image before nbdkit at the source, which the machine fills with what it reads, and
// in the background with the rest.
func bootCopyOnRead(ctx context.Context, b *bootBench, r *bootRun) error {
	if err := r.nbdkit(ctx, b); err != nil {
		return err
	}
	qmp := filepath.Join(b.memory, "qmp.sock")
	r.local = filepath.Join(b.memory, "local.qcow2")
	r.onStop(func() { os.Remove(r.local); os.Remove(qmp) })
	r.began = time.Now()
	if _, _, err := output(ctx, "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", r.nbdURI(), r.local, fmt.Sprint(bootSize)); err != nil {
		return err
	}
	if err := r.machine(ctx, b, "if=virtio,id=root,format=qcow2,cache=writeback,discard=unmap,copy-on-read=on,file="+r.local, qmp); err != nil {
		return err
	}
	return blockStream(ctx, qmp, "root")
}

// machine starts the machine.
func (r *bootRun) machine(ctx context.Context, b *bootBench, drive, qmp string) (err error) {
	if r.vm, err = b.machineOf(ctx, b.image, drive, qmp); err == nil {
		r.onStop(func() { r.vm.stop() })
	}
	return err
}

// through puts the link before an address at the source.
func (r *bootRun) through(ctx context.Context, target string) error {
	to, err := addr.Parse(target)
	if err != nil {
		return err
	}
	from, err := addr.Parse("tcp://127.0.0.1:0")
	if err != nil {
		return err
	}
	r.link, err = link.Listen(ctx, link.Options{Listen: from, Target: to, Rate: bootRate, Delay: bootDelay})
	if err == nil {
		r.onStop(func() { r.link.Close() })
	}
	return err
}

// nbdkit serves a copy of the disk at the source, behind the link, and counts what is read.
func (r *bootRun) nbdkit(ctx context.Context, b *bootBench) error {
	served, log := filepath.Join(b.memory, "served.raw"), filepath.Join(b.memory, "served.stats")
	r.onStop(func() { os.Remove(served); os.Remove(log) })
	if _, _, err := output(ctx, "cp", "--sparse=always", b.disk, served); err != nil {
		return err
	}
	at, err := freePort()
	if err != nil {
		return err
	}
	_, port, err := net.SplitHostPort(strings.TrimPrefix(at, "tcp://"))
	if err != nil {
		return err
	}
	server, err := startChild(ctx, "nbdkit", "--foreground", "--ipaddr", "127.0.0.1", "--port", port, "--filter=stats", "file", served, "statsfile="+log)
	if err != nil {
		return err
	}
	r.onStop(func() { server.stop() })
	if err := waitListening(at); err != nil {
		return fmt.Errorf("nbdkit: %w\n%s", err, server.stderr.String())
	}
	r.reads = func() (bootReads, error) {
		server.stop() // it tells at its end
		text, err := os.ReadFile(log)
		if err != nil {
			return bootReads{}, err
		}
		n, err := statsReads(string(text))
		return bootReads{n, math.NaN()}, err
	}
	return r.through(ctx, at)
}

func (r *bootRun) nbdURI() string { return addr.NBDURI(r.link.Addr(), "") }

// statsReads is how many reads a file of nbdkit's stats filter tells of.
func statsReads(text string) (float64, error) {
	for line := range strings.Lines(text) {
		var n float64
		if _, err := fmt.Sscanf(line, "read: %g ops", &n); err == nil {
			return n, nil
		}
	}
	return 0, fmt.Errorf("nbdkit tells of no reads:\n%s", text)
}

// scrape returns the sum of a metric over its labels.
func scrape(ctx context.Context, socket, metric string) (float64, error) {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}, Timeout: 10 * time.Second}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://silo-nbd/metrics", nil)
	if err != nil {
		return 0, err
	}
	answer, err := client.Do(request)
	if err != nil {
		return 0, err
	}
	defer answer.Body.Close()
	sum, found := 0.0, false
	for s := bufio.NewScanner(answer.Body); s.Scan(); {
		rest, ok := strings.CutPrefix(s.Text(), metric)
		if !ok || rest == "" || rest[0] != '{' && rest[0] != ' ' {
			continue
		}
		var n float64
		if _, err := fmt.Sscan(rest[strings.LastIndexByte(rest, ' ')+1:], &n); err != nil {
			return 0, fmt.Errorf("%s: %w", s.Text(), err)
		}
		sum, found = sum+n, true
	}
	if !found {
		return 0, fmt.Errorf("there is no metric %s", metric)
	}
	return sum, nil
}

// allocated is how many bytes of a file its file system holds.
func allocated(path string) (int64, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return st.Blocks * 512, nil
}
