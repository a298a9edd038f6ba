package migrate

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func testOrder(t testing.TB, blocks int64) *order {
	t.Helper()
	geo, err := newGeometry(blocks*4096-100, 4096) // the last block is short
	require.NoError(t, err)
	require.Equal(t, blocks, geo.blocks)
	return newOrder(geo)
}

// takeNext takes the next run as the pump would if nothing else happened.
func (o *order) takeNext(limit int64) (s span, urgent, ok bool) {
	if s, ok := o.nextUrgent(limit); ok {
		return s, true, true
	}
	from, _, ok := o.peekBulk()
	if !ok {
		return span{}, false, false
	}
	s, ok = o.takeBulk(from, limit)
	return s, false, ok
}

func takeAll(o *order, limit int64) (spans []span) {
	for {
		s, _, ok := o.takeNext(limit)
		if !ok {
			return spans
		}
		spans = append(spans, s)
	}
}

func TestOrderIsAsksThenHintsThenTheRest(t *testing.T) {
	o := testOrder(t, 1024)
	first, _, _ := o.takeNext(4)
	require.Equal(t, span{0, 4}, first)
	o.ask(300*4096, 700*4096) // longer than urgentBytes: the rest is a hint
	o.ask(100*4096+5, 1)
	o.ask(50*4096, 2*4096)
	o.ask(100*4096, 3*4096) // 100 is asked for already
	got := takeAll(o, 64)
	require.Equal(t, []span{{300, 364}, {364, 428}, {428, 492}, {492, 556}, {100, 101}, {50, 52}, {101, 103}}, got[:7])
	require.Equal(t, []span{{556, 620}, {620, 684}}, got[7:9])
	require.Equal(t, span{103, 167}, got[14], "behind what was asked for last")
	require.Equal(t, []span{{4, 50}, {52, 100}}, got[len(got)-2:])
}

func TestTheRestGoesOnBehindWhatWasAskedFor(t *testing.T) {
	o := testOrder(t, 1024)
	first, _, _ := o.takeNext(4)
	require.Equal(t, span{0, 4}, first)
	o.ask(500*4096, 2*4096)
	require.Equal(t, []span{{500, 502}, {502, 506}}, []span{next(t, o, 4), next(t, o, 4)}, "he who reads there may go on")
	o.ask(1022*4096, 4096)
	require.Equal(t, []span{{1022, 1023}, {1023, 1024}, {4, 8}}, []span{next(t, o, 4), next(t, o, 4), next(t, o, 4)}, "and then from the start")
	o.ask(100*4096, 400*4096)
	require.Equal(t, []span{{100, 356}, {356, 500}, {8, 100}}, takeAll(o, 400)[:3], "who asks for much has asked for what follows")
}

func next(t *testing.T, o *order, limit int64) span {
	t.Helper()
	s, _, ok := o.takeNext(limit)
	require.True(t, ok)
	return s
}

func TestAskForWhatFliesOrMakesNoSenseIsIgnored(t *testing.T) {
	o := testOrder(t, 8)
	s, _, _ := o.takeNext(2)
	o.ask(0, 4096) // M5: in flight
	for _, r := range [][2]int64{{0, 0}, {0, -1}, {-4096, 4096}, {8 * 4096, 4096}, {7 * 4096, 4096}, {1 << 62, 1 << 62}, {4096, 1<<63 - 1}} {
		o.ask(r[0], r[1])
	}
	_, ok := o.nextUrgent(8)
	require.False(t, ok, "nothing was asked for that is not in flight")
	o.done(s)
	o.ask(0, 4096) // already sent: who asks does not have it
	got, ok := o.nextUrgent(8)
	require.True(t, ok)
	require.Equal(t, span{0, 1}, got)
}

func TestDropTakesWholeBlocksOnly(t *testing.T) {
	o := testOrder(t, 8)
	o.drop(4096+1, 3*4096)   // blocks 2 and 3; parts of 1 and 4
	o.drop(7*4096, 4096-100) // the short last block
	o.drop(6*4096, 1<<62)    // beyond the end: cut
	o.drop(-1, 4096)         // M6
	o.drop(0, 0)             // M6
	o.drop(1<<40, 4096)      // M6
	require.Equal(t, []span{{0, 2}, {4, 6}}, takeAll(o, 8))
}

func TestDroppedInFlightIsNotSentAgain(t *testing.T) {
	o := testOrder(t, 4)
	s, _, _ := o.takeNext(2)
	o.drop(0, 4096)
	require.True(t, o.failed(s, time.Now()))
	require.False(t, o.settled())
	require.EqualValues(t, 3, o.unsettled(), "block 1 comes again, block 0 does not")
	require.Positive(t, o.release(time.Now()))
	require.Zero(t, o.release(time.Now().Add(time.Hour)))
	require.Equal(t, []span{{1, 2}}, takeAll(o, 4), "a block that failed goes alone, and the rest waits for it")
	o.done(span{1, 2})
	require.Equal(t, []span{{2, 4}}, takeAll(o, 4))
}

func TestFailedBlocksAreTriedAgainAndThenGivenUp(t *testing.T) {
	o := testOrder(t, 1)
	now := time.Now()
	for try := 1; ; try++ {
		s, _, ok := o.takeNext(1)
		require.True(t, ok)
		if !o.failed(s, now) {
			require.Equal(t, maxAttempts, try)
			break
		}
		require.False(t, o.settled(), "a block that failed is not settled")
		now = now.Add(o.release(now))
		require.Zero(t, o.release(now))
	}
}

