package lazy

import (
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
)

// The bitmaps, and all that looks for runs in them, against slices of bools.
func TestStateAgainstBools(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, blocks := range []int64{1, 63, 64, 65, 127, 128, 200, 1000} {
		s := newState(blocks)
		fetched, written := make([]bool, blocks), make([]bool, blocks)
		for range 300 {
			lo := r.Int64N(blocks)
			hi := lo + r.Int64N(blocks-lo+1)
			op := r.IntN(3)
			for b := lo; b < hi; b++ {
				switch op {
				case 0:
					fetched[b] = true
				case 1:
					written[b] = true
				case 2:
					fetched[b] = false
				}
			}
			[]func(lo, hi int64){s.setFetched, s.setWritten, s.clearFetched}[op](lo, hi)
			var local, writes int64
			first := func(want func(b int64) bool) int64 {
				for b := lo; b < hi; b++ {
					if want(b) {
						return b
					}
				}
				return hi
			}
			for b := range blocks {
				if s.isLocal(b) != (fetched[b] || written[b]) || s.fetched.get(b) != fetched[b] || s.written.get(b) != written[b] {
					t.Fatalf("%d blocks: block %d is not what it should be", blocks, b)
				}
				if fetched[b] || written[b] {
					local++
				}
				if written[b] {
					writes++
				}
			}
			if s.local.Load() != local || s.writes.Load() != writes {
				t.Fatalf("counted %d local, %d written, want %d, %d", s.local.Load(), s.writes.Load(), local, writes)
			}
			if got, want := s.nextMissing(lo, hi), first(func(b int64) bool { return !fetched[b] && !written[b] }); got != want {
				t.Fatalf("next missing of [%d, %d) is %d, want %d", lo, hi, got, want)
			}
			if got, want := s.nextLocal(lo, hi), first(func(b int64) bool { return fetched[b] || written[b] }); got != want {
				t.Fatalf("next local of [%d, %d) is %d, want %d", lo, hi, got, want)
			}
			if got, want := s.nextWritten(lo, hi), first(func(b int64) bool { return written[b] }); got != want {
				t.Fatalf("next written of [%d, %d) is %d, want %d", lo, hi, got, want)
			}
			if got, want := s.nextUnwritten(lo, hi), first(func(b int64) bool { return !written[b] }); got != want {
				t.Fatalf("next unwritten of [%d, %d) is %d, want %d", lo, hi, got, want)
			}
		}
	}
}

func TestMaskAgainstBools(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for _, count := range []int64{1, 8, 63, 64, 65, 128, 2048} {
		var table maskTable
		const block = 5
		set := make([]bool, count)
		for range 60 {
			lo := r.Int64N(count)
			hi := lo + 1 + r.Int64N(min(count-lo, 1+count/20))
			for s := lo; s < hi; s++ {
				set[s] = true
			}
			full := table.add(block, lo, hi, count)
			all := true
			for _, v := range set {
				all = all && v
			}
			if full != all {
				t.Fatalf("%d sectors: full is %t, want %t", count, full, all)
			}
			lo = r.Int64N(count)
			hi = lo + 1 + r.Int64N(count-lo)
			wantSet, wantClear, wantHas := hi, hi, true
			for s := hi - 1; s >= lo; s-- {
				if set[s] {
					wantSet = s
				} else {
					wantClear, wantHas = s, false
				}
			}
			m := table.get(block)
			if m.nextSet(lo, hi) != wantSet || m.nextClear(lo, hi) != wantClear || table.has(block, lo, hi) != wantHas {
				t.Fatalf("sectors [%d, %d) of %d: %d, %d, %t, want %d, %d, %t", lo, hi, count,
					m.nextSet(lo, hi), m.nextClear(lo, hi), table.has(block, lo, hi), wantSet, wantClear, wantHas)
			}
		}
		table.drop(0, block) // another
		if table.get(block) == nil || table.n.Load() != 1 {
			t.Error("dropping others dropped it")
		}
		table.drop(0, block+1)
		if table.get(block) != nil || table.has(block, 0, 1) || table.n.Load() != 0 {
			t.Error("not dropped")
		}
	}
}

