package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// mover moves a file once and says how long it took and what CPU time, of both ends together.
type mover struct {
	name string
	move func(ctx context.Context, b *bench, src, dst string) (took, cpu time.Duration, err error)
}

func streamPart(ctx context.Context, b *bench) error {
	movers := []mover{
		{"bare loop", moveByLoop()}, {"silo-nbd", moveBySilo}, {"bare loop with CRC32C", moveByLoop("sum")},
	}
	if b.bare != "" {
		movers = append(movers, mover{"silo-nbd without map and CRC32C", moveByUnchecked})
	}
	if have("nbdkit") && have("nbdcopy") {
		movers = append(movers, mover{"nbdcopy, 1 connection", moveByNBDCopy(1)}, mover{"nbdcopy, 4 connections", moveByNBDCopy(4)})
	} else {
		fmt.Println("   nbdkit and nbdcopy are not installed: left out")
	}
	size := int64(1 * gib)
	if b.quick {
		size = 32 * mib
	}
	for _, place := range []struct{ name, dir string }{{"in memory", b.memory}, {"on disk, source cached", b.disk}} {
		if err := streamIn(ctx, b, place.name, place.dir, size, movers); err != nil {
			return err
		}
	}
	return nil
}

func streamIn(ctx context.Context, b *bench, place, dir string, size int64, movers []mover) error {
	src, dst := filepath.Join(dir, "src.raw"), filepath.Join(dir, "dst.raw")
	if err := randomFile(src, size); err != nil {
		return err
	}
	defer os.Remove(src)
	rates, cpus := make([][]float64, len(movers)), make([][]float64, len(movers))
	for round := range b.rounds {
		for _, i := range turns(round, len(movers)) {
			m := movers[i]
			took, cpu, err := m.move(ctx, b, src, dst)
			if err != nil {
				return fmt.Errorf("%s: %w", m.name, err)
			}
			if err := os.Remove(dst); err != nil {
				return err
			}
			rates[i] = append(rates[i], float64(size)/mib/took.Seconds())
			cpus[i] = append(cpus[i], cpu.Seconds()/(float64(size)/gib))
		}
	}
	fmt.Printf("   %s, %d MiB of random data\n", place, size/mib)
	fmt.Printf("   %-32s %10s %12s %10s %12s\n", "", "MiB/s", "CPU s/GiB", "x loop", "CPU x loop")
	for i, m := range movers {
		fmt.Printf("   %-32s %10.0f %12.2f %10.2f %12.2f\n", m.name, median(rates[i]), median(cpus[i]),
			ratio(rates[i], rates[0]), ratio(cpus[i], cpus[0]))
	}
	for i, m := range movers[min(2, len(movers)):] {
		fmt.Printf("   silo-nbd is %.2f x %s\n", ratio(rates[1], rates[2+i]), m.name)
	}
	return nil
}

// moveByLoop is the bare loop; see loopEnd for the arguments.
func moveByLoop(args ...string) func(context.Context, *bench, string, string) (time.Duration, time.Duration, error) {
	return func(ctx context.Context, _ *bench, src, dst string) (time.Duration, time.Duration, error) {
		self, err := os.Executable()
		if err != nil {
			return 0, 0, err
		}
		return moveByLoopOf(ctx, self, src, dst, args)
	}
}

func moveByLoopOf(ctx context.Context, self, src, dst string, args []string) (took, cpu time.Duration, err error) {
	receive, err := startChild(ctx, self, append([]string{"loop-receive", dst}, args...)...)
	if err != nil {
		return 0, 0, err
	}
	defer receive.stop()
	address, err := receive.ready("ready ")
	if err != nil {
		return 0, 0, err
	}
	began := time.Now()
	_, sendCPU, err := output(ctx, self, append([]string{"loop-send", src, address}, args...)...)
	if err != nil {
		return 0, 0, err
	}
	receiveCPU, err := receive.wait()
	return time.Since(began), sendCPU + receiveCPU, err
}

// moveByUnchecked moves by the command that was built without a map and checksums.
func moveByUnchecked(ctx context.Context, b *bench, src, dst string) (took, cpu time.Duration, err error) {
	other := *b
	other.silo = b.bare
	return moveBySilo(ctx, &other, src, dst)
}

func moveBySilo(ctx context.Context, b *bench, src, dst string) (took, cpu time.Duration, err error) {
	listen, err := freePort()
	if err != nil {
		return 0, 0, err
	}
	m, err := b.migrate(ctx, setup{src: src, dst: dst, listen: listen, destArgs: []string{"--exit-when-complete"}})
	if err != nil {
		return 0, 0, err
	}
	took, sourceCPU, destCPU, err := m.finish()
	return took, sourceCPU + destCPU, err
}

func moveByNBDCopy(connections int) func(context.Context, *bench, string, string) (time.Duration, time.Duration, error) {
	return func(ctx context.Context, _ *bench, src, dst string) (took, cpu time.Duration, err error) {
		address, err := freePort()
		if err != nil {
			return 0, 0, err
		}
		host, port, _ := strings.Cut(strings.TrimPrefix(address, "tcp://"), ":")
		nbdkit, err := startChild(ctx, "nbdkit", "--foreground", "--ipaddr", host, "--port", port, "--readonly", "file", src)
		if err != nil {
			return 0, 0, err
		}
		defer nbdkit.stop()
		if err := waitListening(address); err != nil {
			return 0, 0, err
		}
		began := time.Now()
		_, cpu, err = output(ctx, "nbdcopy", "--flush", fmt.Sprintf("--connections=%d", connections), "nbd://"+host+":"+port, dst)
		took = time.Since(began)
		return took, cpu + nbdkit.stop(), err
	}
}
