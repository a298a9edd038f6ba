package migrate

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// path is a link of some rate and round trip, with a queue as long as it gets.
type path struct {
	rate float64 // bytes a second
	rtt  time.Duration
	free time.Time // when the link has sent what is queued
}

// send returns when the answer to n bytes sent now is back.
func (p *path) send(n int64) time.Duration {
	now := time.Now()
	if p.free.Before(now) {
		p.free = now
	}
	p.free = p.free.Add(time.Duration(float64(n) / p.rate * float64(time.Second)))
	return p.free.Sub(now) + p.rtt
}

// drive sends packets over p, as w has it, until d has passed. before is called
// before each waits for the window, sent for each that has gone: at since, of n
// bytes, which wait for the link for queued. Either may be nil.
func drive(t *testing.T, w *lane, p *path, d time.Duration, before func(since time.Duration), sent func(since time.Duration, n int64, queued time.Duration)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	begin := time.Now()
	for {
		since := time.Since(begin)
		if before != nil {
			before(since)
		}
		n, err := w.await(ctx, w.packet)
		if err != nil {
			return
		}
		m := w.begin(n)
		back := p.send(n)
		if sent != nil {
			sent(since, n, back-p.rtt)
		}
		time.AfterFunc(back, func() { w.release(m, true) })
		synctest.Wait()
	}
}

func TestWindowFillsThePathAndQueuesLittle(t *testing.T) {
	for _, c := range []struct {
		name string
		path path
	}{
		{"100MB/s 30ms", path{rate: 100e6, rtt: 30 * time.Millisecond}},
		{"1GB/s 5ms", path{rate: 1e9, rtt: 5 * time.Millisecond}},
		{"12.5MB/s 100ms", path{rate: 12.5e6, rtt: 100 * time.Millisecond}},
		{"50MB/s 1ms", path{rate: 50e6, rtt: time.Millisecond}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const d = 5 * time.Second
				w := newWindow(64<<10, 256).lane()
				var queued time.Duration
				var moved int64
				drive(t, w, &c.path, d, nil, func(since time.Duration, n int64, q time.Duration) {
					moved += n
					if since > d/2 {
						queued = max(queued, q)
					}
				})
				used := float64(moved-w.stats().inFlight) / (c.path.rate * d.Seconds())
				t.Logf("%.0f %% of the link, a packet queues %v at most, %+v", 100*used, queued, w.stats())
				require.Greater(t, used, 0.75)
				// A quarter of what the path holds, and two packets.
				base := c.path.rtt + time.Duration(float64(w.packet())/c.path.rate*1e9)
				require.Less(t, queued, base/2+3*time.Duration(float64(w.packet())/c.path.rate*1e9))
				<-time.After(time.Minute) // let the last answers come
			})
		})
	}
}

func TestWindowFollowsThePath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := path{rate: 100e6, rtt: 2 * time.Millisecond}
		w := newWindow(64<<10, 256).lane()
		var late int64
		drive(t, w, &p, 60*time.Second, func(since time.Duration) {
			if since > 10*time.Second {
				p.rtt = 20 * time.Millisecond // the route has changed
			}
		}, func(since time.Duration, n int64, _ time.Duration) {
			if since > 50*time.Second {
				late += n
			}
		})
		require.Greater(t, float64(late)/(100e6*10), 0.75, "the longer round trip is found")
		require.Greater(t, w.stats().minRTT, 10*time.Millisecond)
		<-time.After(time.Minute)
	})
}

func TestNothingQueuesBesideDemandAndThePathStaysFull(t *testing.T) {
	for _, p := range []path{
		{rate: 20e6, rtt: 40 * time.Millisecond},
		{rate: 100e6, rtt: 30 * time.Millisecond},
		{rate: 1e9, rtt: 5 * time.Millisecond},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWindow(64<<10, 256).lane()
			var late int64
			var queued, after time.Duration
			const d = rttLife - 100*time.Millisecond // before the round trip is measured again
			drive(t, w, &p, d, func(since time.Duration) {
				if since > 2*time.Second && since < 8*time.Second {
					w.demand() // which itself takes next to nothing of the path
				}
			}, func(since time.Duration, n int64, q time.Duration) {
				switch {
				case since > 9400*time.Millisecond:
					after = max(after, q)
				case since > 4*time.Second && since < 8*time.Second:
					queued = max(queued, q)
					late += n
				}
			})
			packet := time.Duration(float64(w.packet()) / p.rate * 1e9)
			used := float64(late) / (p.rate * 4)
			t.Logf("%v: %.0f %% of the link; a packet of %v queues %v at most, %v without demand", p.rtt, 100*used, packet, queued, after)
			require.Greater(t, used, 0.9)
			require.Less(t, queued, 5*packet)
			require.Greater(t, after, queued, "a second after the last demand it is as before")
			<-time.After(time.Minute)
		})
	}
}

