package soak

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/livevm"
)

// LiveVM is a kind of its own: running virtual machines move, one after the other.
const LiveVM = "live-vm"

// LiveOptions are those of MoveMachines.
type LiveOptions struct {
	Move     livevm.Options // what is common to all moves
	Dir      string         // where their files lie
	Seed     uint64         // of the first move; the next has the next number
	Duration time.Duration  // no move begins after it; 0: without limit
	Rounds   int            // as many at most; 0: without limit
	Log      func(format string, args ...any)
}

// LiveSummary is what was done.
type LiveSummary struct {
	Moves    []livevm.Report // those in which all was as it has to be
	Failures int
	took     time.Duration
}

// MoveMachines moves machines until the options say that it is enough, or ctx ends. The summary is there in any case;
// the error is what was not as it has to be.
func MoveMachines(ctx context.Context, o LiveOptions) (*LiveSummary, error) {
	sum, began := new(LiveSummary), time.Now()
	boot := o.Move // once: it takes longer than a move
	var err, failed error
	if boot.Dir, err = os.MkdirTemp(o.Dir, "live-vm-boot-"); err != nil {
		return sum, err
	}
	if err := livevm.Snapshot(ctx, boot); err != nil {
		return sum, fmt.Errorf("%w; the files are in %s", err, boot.Dir)
	}
	defer os.RemoveAll(boot.Dir) // what is left of it is in the way of nobody
	o.Move.From = boot.Dir
	o.Log("booted in %v", time.Since(began).Round(time.Second))
	for n := 0; ctx.Err() == nil && sum.Failures < maxFailures; n++ {
		if o.Rounds > 0 && n >= o.Rounds || o.Duration > 0 && time.Since(began) > o.Duration {
			break
		}
		seed := o.Seed + uint64(n)
		report, how, err := moveMachine(ctx, &o, seed)
		sum.took = time.Since(began)
		switch {
		case err == nil:
			sum.Moves = append(sum.Moves, report)
			o.Log("move %d (seed %d, %s): %v pause, %v handoff, %d records, %d mismatches", n+1, seed, how,
				report.Pause.Round(time.Millisecond), report.Handoff.Round(100*time.Microsecond), report.Records, report.Mismatches)
		case ctx.Err() == nil:
			sum.Failures++
			failed = errors.Join(failed, err)
			o.Log("move %d (seed %d, %s) FAILED: %v\n%v", n+1, seed, how, err, report)
		}
	}
	return sum, failed
}

// moveMachine moves one machine. If that fails its files are left.
func moveMachine(ctx context.Context, o *LiveOptions, seed uint64) (r livevm.Report, how string, err error) {
	move := o.Move
	how = varied(&move, seed)
	if move.Dir, err = os.MkdirTemp(o.Dir, "live-vm-"); err != nil {
		return r, how, err
	}
	r, err = livevm.Move(ctx, move)
	if err != nil && ctx.Err() == nil {
		return r, how, fmt.Errorf("%w; the files are in %s; again: scripts/soak --seed %d --rounds 1 %s", err, move.Dir, seed, LiveVM)
	}
	return r, how, errors.Join(err, os.RemoveAll(move.Dir))
}

// varied makes the handoff fall into the first pass or one of the later, with little or much of the disk missing.
func varied(o *livevm.Options, seed uint64) (how string) {
	r := rand.New(rand.NewPCG(seed, 0))
	o.Rate = []string{"10MiB", "20MiB", "40MiB", "0"}[r.IntN(4)]
	o.Before = time.Duration(r.IntN(3000)) * time.Millisecond
	o.After = time.Duration(200+r.IntN(1500)) * time.Millisecond
	how = fmt.Sprintf("rate %s, %v before", o.Rate, o.Before)
	if o.Abort = r.IntN(6) == 0; o.Abort {
		how += ", given up once"
	}
	switch r.IntN(6) {
	case 0: // a handoff is some hundred bytes each way, with data before, between and after them
		o.Cut = -1 - r.Int64N(200)
	case 1:
		o.Cut = 1 + r.Int64N(256<<10)
	}
	if o.Cut != 0 {
		how += fmt.Sprintf(", cut %d", o.Cut)
	}
	return how
}

// Records is how many were written in all, and those of them at the source.
func (s *LiveSummary) Records() (all, before int64) {
	for _, r := range s.Moves {
		all += r.Records
		before += r.RecordsBefore
	}
	return all, before
}

// String is the summary in words.
func (s *LiveSummary) String() string {
	var mismatches, places, sent, rest int64
	inFirst, clean, givenUp, again := 0, 0, 0, 0
	for _, r := range s.Moves {
		mismatches += r.Mismatches
		places += r.Places
		sent += r.DiskBefore
		rest += r.DiskAfter
		if r.DiskPasses == 1 {
			inFirst++
		}
		if r.GivenUp > 0 {
			givenUp++
		}
		if r.Asked > 1 {
			again++
		}
		if r.Fsck != "" {
			clean++
		}
	}
	all, before := s.Records()
	return fmt.Sprintf("moves: %d in %v, and %d that failed; %d were handed off in the first pass over the disk, %d when it was asked for again; %d at the second try, the first was given up\n"+
		"records: %d at the sources, %d at the destinations; %d places verified by the guests, %d mismatches; %d file systems clean\n"+
		"disks: %d MiB before the handoff, %d MiB after it\n"+
		"median and longest: pause of a guest %s, machine stopped %s, handoff %s",
		len(s.Moves), s.took.Round(time.Second), s.Failures, inFirst, again, givenUp,
		before, all-before, places, mismatches, clean, sent/mib, rest/mib,
		s.times(func(r livevm.Report) time.Duration { return r.Pause }),
		s.times(func(r livevm.Report) time.Duration { return r.Stopped }),
		s.times(func(r livevm.Report) time.Duration { return r.Handoff }))
}

// times are the median and the longest of what of takes from the reports.
func (s *LiveSummary) times(of func(livevm.Report) time.Duration) string {
	if len(s.Moves) == 0 {
		return "-"
	}
	var all []time.Duration
	for _, r := range s.Moves {
		all = append(all, of(r).Round(100*time.Microsecond))
	}
	slices.Sort(all)
	return fmt.Sprintf("%v and %v", all[len(all)/2], all[len(all)-1])
}
