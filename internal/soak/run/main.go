// Run is what scripts/soak runs: see package soak.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/livevm"
	"github.com/silo-nbd/silo-nbd/internal/soak"
)

// manyMoves is how many machines are moved when nobody says how many, or for how long.
const manyMoves = 100

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

// run returns 0 if nothing was lost, 1 if something was, 2 for a wrong command line.
func run(ctx context.Context, args []string) int {
	o := soak.Options{Kind: soak.All, Log: os.Stdout}
	move := livevm.Defaults()
	var image string
	fs := flag.NewFlagSet("soak", flag.ContinueOnError)
	fs.StringVar(&o.Bin, "silo-nbd", "bin/silo-nbd", "the command to test")
	fs.StringVar(&o.Dir, "dir", os.TempDir(), "a directory for the disks")
	fs.Uint64Var(&o.Seed, "seed", uint64(time.Now().UnixNano())%1_000_000*1000, "of the first round; the next has the next number")
	fs.IntVar(&o.Rounds, "rounds", 0, "as many rounds at most (default: no limit)")
	fs.IntVar(&o.Parallel, "parallel", 2, "rounds at a time; with live-vm it is one")
	fs.StringVar(&move.Guest, "guest", "bin/livevm-guest", "for live-vm: the workload's program")
	fs.StringVar(&image, "image", ".cache/guest/current", "for live-vm: the directory with the kernel of scripts/guest")
	if err := fs.Parse(args); err != nil {
		return 2
	}
	rest := fs.Args()
	if len(rest) > 0 && rest[len(rest)-1] == soak.LiveVM && len(rest) < 2 {
		rest = []string{"0s", soak.LiveVM}
		if o.Rounds == 0 {
			o.Rounds = manyMoves
		}
	}
	var err error
	if len(rest) == 0 || len(rest) > 2 {
		return usage()
	}
	if o.Duration, err = time.ParseDuration(rest[0]); err != nil || o.Duration < 0 || o.Duration == 0 && o.Rounds == 0 {
		return usage()
	}
	if len(rest) == 2 {
		o.Kind = rest[1]
	}
	if !slices.Contains([]string{soak.Kill, soak.Cut, soak.All, soak.LiveVM}, o.Kind) {
		return usage()
	}
	fmt.Printf("seed: %d\n", o.Seed)
	if o.Kind == soak.LiveVM {
		move.SiloNBD = o.Bin
		move.Image(image)
		return moveMachines(ctx, o, move)
	}
	if o.Fio, err = exec.LookPath("fio"); err != nil {
		fmt.Println("fio is not installed: without it")
	}
	sum, err := soak.Run(ctx, o)
	fmt.Println(sum)
	return verdict(err)
}

func usage() int {
	fmt.Fprintln(os.Stderr, "soak: want DURATION [kill|cut|all|live-vm], such as 10m all; or live-vm, for a hundred moves or --rounds")
	return 2
}

func moveMachines(ctx context.Context, o soak.Options, move livevm.Options) int {
	sum, err := soak.MoveMachines(ctx, soak.LiveOptions{
		Move: move, Dir: o.Dir, Seed: o.Seed, Duration: o.Duration, Rounds: o.Rounds,
		Log: func(format string, args ...any) { fmt.Printf(format+"\n", args...) },
	})
	fmt.Println(sum)
	return verdict(err)
}

func verdict(err error) int {
	if err != nil {
		fmt.Println("FAILED")
		return 1
	}
	return 0
}
