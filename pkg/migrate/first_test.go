package migrate

import (
	"bytes"
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// blockRanges are ranges of blocks of 4 KiB.
func blockRanges(spans ...span) (r []Range) {
	for _, s := range spans {
		r = append(r, Range{s.from * 4096, s.len() * 4096})
	}
	return r
}

func TestOrderIsAsksThenHintsThenWhatGoesFirst(t *testing.T) {
	o := testOrder(t, 1024)
	require.Equal(t, int64(7), o.goFirst(blockRanges(span{900, 904}, span{10, 11}, span{500, 502})))
	first, _, _ := o.takeNext(64)
	require.Equal(t, span{900, 904}, first, "no more than that, whatever the packet")
	o.ask(300*4096, 320*4096) // longer than urgentBytes: the rest is a hint
	o.ask(700*4096, 4096)
	got := takeAll(o, 64)
	require.Equal(t, []span{{300, 364}, {364, 428}, {428, 492}, {492, 556}, {700, 701}}, got[:5])
	require.Equal(t, []span{{556, 620}, {10, 11}}, got[5:7], "500 was in the ask")
	require.Equal(t, span{701, 765}, got[7], "the rest behind the ask, and not behind what went first")
}

// Nobody waits for it, so the rate holds it.
func TestWhatGoesFirstIsNoHint(t *testing.T) {
	o := testOrder(t, 1024)
	o.goFirst(blockRanges(span{900, 904}))
	b, hint, ok := o.peekBulk()
	require.True(t, ok)
	require.False(t, hint)
	require.Equal(t, int64(900), b)
	_, ok = o.nextUrgent(64)
	require.False(t, ok)
}

func TestWhatGoesFirstIsSkippedWhereItIsNotNeeded(t *testing.T) {
	o := testOrder(t, 1024)
	o.goFirst(blockRanges(span{100, 110}, span{200, 210}, span{300, 310}))
	o.drop(102*4096, 3*4096)
	o.drop(200*4096, 10*4096)
	got := takeAll(o, 64)
	require.Equal(t, []span{{100, 102}, {105, 110}, {300, 310}, {0, 64}}, got[:4])
}

func TestRangesThatMakeNoSenseAreIgnored(t *testing.T) {
	o := testOrder(t, 64)
	size := o.geo.size
	require.Zero(t, o.goFirst(nil))
	require.Zero(t, o.goFirst([]Range{{-1, 4096}, {0, 0}, {0, -1}, {size, 1}, {size - 1, 2}, {math.MaxInt64, math.MaxInt64}, {1, math.MaxInt64}}))
	require.Equal(t, int64(8), o.goFirst([]Range{{size - 1, 1}, {4095, 2}, {4096, 4096}, {1, 1}, {4096, 6 * 4096}}))
	require.Equal(t, []span{{63, 64}, {0, 7}}, o.first)
	// A disk that claims the whole of itself again and again.
	all := slices.Repeat([]Range{{0, size}, {4096, 4096}}, maxFirst)
	o.goFirst(all)
	require.Less(t, len(o.first), 12)
	var blocks int64
	for _, s := range takeAll(o, 7) {
		blocks += s.len()
		o.done(s)
	}
	require.Equal(t, o.geo.blocks, blocks, "each once")
	require.True(t, o.settled())
}

func TestNextInIsNextWithAnEnd(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 1))
	b := newBitmap(300)
	for range 12 {
		b.set(rnd.Int64N(300))
	}
	for from := range int64(301) {
		for to := range int64(301) {
			want := int64(-1)
			for i := from; i < to; i++ {
				if b.get(i) {
					want = i
					break
				}
			}
			require.Equal(t, want, b.nextIn(from, to), "[%d, %d)", from, to)
		}
	}
}

// arrivedBlocks is a disk that notes which blocks of 64 KiB it is given.
type arrivedBlocks struct {
	storage.StorageProvider
	mu     sync.Mutex
	blocks []int64 // guarded by mu
}

