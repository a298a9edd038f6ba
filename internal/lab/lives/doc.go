// Package lives lets disks live: it runs the real program on two hosts (two
// directories, each a small file system of its own if the test runs as root)
// and does to it what happens to programs, hosts and files over months: kills,
// power cuts, handoffs, rollbacks, copies, renames, second destinations, full
// file systems. After each step a model tells what must hold:
//
//   - at most one process answers writes of a disk, and only a disk that was
//     handed off changes its owner;
//   - what was acknowledged is there; after a power cut, what was flushed;
//   - success (exit 0, "complete", "safe") is said only of the right bytes;
//   - nothing hangs that should come to an end.
//
// The model knows histories of contents (line). A copy that an operator makes
// of a whole disk, a disk that is reclaimed, and a host that was rolled back to
// before its own handoff, so that no note of it is left there, begin another
// line. Nothing else does. A note is left as long as the file's extended
// attribute or the state file beside it has it.
//
// A run is a list of steps, drawn from a seed. One that finds a violation is
// made shorter by leaving steps out, and printed so that it can be added to the
// stories, from which most runs begin.
//
// The gate draws 2,000 runs, and stops after 150 s; scripts/lives draws 20,000.
// scripts/lives mutants takes the mends of six known faults out, one after the
// other, and shows that each is found.
package lives
