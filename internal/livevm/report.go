package livevm

import (
	"fmt"
	"time"
)

// Report is what a move was like. Sizes are in bytes.
type Report struct {
	Pause       time.Duration // between the last record at the source and the first at the destination
	GuestPause  time.Duration // the same by the guest's own clock
	PauseBefore time.Duration // the longest between two records at the source
	PauseAfter  time.Duration // the longest between two records at the destination

	Stopped  time.Duration // from the stop at the source to the start at the destination, as QEMU has it
	Switched time.Duration // from the start of the memory's migration to the start at the destination
	Handoff  time.Duration // of the disk
	Asked    int           // for it, so often

	GivenUp time.Duration // that the machine was stopped in the try that was given up; 0: there was none

	Memory       int64 // that travelled
	MemoryPasses int64

	DiskBefore, DiskAfter int64 // that travelled before the handoff was asked for, and from then on
	DiskPasses            int   // before it
	Missing               int64 // at the destination when it became its owner

	Records, RecordsBefore int64 // all, and those at the source
	Places                 int64 // that were verified, and have a record each
	Cold                   int64 // that were verified, and that nobody wrote
	Mismatches             int64
	Fsck                   string // what e2fsck says last; empty: it did not come so far
}

// Longest is the longest pause of the guest: between any two records.
func (r Report) Longest() time.Duration { return max(r.Pause, r.PauseBefore, r.PauseAfter) }

// String is the report in words.
func (r Report) String() string {
	first := ""
	if r.GivenUp > 0 {
		first = fmt.Sprintf("a first try was given up; the guest stood still for %v, and went on at the source\n", ms(r.GivenUp))
	}
	return first + fmt.Sprintf(`the guest's longest pause: %v (across the move %v, by its own clock %v; before it %v, after it %v)
stopped: %v by QEMU's account, of which the handoff of the disk took %v%s
memory: %s in %d passes, %v from the start of its migration to the guest's start at the destination
disk: %s before the handoff, in %d passes; %s after it, with %s (holes included) missing at the destination when that became its owner
records: %d at the source, %d at the destination
verified by the guest: %d places with records, and %s that nobody wrote; mismatches: %d
e2fsck: %s`,
		ms(r.Longest()), ms(r.Pause), ms(r.GuestPause), ms(r.PauseBefore), ms(r.PauseAfter), ms(r.Stopped), ms(r.Handoff), again(r.Asked),
		mib(r.Memory), r.MemoryPasses, ms(r.Switched),
		mib(r.DiskBefore), r.DiskPasses, mib(r.DiskAfter), mib(r.Missing),
		r.RecordsBefore, r.Records-r.RecordsBefore, r.Places, mib(r.Cold), r.Mismatches, r.Fsck)
}

// again says how often it was, if it was more than once.
func again(n int) string {
	if n <= 1 {
		return ""
	}
	return fmt.Sprintf(" (asked for %d times)", n)
}

func ms(d time.Duration) time.Duration { return d.Round(100 * time.Microsecond) }

func mib(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }
