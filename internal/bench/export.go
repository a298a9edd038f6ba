package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// load is what fio does to an export.
type load struct {
	name      string
	rw, bs    string
	depth     int
	bandwidth bool // MiB/s rather than operations per second
}

var loads = []load{
	{"4 KiB random reads, depth 32", "randread", "4k", 32, false},
	{"4 KiB random writes, depth 32", "randwrite", "4k", 32, false},
	{"4 KiB random reads, depth 1", "randread", "4k", 1, false},
	{"4 KiB random writes, depth 1", "randwrite", "4k", 1, false},
	{"1 MiB sequential reads, depth 8", "read", "1m", 8, true},
	{"1 MiB sequential writes, depth 8", "write", "1m", 8, true},
}

// server is an NBD server on a unix socket, on a file of its own.
type server struct {
	name string
	uri  string
	stop func()
}

func exportPart(ctx context.Context, b *bench) error {
	if !have("fio") {
		fmt.Println("   fio is not installed: left out")
		return nil
	}
	size, seconds := int64(1*gib), 3
	if b.quick {
		size, seconds = 64*mib, 1
	}
	file := filepath.Join(b.memory, "src.raw")
	if err := randomFile(file, size); err != nil {
		return err
	}
	defer os.Remove(file)
	servers, err := startServers(ctx, b, file)
	for _, s := range servers {
		defer s.stop()
	}
	if err != nil {
		return err
	}
	fmt.Printf("   %d MiB in memory, %d s a run; operations or MiB per second\n", size/mib, seconds)
	fmt.Printf("   %-34s", "")
	for _, s := range servers {
		fmt.Printf(" %10s", s.name)
	}
	for _, s := range servers[1:] {
		fmt.Printf(" %14s", "x "+s.name)
	}
	fmt.Println()
	for _, l := range loads {
		figures := make([][]float64, len(servers))
		for range b.rounds {
			for i, s := range servers {
				f, err := fio(ctx, s.uri, l, seconds)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", s.name, l.name, err)
				}
				figures[i] = append(figures[i], f)
			}
		}
		fmt.Printf("   %-34s", l.name)
		for i := range servers {
			fmt.Printf(" %10.0f", median(figures[i]))
		}
		for i := range servers[1:] {
			fmt.Printf(" %14.2f", median(figures[0])/median(figures[i+1]))
		}
		fmt.Println()
	}
	return nil
}

// startServers starts each server on the same file but for ours, which has moved it to one of its own first. What it
// returns has to be stopped also with an error.
func startServers(ctx context.Context, b *bench, file string) ([]server, error) {
	moved := filepath.Join(b.memory, "moved.raw")
	m, err := b.migrate(ctx, setup{src: file, dst: moved, listen: "unix://" + filepath.Join(b.memory, "wire.sock")})
	if err != nil {
		return nil, err
	}
	servers := []server{{"silo-nbd", m.uri, func() { m.stop(); os.Remove(moved) }}}
	if _, err := m.source.wait(); err != nil {
		return servers, err
	}
	if have("nbdkit") {
		socket := filepath.Join(b.memory, "nbdkit.sock")
		c, err := startChild(ctx, "nbdkit", "--foreground", "--unix", socket, "file", file)
		if err != nil {
			return servers, err
		}
		servers = append(servers, server{"nbdkit", "nbd+unix:///?socket=" + socket, func() { c.stop() }})
		if err := waitListening("unix://" + socket); err != nil {
			return servers, err
		}
	}
	if have("qemu-nbd") {
		socket := filepath.Join(b.memory, "qemu-nbd.sock")
		c, err := startChild(ctx, "qemu-nbd", "--format=raw", "--cache=writeback", "--persistent", "--shared=8", "--socket="+socket, file)
		if err != nil {
			return servers, err
		}
		servers = append(servers, server{"qemu-nbd", "nbd+unix:///?socket=" + socket, func() { c.stop() }})
		if err := waitListening("unix://" + socket); err != nil {
			return servers, err
		}
	}
	return servers, nil
}

// fio runs a load and returns its operations, or MiB, per second.
func fio(ctx context.Context, uri string, l load, seconds int) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(seconds+60)*time.Second)
	defer cancel()
	out, _, err := output(ctx, "fio", "--name=load", "--ioengine=nbd", "--uri="+uri, "--rw="+l.rw, "--bs="+l.bs,
		fmt.Sprintf("--iodepth=%d", l.depth), "--time_based", fmt.Sprintf("--runtime=%d", seconds), "--ramp_time=0.5",
		"--norandommap", "--randrepeat=0", "--fallocate=none", "--output-format=json")
	if err != nil {
		return 0, err
	}
	var report struct {
		Jobs []struct {
			Read, Write struct {
				IOPS    float64 `json:"iops"`
				BWBytes float64 `json:"bw_bytes"`
			}
		} `json:"jobs"`
	}
	// Lines for people may come before the report.
	for i := range out {
		if out[i] == '{' {
			out = out[i:]
			break
		}
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		return 0, err
	}
	if len(report.Jobs) != 1 {
		return 0, errors.New("fio reports no job")
	}
	j := report.Jobs[0]
	if l.bandwidth {
		return (j.Read.BWBytes + j.Write.BWBytes) / mib, nil
	}
	return j.Read.IOPS + j.Write.IOPS, nil
}
