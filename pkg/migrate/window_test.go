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

// runWindow sends for d over p and returns the bytes that were answered and
// the longest time that a packet sent in the last half of d waited for the link.
func runWindow(t *testing.T, p *path, d time.Duration) (moved int64, queued time.Duration, w *window) {
	t.Helper()
	w = newWindow(64<<10, 256)
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	begin := time.Now()
	var answered atomic.Int64
	for {
		n := w.packet()
		if w.await(ctx, n) != nil {
			break
		}
		m := w.begin(n)
		back := p.send(n)
		if time.Since(begin) > d/2 {
			queued = max(queued, back-p.rtt)
		}
		time.AfterFunc(back, func() { answered.Add(n); w.release(m, true) })
		synctest.Wait()
	}
	return answered.Load(), queued, w
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
				moved, queued, w := runWindow(t, &c.path, d)
				used := float64(moved) / (c.path.rate * d.Seconds())
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
		w := newWindow(64<<10, 256)
		ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
		defer cancel()
		begin := time.Now()
		var late int64
		for {
			if since := time.Since(begin); since > 10*time.Second {
				p.rtt = 20 * time.Millisecond // the route has changed
			}
			n := w.packet()
			if w.await(ctx, n) != nil {
				break
			}
			m := w.begin(n)
			if time.Since(begin) > 50*time.Second {
				late += n
			}
			time.AfterFunc(p.send(n), func() { w.release(m, true) })
			synctest.Wait()
		}
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
			w := newWindow(64<<10, 256)
			ctx, cancel := context.WithTimeout(t.Context(), rttLife-100*time.Millisecond) // before the round trip is measured again
			defer cancel()
			begin := time.Now()
			var late int64
			var queued, after time.Duration
			for {
				since := time.Since(begin)
				if since > 2*time.Second && since < 8*time.Second {
					w.demand() // which itself takes next to nothing of the path
				}
				n := w.packet()
				if w.await(ctx, n) != nil {
					break
				}
				m := w.begin(n)
				back := p.send(n)
				switch {
				case since > 9400*time.Millisecond:
					after = max(after, back-p.rtt)
				case since > 4*time.Second && since < 8*time.Second:
					queued = max(queued, back-p.rtt)
					late += n
				}
				time.AfterFunc(back, func() { w.release(m, true) })
				synctest.Wait()
			}
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
		w := newWindow(64<<10, 256)
		ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
		defer cancel()
		begin := time.Now()
		var late int64
		var before, queued time.Duration
		for {
			since := time.Since(begin)
			if since > 2*time.Second {
				w.demand()
			}
			n := w.packet()
			if w.await(ctx, n) != nil {
				break
			}
			m := w.begin(n)
			back := p.send(n)
			switch {
			case since > time.Second && since < 2*time.Second:
				before = max(before, back-p.rtt)
			case since > 2100*time.Millisecond:
				queued = max(queued, back-p.rtt)
				late += n
			}
			time.AfterFunc(back, func() { w.release(m, true) })
			synctest.Wait()
		}
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
		_, _, w := runWindow(t, &p, time.Second)
		<-time.After(time.Second)
		urgent := w.begin(64 << 10)
		w.demand()
		require.False(t, w.room(64<<10), "it waits for the path to be empty")
		<-time.After(probeLife + time.Millisecond)
		require.True(t, w.room(64<<10))
		w.release(urgent, true)
		<-time.After(time.Minute)
	})
}

func TestOnePacketMayAlwaysFly(t *testing.T) {
	w := newWindow(1<<20, 1)
	require.NoError(t, w.await(t.Context(), 32<<20))
	m := w.begin(32 << 20)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, w.await(ctx, 1), context.Canceled)
	w.release(m, false)
	require.NoError(t, w.await(t.Context(), 1))
	require.Zero(t, w.stats().minRTT, "a refused packet measures nothing")
}
