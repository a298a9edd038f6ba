package link

import (
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// pipes is a link over in-memory connections, for a bubble with its own time.
type pipes struct {
	*Link
	life context.Context
}

func newPipes(t *testing.T, o Options) pipes {
	l, life := newLink(o)
	t.Cleanup(func() { require.NoError(t, l.Close()) })
	return pipes{l, life}
}

func (p pipes) connect() (client, target net.Conn) {
	client, near := net.Pipe()
	far, target := net.Pipe()
	ctx, cancel := context.WithCancel(p.life)
	c := &conn{link: p.Link, client: near, cancel: cancel}
	p.add(c)
	p.wg.Go(func() {
		defer p.remove(c)
		c.run(ctx, far)
	})
	return client, target
}

func TestDelayIsOneWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPipes(t, Options{Delay: 30 * time.Millisecond})
		client, target := p.connect()
		began := time.Now()
		exchange(t, client, target, "there")
		require.Equal(t, 30*time.Millisecond, time.Since(began))
		exchange(t, target, client, "and back")
		require.Equal(t, 60*time.Millisecond, time.Since(began))
	})
}

func TestDelayDoesNotLowerTheRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPipes(t, Options{Rate: 1 << 20, Delay: time.Second})
		client, target := p.connect()
		began := time.Now()
		p.wg.Go(func() { _, _ = client.Write(make([]byte, 4<<20)) }) // a failure shows as missing bytes
		_, err := io.ReadFull(target, make([]byte, 4<<20))
		require.NoError(t, err)
		require.InDelta(t, 5*time.Second, time.Since(began), float64(20*time.Millisecond))
	})
}

func TestSenderIsHeldBackByABoundedQueue(t *testing.T) {
	for rate, queue := range map[int64]int64{
		10 << 20:  512 << 10, // 50 ms of it
		100 << 10: 64 << 10,  // the least
	} {
		synctest.Test(t, func(t *testing.T) {
			p := newPipes(t, Options{Rate: rate})
			client, target := p.connect()
			var taken atomic.Int64
			p.wg.Go(func() {
				for {
					n, err := client.Write(make([]byte, 1<<10))
					taken.Add(int64(n))
					if err != nil {
						return
					}
				}
			})
			p.wg.Go(func() { _, _ = io.Copy(io.Discard, target) }) // ends with the link
			for range 20 {
				time.Sleep(100 * time.Millisecond)
				synctest.Wait()
				delivered, _ := p.Bytes()
				require.LessOrEqual(t, taken.Load()-delivered, queue+maxChunk)
			}
			delivered, _ := p.Bytes()
			require.InEpsilon(t, 2*rate, delivered, 0.02)
		})
	}
}

func TestReceiverThatDoesNotReadBoundsMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPipes(t, Options{Delay: time.Millisecond})
		client, target := p.connect()
		var taken atomic.Int64
		p.wg.Go(func() {
			for {
				n, err := client.Write(make([]byte, 1<<20))
				taken.Add(int64(n))
				if err != nil {
					return
				}
			}
		})
		time.Sleep(time.Minute)
		synctest.Wait()
		require.LessOrEqual(t, taken.Load(), int64(unlimitedUnderway+maxChunk))
		require.NoError(t, target.Close())
	})
}

func TestConnectionsShareTheRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPipes(t, Options{Rate: 1 << 20})
		began := time.Now()
		var wg sync.WaitGroup
		for range 4 {
			client, target := p.connect()
			p.wg.Go(func() { _, _ = client.Write(make([]byte, 1<<20)) }) // a failure shows as missing bytes
			wg.Go(func() { _, _ = io.ReadFull(target, make([]byte, 1<<20)) })
		}
		wg.Wait()
		require.InDelta(t, 4*time.Second, time.Since(began), float64(50*time.Millisecond))
		synctest.Wait() // what was read may not have been counted yet
		delivered, _ := p.Bytes()
		require.EqualValues(t, 4<<20, delivered)
	})
}

func TestWaysAreIndependent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPipes(t, Options{Rate: 64 << 10, Delay: time.Millisecond})
		client, target := p.connect()
		p.wg.Go(func() { _, _ = client.Write(make([]byte, 1<<20)) }) // cut short by the end of the test
		p.wg.Go(func() { _, _ = io.ReadFull(target, make([]byte, 1<<20)) })
		time.Sleep(time.Second)
		began := time.Now()
		exchange(t, target, client, "the way back is free")
		require.Less(t, time.Since(began), 5*time.Millisecond)
	})
}

func TestSetRateActsOnARunningLink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPipes(t, Options{Rate: 64 << 10})
		client, target := p.connect()
		began := time.Now()
		p.SetRate(0)
		p.wg.Go(func() { _, _ = client.Write(make([]byte, 64<<20)) }) // a failure shows as missing bytes
		_, err := io.ReadFull(target, make([]byte, 64<<20))
		require.NoError(t, err)
		require.Less(t, time.Since(began), time.Second)
	})
}
