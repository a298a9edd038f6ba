package nbdexport

import (
	"context"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// waitingZeroes is a disk on which WRITE_ZEROES waits until the disk arrives.
type waitingZeroes struct{ *disk }

func (d waitingZeroes) ZeroAtContext(ctx context.Context, off, length int64, punch bool) error {
	d.mu.Lock()
	waits, here := d.missing > 0, d.here
	d.mu.Unlock()
	if waits {
		defer Waiting(ctx)()
		select {
		case <-here:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// greedy are clients that send as many requests without data as they can.
type greedy struct {
	conns   []net.Conn
	wg      sync.WaitGroup
	mu      sync.Mutex
	answers int // guarded by mu
}

func newGreedy(t *testing.T, path string, clients, requests int) *greedy {
	g := &greedy{}
	var b []byte
	for i := range requests {
		b = append(b, packRequest(modeSimple, cmdWriteZeroes, 0, uint64(i), 0, 512)...)
	}
	for range clients {
		c := dialRaw(t, path).enter("disk", modeSimple)
		require.NoError(t, c.SetDeadline(noDeadline))
		g.conns = append(g.conns, c)
		g.wg.Go(func() { _, _ = c.Write(b) }) // until all is taken, or it is closed
		g.wg.Go(func() {
			for r := make([]byte, 16); ; {
				if _, err := io.ReadFull(c, r); err != nil {
					return
				}
				g.mu.Lock()
				g.answers++
				g.mu.Unlock()
			}
		})
	}
	return g
}

func (g *greedy) leave() {
	for _, c := range g.conns {
		c.Close()
	}
	g.wg.Wait()
}

// steady waits until the number of requests that wait does not grow any more.
func steady(t *testing.T, s *Server) int {
	t.Helper()
	last, since := 0, time.Now()
	for time.Since(since) < time.Second {
		<-time.After(20 * time.Millisecond)
		if n := s.Waits().Count; n != last {
			last, since = n, time.Now()
		}
	}
	return last
}

// uncharged is how many requests of a connection may wait that could not be charged:
// the next leader may have read one before the first was found to wait.
const uncharged = 2

// Requests that wait are charged, also those without data: what clients can pile up
// is bounded, one that is honest is served beside them, and all are answered in the
// end (fault C2, trap R4).
func TestRequestsThatWaitAreChargedWithoutData(t *testing.T) {
	d := waitingZeroes{newDisk(2 * mib)}
	d.missing = mib
	s, path := newTestServer(t, Options{MemoryBudget: 32 << 20}, Export{Name: "disk", Backend: d})
	const clients, requests = 20, 400
	g := newGreedy(t, path, clients, requests)
	require.LessOrEqual(t, steady(t, s), clients*(freeWaits+uncharged)+16<<20/waitCost)

	honest := dialRaw(t, path).enter("disk", modeSimple)
	waits := honest.request(cmdWriteZeroes, 0, 0, 512)
	_, err := honest.read(0, 0, 512)
	require.Equal(t, ok, err, "a request that waits holds up no other")

	d.arrive()
	require.Equal(t, ok, honest.status(waits))
	require.Eventually(t, func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.answers == clients*requests
	}, 20*time.Second, 10*time.Millisecond)
	g.leave()
	require.Zero(t, s.waits.used.Load())
}

// One that could not be charged goes on when others leave (trap R4).
func TestGreedyClientsThatLeaveMakeRoom(t *testing.T) {
	d := waitingZeroes{newDisk(2 * mib)}
	d.missing = mib
	s, path := newTestServer(t, Options{MemoryBudget: 32 << 20}, Export{Name: "disk", Backend: d})
	s.waits.limit = 4 * waitCost
	first := newGreedy(t, path, 1, freeWaits+10)
	n := steady(t, s)
	require.Contains(t, []int{freeWaits + 5, freeWaits + 4 + uncharged}, n, "the rest is not read")
	second := newGreedy(t, path, 1, freeWaits+2)
	require.Contains(t, []int{n + freeWaits + 1, n + freeWaits + uncharged}, steady(t, s))
	first.leave()
	require.Equal(t, freeWaits+2, steady(t, s), "all of the second wait, and none is refused")
	require.EqualValues(t, 2*waitCost, s.waits.used.Load())
	second.leave()
	require.Eventually(t, func() bool { return s.waits.used.Load() == 0 }, 10*time.Second, time.Millisecond)
}

// TestHostileClientsAllocateBoundedMemory measures what 1,024 clients cost that have
// 4,096 WRITE_ZEROES waiting each, both ends of their connections included
// (fault C2).
func TestHostileClientsAllocateBoundedMemory(t *testing.T) {
	if testing.Short() || raceEnabled {
		t.Skip("measures the memory of the process, which the race detector multiplies: scripts/test runs it without")
	}
	d := waitingZeroes{newDisk(2 * mib)}
	d.missing = mib
	s, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: d})
	before := rss(t)
	g := newGreedy(t, path, 1024, 4096)
	n := steady(t, s)
	cost := rss(t) - before
	t.Logf("%d requests wait; %d MiB more", n, cost>>20)
	require.Less(t, cost, int64(256<<20))
	g.leave()
}

// rss is the memory of this process, in bytes.
func rss(t *testing.T) int64 {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	require.NoError(t, err)
	_, line, found := strings.Cut(string(status), "VmRSS:")
	require.True(t, found)
	kib, err := strconv.ParseInt(strings.Fields(line)[0], 10, 64)
	require.NoError(t, err)
	return kib << 10
}