// On a fast path that is short the round trip of a packet of 1 MiB is its own time,
// and what it seems to hold would be a queue before each demand read.
func TestDemandMeetsOneSmallPacketOnAFastShortPath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := path{rate: 1e9, rtt: 200 * time.Microsecond}
		w := newWindow(64<<10, 256).lane()
		var late int64
		var before, queued time.Duration
		drive(t, w, &p, 4*time.Second, func(since time.Duration) {
			if since > 2*time.Second {
				w.demand()
			}
		}, func(since time.Duration, n int64, q time.Duration) {
			switch {
			case since > time.Second && since < 2*time.Second:
				before = max(before, q)
			case since > 2100*time.Millisecond:
				queued = max(queued, q)
				late += n
			}
		})
		used := float64(late) / (p.rate * 1.9)
		t.Logf("%.0f %% of the link, a packet queues %v at most, %v without demand", 100*used, queued, before)
		require.Greater(t, used, 0.5)
		require.LessOrEqual(t, queued, time.Duration(demandPacket/p.rate*1e9)+time.Microsecond)
		require.Greater(t, before, 3*queued)
		<-time.After(time.Minute)
	})
}

// As long as blocks are asked for without end the path is never empty.
func TestProbeThatFindsNoEmptyPathEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := path{rate: 1e9, rtt: time.Millisecond}
		w := newWindow(64<<10, 256).lane()
		drive(t, w, &p, time.Second, nil, nil)
		<-time.After(time.Second)
		urgent := w.begin(64 << 10)
		w.demand()
		require.False(t, hasRoom(w, 64<<10), "it waits for the path to be empty")
		<-time.After(probeLife + time.Millisecond)
		require.True(t, hasRoom(w, 64<<10))
		w.release(urgent, true)
		<-time.After(time.Minute)
	})
}

func hasRoom(l *lane, n int64) bool {
	wake, _ := l.room(n)
	return wake == nil
}

func always(n int64) func() int64 { return func() int64 { return n } }

func TestOnePacketMayAlwaysFly(t *testing.T) {
	w := newWindow(1<<20, 1).lane()
	n, err := w.await(t.Context(), always(32<<20))
	require.NoError(t, err)
	require.EqualValues(t, 32<<20, n)
	m := w.begin(32 << 20)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = w.await(ctx, always(1))
	require.ErrorIs(t, err, context.Canceled)
	w.release(m, false)
	_, err = w.await(t.Context(), always(1))
	require.NoError(t, err)
	require.Zero(t, w.stats().minRTT, "a refused packet measures nothing")
}

// Two disks share a window. One that waits for more than there is room for does
// not keep the room from the other, and takes what has become right meanwhile.
func TestWhoFindsNoRoomKeepsItFromNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWindow(4096, 256).lane()
		a, b := w.begin(firstWindow-8192), w.begin(firstWindow-8192)
		var size atomic.Int64
		size.Store(firstWindow)
		large, small := make(chan int64, 1), make(chan int64, 1)
		wait := func(l *lane, got chan<- int64, size func() int64) {
			n, err := l.await(t.Context(), size)
			require.NoError(t, err)
			got <- n
		}
		go wait(w.window.lane(), large, size.Load)
		synctest.Wait()
		go wait(w, small, always(8192))
		synctest.Wait()
		w.release(a, true)
		require.EqualValues(t, 8192, <-small)
		synctest.Wait()
		require.Empty(t, large)
		size.Store(4096)
		w.release(b, true)
		require.EqualValues(t, 4096, <-large)
	})
}
