package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/addr"
	"github.com/silo-nbd/silo-nbd/internal/link"
	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
)

const (
	demandBlock = 64 * kib  // of the migration: each read is of another block
	demandRead  = 4 * kib   // what a client asks for
	demandRate  = 100 * mib // of the link with a delay, bytes per second
)

// demandPath is a way between the two ends.
type demandPath struct {
	name   string
	rtt    time.Duration
	direct bool // over loopback, without the link
}

func demandPart(ctx context.Context, b *bench) error {
	paths := []demandPath{
		{name: "loopback, no limit", direct: true},
		{name: "100 MiB/s, RTT 0 ms"},
		{name: "100 MiB/s, RTT 5 ms", rtt: 5 * time.Millisecond},
		{name: "100 MiB/s, RTT 30 ms", rtt: 30 * time.Millisecond},
	}
	size, reads := int64(2*gib), 100
	if b.quick {
		size, reads = 128*mib, 10
	}
	src := filepath.Join(b.memory, "src.raw")
	if err := randomFile(src, size); err != nil {
		return err
	}
	defer os.Remove(src)
	fmt.Printf("   reads of %d KiB, each of another missing block; figures in ms\n", demandRead/kib)
	fmt.Printf("   %-22s %9s %9s %9s %9s %9s %9s %7s\n", "", "idle p50", "p99", "full p50", "p99", "p50 x", "p99 x", "reads")
	for _, p := range paths {
		var idle, full []float64
		for range b.rounds {
			for _, busy := range []bool{false, true} {
				times, err := demandReads(ctx, b, p, src, size, reads, busy)
				if err != nil {
					return fmt.Errorf("%s: %w", p.name, err)
				}
				if busy {
					full = append(full, times...)
				} else {
					idle = append(idle, times...)
				}
			}
		}
		fmt.Printf("   %-22s %9.2f %9.2f %9.2f %9.2f %9.2f %9.2f %7d\n", p.name,
			percentile(idle, 50), percentile(idle, 99), percentile(full, 50), percentile(full, 99),
			percentile(full, 50)/percentile(idle, 50), percentile(full, 99)/percentile(idle, 99), len(full))
	}
	return nil
}

// demandReads starts a migration, reads blocks that have not arrived and returns what each read took, in milliseconds.
// With busy the stream fills the path meanwhile, otherwise it stands nearly still.
func demandReads(ctx context.Context, b *bench, p demandPath, src string, size int64, reads int, busy bool) ([]float64, error) {
	s := setup{src: src, dst: filepath.Join(b.memory, "dst.raw")}
	var err error
	if s.listen, err = freePort(); err != nil {
		return nil, err
	}
	if !p.direct {
		l, err := listenLink(ctx, s.listen, p.rtt)
		if err != nil {
			return nil, err
		}
		defer l.Close()
		s.connect = l.Addr().String()
	}
	if !busy {
		s.sourceArgs = []string{"--rate", "64KiB"}
	}
	m, err := b.migrate(ctx, s)
	if err != nil {
		return nil, err
	}
	defer os.Remove(s.dst)
	defer m.stop()
	client, err := nbdclient.Dial(ctx, m.uri)
	if err != nil {
		return nil, err
	}
	defer client.Close()

	// From the end of the disk towards its middle: the stream begins at the start and goes on behind what was asked for,
	// so what is read next is missing. Reads of neighbours would be read ahead.
	last := size/demandBlock - 1
	buf := make([]byte, demandRead)
	if busy {
		time.Sleep(200 * time.Millisecond) // until the stream fills the path
	}
	var times []float64
	for i := range min(int64(reads), last/8) {
		began := time.Now()
		if _, err := client.ReadAt(buf, (last-4*i)*demandBlock); err != nil {
			return nil, err
		}
		took := time.Since(began)
		if busy && !m.source.running() {
			break // the stream has ended: this read and those that would follow have found the path empty
		}
		times = append(times, float64(took)/float64(time.Millisecond))
		time.Sleep(5 * time.Millisecond) // a reader that thinks, or it would fill the path by itself
	}
	if len(times) == 0 {
		return nil, fmt.Errorf("the stream had ended before the first read")
	}
	return times, nil
}

// listenLink starts a link of demandRate to an address.
func listenLink(ctx context.Context, target string, rtt time.Duration) (*link.Link, error) {
	to, err := addr.Parse(target)
	if err != nil {
		return nil, err
	}
	from, err := addr.Parse("tcp://127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	return link.Listen(ctx, link.Options{Listen: from, Target: to, Rate: demandRate, Delay: rtt / 2})
}
