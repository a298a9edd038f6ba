package lazy

const (
	aheadFirst = 4       // blocks that the first read-ahead asks for
	aheadBytes = 2 << 20 // the most that one asks for, unless that is less than aheadFirst
	aheadRuns  = 4       // sequential readers that are told apart
	maxAheads  = 4096    // blocks asked for ahead that have not arrived
)

// readAhead finds out who reads sequentially. It is told of faults only, that is
// of reads that found blocks missing, so reading what is here costs nothing.
type readAhead struct {
	limit int64 // blocks
	runs  [aheadRuns]aheadRun
	clock uint64
}

// aheadRun is one reader that may be sequential.
type aheadRun struct {
	lo, hi int64  // the last fault
	edge   int64  // asked for up to here
	window int64  // blocks of the last read-ahead; 0 while there was none
	used   uint64 // when; 0: never
}

// fault takes note of a read that found blocks missing from lo on and ends at
// hi, and returns the blocks to ask for ahead of it: none, unless it goes on
// from an earlier one. The window grows from aheadFirst blocks, twice as wide
// each time, and is gone with the first fault elsewhere.
func (a *readAhead) fault(lo, hi int64) (from, to int64) {
	a.clock++
	oldest := &a.runs[0]
	for i := range a.runs {
		r := &a.runs[i]
		if r.used != 0 && lo >= r.lo && lo <= r.edge {
			r.used = a.clock
			if hi <= r.hi {
				return 0, 0 // the same blocks again
			}
			r.window = min(max(aheadFirst, 2*r.window), a.limit)
			from, to = max(hi, r.edge), hi+r.window
			r.lo, r.hi, r.edge = lo, hi, max(r.edge, to)
			return from, to
		}
		if r.used < oldest.used {
			oldest = r
		}
	}
	*oldest = aheadRun{lo: lo, hi: hi, edge: hi, used: a.clock}
	return 0, 0
}
