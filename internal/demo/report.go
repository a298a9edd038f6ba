package demo

import (
	"bytes"
	"fmt"
	"strings"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/verify"
)

// result is what was seen.
type result struct {
	attached      time.Duration // after the start of the destination
	localAtAttach float64       // fraction of the disk
	localAtFirst  float64
	first         latencies // reads of missing blocks, right after attaching
	silent        latencies // writes of missing blocks while the link was stopped
	carried       int64     // bytes that the link delivered meanwhile
	reads, writes latencies // of missing blocks, while the stream filled the link
	resumed       time.Time
	linkUse       float64       // fraction of the link's rate that was used meanwhile
	complete      time.Duration // after the start of the destination

	wantSum, gotSum []byte
	wrote           int64         // blocks that were written to
	plain           verify.Result // the source's disk against the export
}

// claim is something that was promised, and what was seen of it.
type claim struct {
	promise, seen string
	holds         bool
}

// claims holds what was seen against what is promised.
func (s *stage) claims() []claim {
	r := &s.result
	whole := s.copyTime()
	// In the order of the disk a read would wait for half the copy. On a short
	// copy a busy machine's hiccups weigh more, and prove nothing.
	soon := max(whole/20, 500*time.Millisecond)
	return []claim{
		{
			"usable at once",
			fmt.Sprintf("attached %s after the start, with %.1f %% of the disk local", short(r.attached), 100*r.localAtAttach),
			r.attached < time.Second && r.localAtAttach < 0.5,
		}, {
			"the first reads need no copy",
			fmt.Sprintf("%s, instead of %s for a copy", r.first, short(whole)),
			len(r.first) == firstReads && r.first.quantile(0.5) < soon,
		}, {
			"a write never waits for the network",
			fmt.Sprintf("%d of %d answered while the link carried %d bytes: %s", len(r.silent), silentWrites, r.carried, r.silent),
			len(r.silent) == silentWrites && r.carried == 0,
		}, {
			"a waiting read overtakes the stream",
			fmt.Sprintf("%d reads with the link %.0f %% full: %s", len(r.reads), 100*r.linkUse, r.reads),
			len(r.reads) > 0 && r.reads.quantile(0.99) < soon,
		}, {
			"writes meanwhile",
			fmt.Sprintf("%d: %s", len(r.writes), r.writes),
			len(r.writes) > 0,
		}, {
			"no byte lost, none made up",
			fmt.Sprintf("sha256 of the source with our writes %.8x…, of the export %.8x…", r.wantSum, r.gotSum),
			bytes.Equal(r.wantSum, r.gotSum),
		}, {
			"nothing else differs",
			fmt.Sprintf("%d of %d blocks differ from the source's disk, %d were written to", r.plain.Differing, r.plain.Blocks, r.wrote),
			r.plain.Differing == r.wrote && r.plain.SizeA == r.plain.SizeB,
		},
	}
}

// judge prints what was promised and seen, and returns an error if anything
// did not hold.
func (s *stage) judge() error {
	s.printf("\n")
	var broken []string
	for _, c := range s.claims() {
		verdict := "ok    "
		if !c.holds {
			verdict = "FAILED"
			broken = append(broken, c.promise)
		}
		s.printf("  %s  %-36s %s\n", verdict, c.promise, c.seen)
	}
	s.printf("\n")
	if s.Keep != "" {
		s.printf("  The disks are in %s.\n", s.dir)
	}
	if len(broken) > 0 {
		return fmt.Errorf("did not hold: %s", strings.Join(broken, "; "))
	}
	s.printf("  All of it held: the disk was in use %s before a copy would have been there.\n", short(s.copyTime()-s.result.attached))
	return nil
}
