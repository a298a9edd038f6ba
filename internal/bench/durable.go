package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// durableLoad is random writes with a flush after so many of them; 0: none.
type durableLoad struct {
	depth, fsync int
}

var durableLoads = []durableLoad{{1, 1}, {32, 1}, {1, 0}, {32, 0}}

// durableRate is what the stream of the migration is held to, in bytes per second: nearly all blocks are missing.
const durableRate = 256 * kib

// durablePart writes through the export of a disk most of which is missing, on a real disk, and to a new file of the
// same size through nbdkit.
func durablePart(ctx context.Context, b *bench) error {
	if !have("fio") || !have("nbdkit") {
		fmt.Println("   fio and nbdkit are not both installed: left out")
		return nil
	}
	size, lasts := int64(2*gib), 4*time.Second
	if b.quick {
		size, lasts = 64*mib, 300*time.Millisecond
	}
	src := filepath.Join(b.memory, "src.raw")
	if err := randomFile(src, size); err != nil {
		return err
	}
	defer os.Remove(src)
	fmt.Printf("   a disk of %d MiB in %s, %v each; writes per second, 4 KiB each, at random places\n", size/mib, b.disk, lasts)
	fmt.Printf("   %-28s %10s %10s %8s %14s %14s\n", "", "silo-nbd", "nbdkit", "x", "p99 ms", "nbdkit p99 ms")
	for _, l := range durableLoads {
		var figures [2]fioFigures
		serve := []func(context.Context, *bench, string, int64) (server, error){serveMissing, serveNew}
		for round := range b.rounds {
			for _, i := range turns(round, len(serve)) {
				r, err := durableRound(ctx, b, serve[i], src, size, l, lasts)
				if err != nil {
					return err
				}
				figures[i].add(r, 0)
			}
		}
		name := fmt.Sprintf("depth %d, no flush", l.depth)
		if l.fsync > 0 {
			name = fmt.Sprintf("depth %d, fsync=%d", l.depth, l.fsync)
		}
		ours, theirs := figures[0], figures[1]
		fmt.Printf("   %-28s %10.0f %10.0f %8.2f %14.2f %14.2f\n", name, median(ours.rate), median(theirs.rate),
			ratio(ours.rate, theirs.rate), median(ours.p99)/1e3, median(theirs.p99)/1e3)
	}
	return nil
}

// durableRound is one run of fio on a server that has a new disk.
func durableRound(ctx context.Context, b *bench, serve func(context.Context, *bench, string, int64) (server, error),
	src string, size int64, l durableLoad, lasts time.Duration) (fioResult, error) {
	s, err := serve(ctx, b, src, size)
	if err != nil {
		return fioResult{}, err
	}
	defer s.stop()
	r, err := fio(ctx, s.uri, load{rw: "randwrite", bs: "4k", depth: l.depth, fsync: l.fsync}, 1, lasts)
	if err != nil {
		return fioResult{}, fmt.Errorf("%s: %w", s.name, err)
	}
	return r, nil
}

// serveMissing is a destination that has next to nothing yet, with its disk and map on the disk.
func serveMissing(ctx context.Context, b *bench, src string, _ int64) (server, error) {
	dst := filepath.Join(b.disk, "moved.raw")
	m, err := b.migrate(ctx, setup{
		src: src, dst: dst, listen: "unix://" + filepath.Join(b.memory, "wire.sock"),
		sourceArgs: []string{"--rate", fmt.Sprint(durableRate)},
	})
	if err != nil {
		return server{}, err
	}
	return server{"silo-nbd", m.uri, m.dest, func() { m.stop(); os.Remove(dst) }}, nil
}

// serveNew is nbdkit with a new sparse file on the disk.
func serveNew(ctx context.Context, b *bench, _ string, size int64) (server, error) {
	file, socket := filepath.Join(b.disk, "new.raw"), filepath.Join(b.memory, "nbdkit.sock")
	f, err := os.Create(file)
	if err == nil {
		err = f.Truncate(size)
		f.Close() // nothing was written
	}
	if err != nil {
		return server{}, err
	}
	c, err := startChild(ctx, "nbdkit", "--foreground", "--unix", socket, "file", file)
	if err != nil {
		return server{}, err
	}
	return server{"nbdkit", "nbd+unix:///?socket=" + socket, c, func() { c.stop(); os.Remove(file); os.Remove(socket) }},
		waitListening("unix://" + socket)
}
