// Package soak moves disks while the programs are killed and the network fails,
// at random moments, with clients that write all the while, and looks whether
// anything was lost. It runs the command as a user does, and knows of every
// sector what it must hold, or may.
package soak

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
)

// Kinds of rounds.
const (
	Kill = "kill" // source, destination or both are killed
	Cut  = "cut"  // the link between them is cut, stalls and delays
	All  = "all"  // both kinds in turn
)

// Options of a run.
type Options struct {
	Bin      string        // the command under test
	Fio      string        // the program fio; empty: without it
	Dir      string        // where the disks lie
	Kind     string        // Kill, Cut or All
	Seed     uint64        // of the first round; the next has the next number
	Duration time.Duration // no round begins after it; 0: without limit
	Rounds   int           // as many at most; 0: without limit
	Kills    int64         // no round begins after so many; 0: without limit
	Cuts     int64         // likewise
	Parallel int           // rounds at a time; 0: one
	Log      io.Writer     // a line for each round that failed
}

// maxFailures is how many rounds may fail before the run ends.
const maxFailures = 3

// Summary is what was done.
type Summary struct {
	Rounds, SourceKills, DestKills, Cuts, Stalls, Delays, Corruptions, FioPasses, Again, Failures atomic.Int64

	bytes  atomic.Int64 // that passed the links
	counts counts
	began  time.Time
	took   time.Duration
}

// Kills is how often a process was killed.
func (s *Summary) Kills() int64 { return s.SourceKills.Load() + s.DestKills.Load() }

// String is the summary in words.
func (s *Summary) String() string {
	return fmt.Sprintf("rounds: %d in %v\nkills: %d (source %d, destination %d), and %d sources that were started again since the destination was just away\nlink: %d cuts, %d stalls, %d delays, %d bits changed, %d MiB\n"+
		"clients: %d writes (%d MiB), %d flushes, %d reads, %d MiB checked, %d passes of fio\nmismatches: %d",
		s.Rounds.Load(), s.took.Round(time.Second), s.Kills(), s.SourceKills.Load(), s.DestKills.Load(), s.Again.Load(),
		s.Cuts.Load(), s.Stalls.Load(), s.Delays.Load(), s.Corruptions.Load(), s.bytes.Load()/mib,
		s.counts.writes.Load(), s.counts.written.Load()/mib, s.counts.flushes.Load(), s.counts.reads.Load(), s.counts.checked.Load()/mib,
		s.FioPasses.Load(), s.Failures.Load())
}

// Run makes rounds until the options say that it is enough, or ctx ends. The
// summary is there in any case; the error is the first failure.
func Run(ctx context.Context, o Options) (*Summary, error) {
	sum := &Summary{began: time.Now()}
	if o.Kind != Kill && o.Kind != Cut && o.Kind != All {
		return sum, fmt.Errorf("%q is no kind of rounds: want %s, %s or %s", o.Kind, Kill, Cut, All)
	}
	var wg sync.WaitGroup
	var next atomic.Int64
	var mu sync.Mutex
	var first error
	for range max(1, o.Parallel) {
		wg.Go(func() {
			for ctx.Err() == nil {
				n := next.Add(1) - 1
				if enough(&o, sum, n) {
					return
				}
				err := round(ctx, &o, sum, n)
				if err == nil || ctx.Err() != nil {
					continue
				}
				sum.Failures.Add(1)
				fmt.Fprintln(o.Log, err)
				mu.Lock()
				first = errors.Join(first, err)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	sum.took = time.Since(sum.began)
	return sum, first
}

func enough(o *Options, sum *Summary, n int64) bool {
	return o.Duration > 0 && time.Since(sum.began) > o.Duration ||
		o.Rounds > 0 && n >= int64(o.Rounds) ||
		o.Kills > 0 && sum.Kills() >= o.Kills ||
		o.Cuts > 0 && sum.Cuts.Load() >= o.Cuts ||
		sum.Failures.Load() >= maxFailures
}

// round is one migration. If it fails its files are left.
func round(ctx context.Context, o *Options, sum *Summary, n int64) error {
	seed := o.Seed + uint64(n)
	dir, err := os.MkdirTemp(o.Dir, "silo-nbd-soak-")
	if err != nil {
		return err
	}
	r := rand.New(rand.NewPCG(seed, 0))
	kind, run := o.Kind, killRound
	if kind == Cut || kind == All && seed%4 == 3 {
		kind, run = Cut, cutRound
	}
	m, err := newMigration(ctx, o, sum, r, dir, kind)
	if err == nil {
		err = run(ctx, m)
	}
	if m != nil {
		if m.link != nil {
			to, from := m.link.Bytes()
			sum.bytes.Add(to + from)
		}
		if err != nil && ctx.Err() == nil {
			m.dump()
		}
		m.close()
	}
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("a %s round failed: %w\n  its files are in %s; again: scripts/soak --seed %d --rounds 1 1h %s", kind, err, dir, seed, o.Kind)
	}
	sum.Rounds.Add(1)
	return os.RemoveAll(filepath.Clean(dir))
}
