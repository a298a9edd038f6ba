package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// passRate is what a link of 1 Gbit/s takes a second.
const passRate = "100MiB"

// livePart compares 4 KiB random writes on a source's export, alone and in the first pass, with those of nbdkit.
func livePart(ctx context.Context, b *bench) error {
	for _, name := range []string{"fio", "nbdkit"} {
		if !have(name) {
			fmt.Printf("   %s is not installed: writes at the source are left out\n", name)
			return nil
		}
	}
	size, lasts := int64(512*mib), fioTime
	if b.quick {
		size, lasts = 32*mib, fioTime/6
	}
	var servers []server
	defer func() {
		for _, s := range servers {
			s.stop()
		}
	}()
	for _, s := range []struct {
		name    string
		command func(file, socket string) []string
	}{
		{"nbdkit", func(file, socket string) []string {
			return []string{"nbdkit", "--foreground", "--unix", socket, "file", file}
		}},
		{"alone", b.liveSource},
		{"first-pass", b.liveSource},
	} {
		file, socket := filepath.Join(b.memory, s.name+".raw"), filepath.Join(b.memory, s.name+".sock")
		if err := randomFile(file, size); err != nil {
			return err
		}
		defer os.Remove(file)
		args := s.command(file, socket)
		run, err := startChild(ctx, args[0], args[1:]...)
		if err != nil {
			return err
		}
		one := server{s.name, "nbd+unix:///?socket=" + socket, run, func() { run.stop() }}
		servers = append(servers, one)
		if err := waitListening("unix://" + socket); err != nil {
			return err
		}
	}
	fmt.Printf("   4 KiB random writes a second, %.1f s a run, %s/s travel in the first pass\n", lasts.Seconds(), passRate)
	for _, l := range []load{{"depth 1", "randwrite", "4k", 1, 0}, {"depth 32", "randwrite", "4k", 32, 0}} {
		if err := compareWrites(ctx, b, servers, l, lasts); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) liveSource(file, socket string) []string {
	return []string{b.silo, "source", "--disk", "disk=" + file, "--listen", "unix://" + socket + ".wire", "--nbd", "unix://" + socket,
		"--control", socket + ".control", "--rate", passRate}
}

func compareWrites(ctx context.Context, b *bench, servers []server, l load, lasts time.Duration) error {
	rates := make([][]float64, len(servers))
	for round := range b.rounds {
		for _, i := range turns(round, len(servers)) {
			s := servers[i]
			var dest *child
			if s.name == "first-pass" {
				var err error
				if dest, err = b.freshDest(ctx, filepath.Join(b.memory, s.name+".sock.wire")); err != nil {
					return err
				}
			}
			r, err := fio(ctx, s.uri, l, 1, lasts)
			if dest != nil {
				dest.stop()
			}
			if err != nil {
				return err
			}
			rates[i] = append(rates[i], r.rate)
		}
	}
	for i, s := range servers {
		fmt.Printf("   %s, %-10s %8.0f", l.name, s.name, median(rates[i]))
		if i > 0 {
			fmt.Printf("   x %.2f", ratio(rates[i], rates[0]))
		}
		fmt.Println()
	}
	return nil
}

// freshDest starts a destination that has nothing yet, and waits until the first pass is under way.
func (b *bench) freshDest(ctx context.Context, wire string) (*child, error) {
	dest, err := startChild(ctx, b.silo, "dest", "--disk", filepath.Join(b.memory, "fresh.raw"), "--overwrite", "--connect", "unix://"+wire,
		"--nbd", "unix://"+filepath.Join(b.memory, "fresh.sock"))
	if err != nil {
		return nil, err
	}
	if _, err := dest.ready("ready "); err != nil {
		dest.stop()
		return nil, err
	}
	return dest, nil
}
