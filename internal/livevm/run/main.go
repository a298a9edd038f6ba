// Run is what scripts/live-vm runs: see package livevm.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/livevm"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	switch {
	case errors.Is(err, errUsage):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "live-vm:", err)
		os.Exit(1)
	}
}

var errUsage = errors.New("a wrong command line")

func run(ctx context.Context, args []string, out io.Writer) error {
	o := livevm.Defaults()
	var image string
	var mib, cold int64
	var lose bool
	fs := flag.NewFlagSet("live-vm", flag.ContinueOnError)
	fs.StringVar(&o.SiloNBD, "silo-nbd", "bin/silo-nbd", "the `program`")
	fs.StringVar(&o.Guest, "guest", "bin/livevm-guest", "the workload's `program`")
	fs.StringVar(&image, "image", ".cache/guest/current", "the `directory` with the kernel of scripts/guest")
	fs.StringVar(&o.Dir, "dir", "", "a `directory` for the files, which stay there (default: a new one, which stays if something is wrong)")
	fs.Int64Var(&mib, "size", o.Size>>20, "`MiB` of the disk")
	fs.Int64Var(&cold, "cold", o.Cold>>20, "`MiB` of it that the guest does not write")
	fs.IntVar(&o.Memory, "mem", o.Memory, "`MiB` of memory")
	fs.StringVar(&o.Accel, "accel", o.Accel, "as QEMU takes it")
	fs.StringVar(&o.CPU, "cpu", o.CPU, "as QEMU takes it")
	fs.StringVar(&o.Rate, "rate", o.Rate, "bytes a second for the disk's background, 0 for no bound")
	fs.DurationVar(&o.Pause, "pause", o.Pause, "between two records")
	fs.DurationVar(&o.Before, "before", o.Before, "from the connection of the two to the start of the memory's migration")
	fs.DurationVar(&o.After, "after", o.After, "that the guest writes on at the destination")
	fs.BoolVar(&o.Abort, "abort", false, "give the first try up when the machine has been stopped for it, and move in a second")
	fs.BoolVar(&lose, "lose", false, "lose the memory when the disk has been handed off: the machine does not move, and its disk must have all that it has written")
	fs.Int64Var(&o.Cut, "cut", 0, "break the connection once, so many `bytes` of the source's after the handoff was asked for, below 0 of dest's")
	fs.DurationVar(&o.Limit, "limit", o.Limit, "on all of it")
	if err := fs.Parse(args); err != nil {
		return errUsage
	}
	if fs.NArg() > 0 {
		fs.Usage()
		return errUsage
	}
	o.Size, o.Cold = mib<<20, cold<<20
	o.Image(image)
	ours := o.Dir == ""
	if ours {
		var err error
		if o.Dir, err = os.MkdirTemp("", "live-vm-"); err != nil {
			return err
		}
	}
	began := time.Now()
	do := livevm.Move
	if lose {
		do = livevm.Lose
	}
	report, err := do(ctx, o)
	fmt.Fprintf(out, "%v\ntook %v\n", report, time.Since(began).Round(100*time.Millisecond))
	switch {
	case err != nil:
		return fmt.Errorf("%w\nlive-vm: the files are in %s", err, o.Dir)
	case ours:
		return os.RemoveAll(o.Dir)
	}
	return nil
}
