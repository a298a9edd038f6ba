package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// load is what fio does to an export.
type load struct {
	name   string
	rw, bs string
	depth  int
	fsync  int // a flush after so many writes; 0: none
}

var loads = []load{
	{"4 KiB random reads, depth 1", "randread", "4k", 1, 0},
	{"4 KiB random reads, depth 32", "randread", "4k", 32, 0},
	{"4 KiB random writes, depth 1", "randwrite", "4k", 1, 0},
	{"4 KiB random writes, depth 32", "randwrite", "4k", 32, 0},
	{"1 MiB sequential reads, depth 8", "read", "1m", 8, 0},
	{"1 MiB sequential writes, depth 8", "write", "1m", 8, 0},
}

// connections are how many clients a load has; each has a connection of its own.
var connections = []int{1, 4}

// server is an NBD server on a unix socket.
type server struct {
	name string
	uri  string
	run  *child
	stop func()
}

// fioTime is how long each load lasts.
const fioTime = 1200 * time.Millisecond

func exportPart(ctx context.Context, b *bench) error {
	if !have("fio") {
		fmt.Println("   fio is not installed: left out")
		return nil
	}
	size, lasts := int64(512*mib), fioTime
	if b.quick {
		size, lasts = 64*mib, fioTime/6
	}
	servers, err := startServers(ctx, b, size)
	for _, s := range servers {
		defer s.stop()
	}
	if err != nil {
		return err
	}
	fmt.Printf("   the same %d MiB in memory, %.1f s a run; operations (4 KiB) or MiB (1 MiB) per second,\n", size/mib, lasts.Seconds())
	fmt.Println("   latency in µs, CPU of the server in seconds a GiB; x: ours by theirs, of the rate")
	for _, conns := range connections {
		for _, l := range loads {
			if err := compare(ctx, b, servers, l, conns, lasts); err != nil {
				return err
			}
		}
	}
	return nil
}

// compare puts a load on each server in turn, round after round, and prints the medians, of the rates and of the ratios.
func compare(ctx context.Context, b *bench, servers []server, l load, conns int, lasts time.Duration) error {
	figures := make([]fioFigures, len(servers))
	for round := range b.rounds {
		for _, i := range turns(round, len(servers)) {
			s := servers[i]
			before, err := s.run.cpu()
			if err != nil {
				return err
			}
			r, err := fio(ctx, s.uri, l, conns, lasts)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", s.name, l.name, err)
			}
			after, err := s.run.cpu()
			if err != nil {
				return err
			}
			figures[i].add(r, after-before)
		}
	}
	fmt.Printf("   %s, %d connection%s\n", l.name, conns, plural(conns))
	for i, s := range servers {
		f := figures[i]
		fmt.Printf("      %-10s %8.0f /s   p50 %7.0f  p99 %7.0f   CPU %5.2f", s.name,
			median(f.rate), median(f.p50), median(f.p99), median(f.cpuPerGiB))
		if i > 0 {
			fmt.Printf("   x %.2f", ratio(figures[0].rate, f.rate))
		}
		fmt.Println()
	}
	return nil
}

func plural(n int) string {
	if n == 1 {
		return ""
	}
	return "s"
}

// startServers starts each server on the same file, which ours has moved there before. What it returns has to be
// stopped also with an error.
func startServers(ctx context.Context, b *bench, size int64) ([]server, error) {
	file, moved := filepath.Join(b.memory, "src.raw"), filepath.Join(b.memory, "moved.raw")
	if err := randomFile(file, size); err != nil {
		return nil, err
	}
	defer os.Remove(file)
	m, err := b.migrate(ctx, setup{src: file, dst: moved, listen: "unix://" + filepath.Join(b.memory, "wire.sock")})
	if err != nil {
		return nil, err
	}
	servers := []server{{"silo-nbd", m.uri, m.dest, func() { m.stop(); os.Remove(moved) }}}
	if _, err := m.source.wait(); err != nil {
		return servers, err
	}
	for _, peer := range []struct {
		name string
		args func(socket string) []string
	}{
		{"nbdkit", func(socket string) []string { return []string{"--foreground", "--unix", socket, "file", moved} }},
		{"qemu-nbd", func(socket string) []string {
			return []string{"--format=raw", "--cache=writeback", "--persistent", "--shared=8", "--socket=" + socket, moved}
		}},
	} {
		if !have(peer.name) {
			fmt.Printf("   %s is not installed: left out\n", peer.name)
			continue
		}
		socket := filepath.Join(b.memory, peer.name+".sock")
		c, err := startChild(ctx, peer.name, peer.args(socket)...)
		if err != nil {
			return servers, err
		}
		servers = append(servers, server{peer.name, "nbd+unix:///?socket=" + socket, c, func() { c.stop() }})
		if err := waitListening("unix://" + socket); err != nil {
			return servers, fmt.Errorf("%s: %w", peer.name, err)
		}
	}
	return servers, nil
}
