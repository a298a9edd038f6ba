// Bench measures the command on this machine: each figure beside that of another program or of the least that could
// do the work, as the median of rounds that take turns, so that what disturbs the machine disturbs all of them.
// scripts/bench builds what it needs and runs it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// bench is one run: where things are and how much is measured.
type bench struct {
	silo   string // the command under test
	bare   string // the same without map and checksums, or empty
	memory string // a directory in memory, for what must not wait for a disk
	disk   string // a directory on a disk
	rounds int
	quick  bool // sizes that only show that it works
}

// part is a measurement that can be asked for by name.
type part struct {
	name, about string
	run         func(context.Context, *bench) error
}

var parts = []part{
	{"stream", "file to file over loopback TCP, one connection, against a bare loop of the same copies and nbdcopy", streamPart},
	{"demand", "reads of missing blocks while the stream fills the wire, against the same with the stream idle", demandPart},
	{"export", "the export with all blocks local, over a unix socket, against nbdkit file and qemu-nbd", exportPart},
	{"durable", "writes with and without flushes to a disk most of which is missing, on a real disk, against nbdkit with a new file", durablePart},
	{"waits", "reads of local blocks beside reads that wait for missing ones on the same connection, against the same without", waitsPart},
	{"handoff", "how long a writer waits in a handoff, of disks more or less of which is dirty", handoffPart},
	{"live", "4 KiB random writes at a source, alone and in the first pass, against nbdkit file", livePart},
	{"boot", "a machine boots while its disk moves over a slow link, against a local disk, plain NBD and qemu's copy-on-read", bootPart},
	{"order", "cost a block of moving empty disks of different size", orderPart},
	{"startup", "from the start of dest to the first byte read, and its memory", startupPart},
}

func main() {
	if len(os.Args) > 1 && strings.HasPrefix(os.Args[1], "loop-") { // the two ends of the bare loop run as processes too
		if err := loopEnd(os.Args[1], os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	var b bench
	dir := os.TempDir()
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.StringVar(&b.silo, "silo-nbd", "bin/silo-nbd", "the command to measure")
	fs.StringVar(&b.bare, "unchecked", "", "the command built with the tag unchecked, to be compared in stream")
	fs.IntVar(&b.rounds, "rounds", 5, "rounds of each measurement")
	fs.BoolVar(&b.quick, "quick", false, "small sizes and one round: shows that it works, measures nothing")
	fs.StringVar(&dir, "dir", dir, "a directory on a disk with 3 GiB of room")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if b.quick {
		b.rounds = 1
	}
	chosen, err := choose(fs.Args())
	if err != nil {
		return err
	}
	if b.disk, err = os.MkdirTemp(dir, "silo-nbd-bench-"); err != nil {
		return err
	}
	defer os.RemoveAll(b.disk)
	memory := "/dev/shm"
	if _, err := os.Stat(memory); err != nil {
		memory = dir
	}
	if b.memory, err = os.MkdirTemp(memory, "silo-nbd-bench-"); err != nil {
		return err
	}
	defer os.RemoveAll(b.memory)

	fmt.Printf("machine: %s\n", machine())
	fmt.Printf("rounds: %d, taken in turn; figures are medians\n", b.rounds)
	for _, p := range chosen {
		began := time.Now()
		fmt.Printf("\n== %s: %s\n", p.name, p.about)
		if err := p.run(ctx, &b); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		fmt.Printf("   (%.0f s)\n", time.Since(began).Seconds())
	}
	return nil
}

// choose returns the parts of these names, all for none.
func choose(names []string) ([]part, error) {
	var chosen []part
	for _, name := range names {
		i := slices.IndexFunc(parts, func(p part) bool { return p.name == name })
		if i < 0 {
			return nil, fmt.Errorf("%s: no such part", name)
		}
		chosen = append(chosen, parts[i])
	}
	if len(chosen) == 0 {
		return parts, nil
	}
	return chosen, nil
}

// machine is the line that goes with every figure.
func machine() string {
	model := "unknown processor"
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(info)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	var uts syscall.Utsname
	release := "unknown kernel"
	if syscall.Uname(&uts) == nil {
		var b []byte
		for _, c := range uts.Release {
			if c != 0 {
				b = append(b, byte(c))
			}
		}
		release = "Linux " + string(b)
	}
	memory := int64(0)
	var si syscall.Sysinfo_t
	if syscall.Sysinfo(&si) == nil {
		memory = int64(si.Totalram) * int64(si.Unit)
	}
	load := ""
	if l, err := os.ReadFile("/proc/loadavg"); err == nil {
		load = ", load " + strings.Fields(string(l))[0]
	}
	return fmt.Sprintf("%d x %s, %d GiB, %s, %s%s", runtime.NumCPU(), model, memory>>30, release, runtime.Version(), load)
}

// have says whether a program is installed.
func have(name string) bool {
	_, err := exec.LookPath(name)
	return !errors.Is(err, exec.ErrNotFound) && err == nil
}