func (a *arrivedBlocks) WriteAt(p []byte, off int64) (int, error) {
	a.mu.Lock()
	for at := off; at < off+int64(len(p)); at += DefaultBlockSize {
		a.blocks = append(a.blocks, at/DefaultBlockSize)
	}
	a.mu.Unlock()
	return a.StorageProvider.WriteAt(p, off)
}

func (a *arrivedBlocks) so() []int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.blocks)
}

// The disk moves while it is looked for what goes first; from then on that
// travels, at the rate of the background, and who asks overtakes it.
func TestWhatGoesFirstTravelsBeforeTheRest(t *testing.T) {
	for _, live := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			const size = 4 << 20
			store, want := testDisk(t, size, 1)
			first := []Range{{56 * DefaultBlockSize, 3 * DefaultBlockSize}, {33*DefaultBlockSize + 1000, 4096}}
			opts := SourceOptions{Rate: 2 * DefaultBlockSize, First: func(ctx context.Context, d storage.StorageProvider) ([]Range, error) {
				require.EqualValues(t, size, d.Size())
				<-time.After(time.Second)
				return first, errors.New("part of it could not be read")
			}}
			disk := SourceDisk{Name: "disk", Store: store}
			if live {
				disk.Live, opts.AutoHandoff = newTracker(t, store), true
			}
			src := newSource(t, opts, disk)
			here := &arrivedBlocks{}
			m := migrate(t, src, newDestination(t, DestinationOptions{}, func(_ string, size uint64) storage.StorageProvider {
				here.StorageProvider = memory("", size)
				return here
			}), newWires())
			dev := <-m.dst.ready
			<-time.After(990 * time.Millisecond)
			before := len(here.so())
			require.Positive(t, before, "the rest did not wait")
			<-time.After(1200 * time.Millisecond)
			if !live { // in standby nobody reads
				began := time.Now()
				_, err := dev.ReadAt(make([]byte, 1), 40*DefaultBlockSize)
				require.NoError(t, err)
				require.Less(t, time.Since(began), 100*time.Millisecond)
			}
			<-time.After(3 * time.Second)
			got := here.so()[before:]
			at := slices.Index(got, 56)
			require.Contains(t, []int{0, 1}, at, "at most the packet that was on its way: %v", got)
			expect := []int64{56, 57, 58, 33}
			if !live {
				asked := slices.Index(got, 40)
				require.Contains(t, []int{2, 3, 4}, asked)
				got = slices.Delete(got, asked, asked+1)
			}
			require.Equal(t, expect, got[at:at+4])
			src.SetRate(0)
			require.Equal(t, []error{nil, nil}, m.end())
			require.True(t, bytes.Equal(want, contents(t, here)))
			require.NoError(t, m.dst.Close())
		})
	}
}

// A look that takes for ever ends with its connection: of a disk that is
// complete, of a connection that is cut, and of a source that is stopped.
func TestLookForWhatGoesFirstEndsWithItsConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		looks, ended := 0, 0
		opts := SourceOptions{Rate: 1 << 20, First: func(ctx context.Context, _ storage.StorageProvider) ([]Range, error) {
			looks++
			<-ctx.Done()
			ended++
			return []Range{{0, 4096}}, context.Cause(ctx)
		}}
		store, want := testDisk(t, 4<<20, 1)
		src := newSource(t, opts, SourceDisk{Name: "disk", Store: store})
		w := newWires()
		m := migrate(t, src, newDestination(t, DestinationOptions{}, memory), w)
		<-time.After(time.Second)
		w.cut()
		require.Equal(t, []error{nil, nil}, m.end())
		require.True(t, bytes.Equal(want, contents(t, m.dst.disks["disk"])))
		require.NoError(t, m.dst.Close())
		require.Equal(t, 2, looks)
		require.Equal(t, 2, ended)

		src = newSource(t, opts, SourceDisk{Name: "disk", Store: store})
		m = migrate(t, src, newDestination(t, DestinationOptions{}, memory), newWires())
		<-time.After(time.Second)
		m.stop()
		for _, err := range m.end() {
			require.ErrorIs(t, err, context.Canceled)
		}
		require.NoError(t, m.dst.Close())
		require.Equal(t, 3, ended)
	})
}
