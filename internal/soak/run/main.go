// Run is what scripts/soak runs: see package soak.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/soak"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

// run returns 0 if nothing was lost, 1 if something was, 2 for a wrong command line.
func run(ctx context.Context, args []string) int {
	o := soak.Options{Kind: soak.All, Log: os.Stdout}
	fs := flag.NewFlagSet("soak", flag.ContinueOnError)
	fs.StringVar(&o.Bin, "silo-nbd", "bin/silo-nbd", "the command to test")
	fs.StringVar(&o.Dir, "dir", os.TempDir(), "a directory for the disks")
	fs.Uint64Var(&o.Seed, "seed", uint64(time.Now().UnixNano())%1_000_000*1000, "of the first round; the next has the next number")
	fs.IntVar(&o.Rounds, "rounds", 0, "as many rounds at most (default: no limit)")
	fs.IntVar(&o.Parallel, "parallel", 2, "rounds at a time")
	if err := fs.Parse(args); err != nil {
		return 2
	}
	var err error
	if o.Duration, err = time.ParseDuration(fs.Arg(0)); err != nil || o.Duration <= 0 || fs.NArg() > 2 {
		fmt.Fprintln(os.Stderr, "soak: want DURATION [kill|cut|all], such as 10m all")
		return 2
	}
	if fs.NArg() == 2 {
		o.Kind = fs.Arg(1)
	}
	if o.Fio, err = exec.LookPath("fio"); err != nil {
		fmt.Println("fio is not installed: without it")
	}
	fmt.Printf("seed: %d\n", o.Seed)
	sum, err := soak.Run(ctx, o)
	fmt.Println(sum)
	if err != nil {
		fmt.Println("FAILED")
		return 1
	}
	return 0
}