func TestRunsetGivesBackWhatWasPutIn(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for _, blocks := range []int64{1, 64, 100, pageBlocks, pageBlocks + 1, 5*pageBlocks + 70} {
		set := runset{blocks: blocks}
		want := make([]bool, blocks)
		var n int64
		change := func(lo, hi int64, v bool) {
			for b := lo; b < hi; b++ {
				if want[b] != v {
					want[b] = v
					if v {
						n++
					} else {
						n--
					}
				}
			}
		}
		for range 400 {
			lo := r.Int64N(blocks)
			hi := lo + r.Int64N(min(blocks-lo+1, 1+r.Int64N(2*pageBlocks)))
			switch r.IntN(4) {
			case 0, 1:
				set.add(lo, hi)
				change(lo, hi, true)
			case 2:
				set.remove(lo, hi)
				change(lo, hi, false)
			case 3:
				lo, hi, ok := set.take()
				if ok != (n > 0) {
					t.Fatalf("took a run: %t, with %d blocks in the set", ok, n)
				}
				if !ok {
					continue
				}
				for b := lo; b < hi; b++ {
					if !want[b] {
						t.Fatalf("took [%d, %d), but %d is not in the set", lo, hi, b)
					}
				}
				if lo == hi || hi < blocks && want[hi] {
					t.Fatalf("took [%d, %d), which is no whole run", lo, hi)
				}
				change(lo, hi, false)
			}
			if set.n != n {
				t.Fatalf("%d blocks in the set, want %d", set.n, n)
			}
		}
		for n > 0 {
			lo, hi, ok := set.take()
			if !ok {
				t.Fatalf("%d blocks are left, and not given back", n)
			}
			change(lo, hi, false)
		}
		if set.pages != nil {
			t.Error("an empty set holds memory")
		}
	}
}

// No two holders of overlapping claims at once, those who do not overlap do not
// wait for each other, and in the end nobody is left.
func TestClaimsExclude(t *testing.T) {
	var c claims
	var mu sync.Mutex
	owner := make([]int, 64)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 9))
			for range 3000 {
				lo := r.Int64N(64)
				hi := lo + 1 + r.Int64N(min(64-lo, 1+r.Int64N(20)))
				k := c.acquire(lo, hi)
				mu.Lock()
				for b := lo; b < hi; b++ {
					if owner[b] != 0 {
						t.Errorf("block %d has two owners", b)
					}
					owner[b] = i + 1
				}
				mu.Unlock()
				mu.Lock()
				clear(owner[lo:hi])
				mu.Unlock()
				c.release(k)
			}
		})
	}
	wg.Wait()
	if c.head != nil || c.tail != nil {
		t.Error("a claim is left")
	}
}

func TestClaimsAreTakenInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c claims
		a := c.acquire(0, 10)
		var b, d *claim
		wide := run(func() { b = c.acquire(5, 20) })
		synctest.Wait()
		// Behind the one that waits, else a stream of small claims would starve it.
		behind := run(func() { d = c.acquire(15, 16) })
		apart := run(func() { c.release(c.acquire(30, 31)) })
		if ended(wide) || ended(behind) || !ended(apart) {
			t.Fatal("wrong ones wait")
		}
		c.release(a)
		<-wide
		if ended(behind) {
			t.Fatal("two have block 15")
		}
		c.release(b)
		<-behind
		c.release(d)
	})
}

func TestGateCountsAndShuts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		for range 2 {
			if !g.enter() {
				t.Fatal("an open gate let nobody in")
			}
		}
		g.shut()
		g.shut()
		idle := run(func() { <-g.idle })
		if g.enter() || !g.isShut() || ended(idle) {
			t.Fatal("a shut gate is open, or nobody is inside")
		}
		g.leave()
		if ended(idle) {
			t.Fatal("one is still inside")
		}
		g.leave()
		<-idle
		if g.enter() {
			t.Error("let in after all had left")
		}
	})
}

// TestBlockThatIsWrittenAsItArrivesIsCountedOnce: a client may write into a block as soon
// as it is published, and a block that is not counted keeps the disk from completing
// (trap L7).
func TestBlockThatIsWrittenAsItArrivesIsCountedOnce(t *testing.T) {
	for range 5000 {
		s := newState(64)
		var wg sync.WaitGroup
		begin := make(chan struct{})
		wg.Go(func() {
			<-begin
			for b := range int64(64) {
				s.setFetched(b, b+1)
			}
		})
		wg.Go(func() {
			<-begin
			for s.writes.Load() < 64 {
				s.overwrite(0, 64)
			}
		})
		close(begin)
		wg.Wait()
		if n := s.local.Load(); n != 64 {
			t.Fatalf("%d of 64 blocks are counted as local", n)
		}
	}
}