func TestAskedBlockThatFailedComesBackUrgent(t *testing.T) {
	o := testOrder(t, 4)
	o.ask(2*4096, 1)
	s, ok := o.nextUrgent(1)
	require.True(t, ok)
	require.True(t, o.failed(s, time.Now()))
	o.release(time.Now().Add(time.Hour))
	s, ok = o.nextUrgent(1)
	require.True(t, ok)
	require.Equal(t, span{2, 3}, s)
}

func TestMoreAsksThanTheQueueHoldsAreNotForgotten(t *testing.T) {
	const blocks = 3 * maxAsks
	o := testOrder(t, blocks)
	for b := int64(0); b < blocks; b += 2 {
		o.ask(b*4096, 1)
	}
	seen := make(map[int64]bool)
	for {
		s, ok := o.nextUrgent(1)
		if !ok {
			break
		}
		seen[s.from] = true
		o.done(s)
	}
	require.Len(t, seen, blocks/2)
}

// TestEveryBlockIsSettledOnce runs an order against random events and a plain
// list of what must hold: each block is handed out only while it is not in
// flight, and settled means acknowledged or dropped, for every block.
func TestEveryBlockIsSettledOnce(t *testing.T) {
	for seed := range uint64(200) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { settleRandomly(t, rand.New(rand.NewPCG(seed, 1))) })
	}
}

func settleRandomly(t *testing.T, rnd *rand.Rand) {
	blocks := 1 + rnd.Int64N(300)
	o := testOrder(t, blocks)
	flying, acked := make(map[int64]bool), make(map[int64]bool)
	var out []span
	now := time.Now()
	for !o.settled() {
		switch b := rnd.Int64N(blocks); rnd.IntN(8) {
		case 0:
			o.ask(b*4096, 1+rnd.Int64N(5*4096))
		case 1:
			o.drop(b*4096, 4096+rnd.Int64N(2*4096))
			for i := b; i < b+3; i++ {
				if s, ok := o.geo.inside(b*4096, 4096); ok && i >= s.from && i < s.to {
					acked[i] = true
				}
			}
		case 2, 3:
			if len(out) == 0 {
				continue
			}
			i := rnd.IntN(len(out))
			s := out[i]
			out = append(out[:i], out[i+1:]...)
			failed := rnd.IntN(10) == 0 && o.failed(s, now)
			if !failed {
				o.done(s)
			}
			for b := s.from; b < s.to; b++ {
				delete(flying, b)
				acked[b] = acked[b] || !failed
			}
		default:
			now = now.Add(o.release(now))
			s, _, ok := o.takeNext(1 + rnd.Int64N(8))
			if !ok {
				continue
			}
			for b := s.from; b < s.to; b++ {
				require.False(t, flying[b], "block %d was handed out while in flight", b)
				flying[b] = true
			}
			out = append(out, s)
		}
	}
	require.Empty(t, flying)
	for b := range blocks {
		dropped := o.unsettled() == 0
		require.True(t, acked[b] || dropped, "block %d", b)
	}
}

// BenchmarkOrder shows that the cost of a block does not grow with the disk.
func BenchmarkOrder(b *testing.B) {
	for _, gib := range []int64{1, 16, 256} {
		b.Run(fmt.Sprintf("%dGiB", gib), func(b *testing.B) {
			geo, err := newGeometry(gib<<30, DefaultBlockSize)
			require.NoError(b, err)
			o := newOrder(geo)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				s, _, ok := o.takeNext(1)
				if !ok {
					b.StopTimer()
					o = newOrder(geo)
					b.StartTimer()
					continue
				}
				o.done(s)
			}
		})
	}
}

// threadTime is how long this thread has computed.
func threadTime() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t) // never fails
	return time.Duration(t.Nano())
}

// TestAskForGigabytesCostsLittle: a few bytes from the other side hold the lock for no
// longer than a pass over a bitmap, a word at a time (fault C3).
func TestAskForGigabytesCostsLittle(t *testing.T) {
	geo, err := newGeometry(2<<30, 512)
	require.NoError(t, err)
	o := newOrder(geo)
	l := newLiveOrder(geo, newDirt(geo), make(chan struct{}, 1))
	b := newBitmap(geo.blocks)
	runtime.LockOSThread() // its time is what it computes, whatever else the machine does
	defer runtime.UnlockOSThread()
	began, n := threadTime(), 0
	for i := range geo.blocks { // what a look at each block costs at least
		if b.get(i) {
			n++
		}
	}
	each := threadTime() - began
	require.Zero(t, n)
	for _, c := range []struct {
		what string
		do   func(off, length int64)
	}{{"ask", o.ask}, {"drop", o.drop}, {"ask of a live disk", l.ask}, {"drop of a live disk", l.drop}} {
		least := time.Hour
		for range 10 {
			began := threadTime()
			c.do(0, 2<<30)
			least = min(least, threadTime()-began)
		}
		t.Logf("%s: %v; a look at each block takes %v", c.what, least, each)
		require.Less(t, least, each, c.what)
	}
	require.Zero(t, o.unsettled())
}

// A hint leaves alone what flies and what comes back by itself.
func TestHintDoesNotTakeWhatIsOnItsWay(t *testing.T) {
	o := testOrder(t, 4096)
	flies, _, _ := o.takeNext(100)
	failed, _, _ := o.takeNext(100)
	require.True(t, o.failed(failed, time.Now()))
	o.ask(0, o.geo.size) // with what is more than urgentBytes as a hint
	require.EqualValues(t, 4096-flies.len()-failed.len(), o.left)
	for b := range o.geo.blocks {
		on := b >= flies.from && b < flies.to || b >= failed.from && b < failed.to
		require.Equal(t, !on, o.pending.get(b), "block %d", b)
	}
	require.EqualValues(t, 4096, o.unsettled())
}
