package protocol

import (
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// Whatever anybody waits for, the end of the connection wakes them, with one
// reason. A goroutine left behind fails the bubble.
func TestTheEndWakesEveryWaiter(t *testing.T) {
	why := errors.New("the operator has had enough")
	for name, v := range map[string]struct {
		end  func(p *ProtocolRW, cancel context.CancelCauseFunc, peer net.Conn)
		want error
	}{
		"close":   {func(p *ProtocolRW, _ context.CancelCauseFunc, _ net.Conn) { _ = p.Close() }, ErrClosed},
		"abort":   {func(p *ProtocolRW, _ context.CancelCauseFunc, _ net.Conn) { p.Abort(why) }, why},
		"context": {func(_ *ProtocolRW, cancel context.CancelCauseFunc, _ net.Conn) { cancel(why) }, why},
		"peer":    {func(_ *ProtocolRW, _ context.CancelCauseFunc, peer net.Conn) { _ = peer.Close() }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := net.Pipe()
				ctx, cancel := context.WithCancelCause(context.Background())
				defer cancel(nil)
				p := NewProtocolRW(ctx, b, b, nil)
				ended := handle(t, p)
				to := NewToProtocol(1<<20, 1, p)
				windowed := NewToProtocol(1<<20, 2, p)
				from := NewFromProtocol(3, keep(sources.NewMemoryStorage(4096)), p)
				windowed.window.resize(1)
				windowed.window.used = 1

				raw := &rawPeer{t: t, conn: a} // reads what it needs, and then nothing
				go func() { _, _ = io.CopyN(io.Discard, a, int64(2*(12+len(devInfo(0, 0)))+12+10+512+12+2)) }()
				require.NoError(t, to.SendDevInfo("d", 512, ""))
				require.NoError(t, windowed.SendDevInfo("d", 512, ""))
				raw.mustSend(3, 1, devInfo(4096, 512))
				answered := newCompletion()
				require.NoError(t, to.StartWrite(PriorityBulk, fill(512, 1), 0, answered))

				errs := make(chan error, 100)
				waiters := 0
				wait := func(f func() error) {
					waiters++
					go func() { errs <- f() }()
					synctest.Wait()
				}
				wait(func() error { return to.SendEvent(context.Background(), &wire.Event{}) }) // for its answer
				wait(func() error { _, err := to.WriteAt(fill(512, 1), 0); return err })        // in Write
				wait(func() error { _, err := to.ReadAt(make([]byte, 512), 0); return err })    // for the socket
				wait(func() error { return to.ZeroAt(0, 512, false) })
				wait(func() error { return to.SendDirtyList(context.Background(), 512, nil) })
				wait(func() error { return to.SendHashes(context.Background(), nil) })
				wait(func() error { return windowed.StartWrite(PriorityBulk, fill(512, 1), 0, ignored{}) }) // for the window
				wait(func() error { return to.RemoveDev() })
				bulk := newCompletion()
				go func() {
					if err := to.StartWrite(PriorityBulk, fill(512, 1), 0, bulk); err != nil {
						bulk <- err
					}
				}()
				synctest.Wait()
				outbox := newCompletion()
				go func() { outbox <- from.NeedAt(0, 512) }()
				synctest.Wait()
				require.Empty(t, errs)

				v.end(p, cancel, a)
				err := <-ended
				if v.want != nil {
					require.ErrorIs(t, err, v.want)
				}
				require.Equal(t, err, p.Err())
				<-p.Done()
				for range waiters {
					require.Equal(t, err, <-errs)
				}
				require.Equal(t, err, <-answered)
				require.Equal(t, err, <-bulk)
				<-outbox // it may have been taken, which is all that it says
				require.NoError(t, p.Close())
				require.NoError(t, p.Close())
				require.Zero(t, p.Stats().Unanswered)
				require.Equal(t, err, to.SendEvent(context.Background(), &wire.Event{}), "and later ones too")
				require.Equal(t, err, from.NeedAt(0, 512))
				_ = a.Close()
			})
		})
	}
}

// The reader that waits for memory is woken too, and all of it is given back.
func TestTheEndWakesAReaderThatWaitsForMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, p, ended := destination(t, nil, Options{Memory: 4 << 20})
		raw.mustSend(1, 1, devInfo(64<<20, 1<<20))
		go func() {
			for id := uint32(2); raw.send(1, id, writeAt(0, fill(1<<20, 1))) == nil; id++ {
			}
		}()
		synctest.Wait()
		require.Empty(t, ended)
		require.NoError(t, p.Close())
		require.ErrorIs(t, <-ended, ErrClosed)
		require.Zero(t, p.Stats().Received)
	})
}

func TestHandleIsRunOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, p, ended := source(t)
		synctest.Wait()
		require.ErrorContains(t, p.Handle(), "twice")
		require.NoError(t, p.Err())
		require.NoError(t, p.Close())
		require.ErrorIs(t, <-ended, ErrClosed)

		a, b := net.Pipe()
		late := NewProtocolRW(t.Context(), a, b, nil)
		require.NoError(t, late.Close())
		require.ErrorIs(t, late.Handle(), ErrClosed, "after Close it says so at once")
	})
}

// A connection whose context is dead from the start ends by itself.
func TestADeadContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		a, b := net.Pipe()
		p := NewProtocolRW(ctx, a, b, nil)
		require.ErrorIs(t, p.Handle(), context.Canceled)
		require.ErrorIs(t, NewToProtocol(1, 1, p).SendDevInfo("d", 1, ""), context.Canceled)
		require.NoError(t, p.Close())
	})
}

// aborter ends the connection from inside a completion.
type aborter struct {
	p    *ProtocolRW
	done chan error
}

func (a aborter) Complete(err error) {
	a.p.Abort(errors.New("from inside"))
	a.done <- err
}

func TestAbortFromACompletion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, p, ended := source(t)
		to := NewToProtocol(4096, 1, p)
		require.NoError(t, to.SendDevInfo("d", 512, ""))
		c := aborter{p, make(chan error, 2)}
		require.NoError(t, to.StartWrite(PriorityBulk, fill(512, 1), 0, c))
		require.NoError(t, to.StartWrite(PriorityBulk, fill(512, 1), 512, c))
		raw.mustSend(1, 2, written(512))
		require.ErrorContains(t, <-c.done, "from inside", "the other hears of it, while the first is still in Complete")
		require.NoError(t, <-c.done)
		require.ErrorContains(t, <-ended, "from inside")
		require.NoError(t, p.Close())
	})
}

// cutConn fails after so many bytes written, in the middle of whatever it is.
type cutConn struct {
	net.Conn
	left int
}

var errCut = errors.New("the wire was cut")

func (c *cutConn) Write(b []byte) (int, error) {
	if len(b) > c.left {
		n, _ := c.Conn.Write(b[:c.left])
		c.left = 0
		return n, errCut
	}
	c.left -= len(b)
	return c.Conn.Write(b)
}

// P5: a write that gets only part of a packet out ends the session, wherever.
func TestAPartialWriteEndsTheSession(t *testing.T) {
	total := 12 + len(devInfo(0, 0)) + 12 + 10 + 5000 + 12 + 2
	for n := 0; n < total; n += 1 + n/200 {
		synctest.Test(t, func(t *testing.T) {
			a, b := net.Pipe()
			raw := newRawPeer(t, a)
			p := NewProtocolRW(t.Context(), &cutConn{b, n}, &cutConn{b, n}, nil)
			ended := handle(t, p)
			to := NewToProtocol(8192, 1, p)
			c := newCompletion()
			err := to.SendDevInfo("d", 512, "")
			if err == nil {
				err = to.StartWrite(PriorityBulk, fill(5000, 1), 0, c)
			}
			if err == nil {
				err = to.SendEvent(t.Context(), &wire.Event{})
			}
			require.ErrorIs(t, err, errCut)
			require.ErrorIs(t, <-ended, errCut)
			require.NoError(t, p.Close())
			for range raw.got { // what got out, until the end
			}
			_ = a.Close()
		})
	}
}

// counter counts completions of one write.
type counter struct{ n atomic.Int32 }

func (c *counter) Complete(error) { c.n.Add(1) }

// Complete is called exactly once for each write that was started without an
// error and never for one with, also when the connection dies meanwhile.
func TestCompletionsAreCalledExactlyOnce(t *testing.T) {
	for range 50 {
		a, b := net.Pipe()
		src := NewProtocolRW(t.Context(), a, a, nil)
		dst := NewProtocolRW(t.Context(), b, b, nil)
		handle(t, src)
		handle(t, dst)
		NewFromProtocol(1, keep(sources.NewMemoryStorage(4096)), dst)
		to := NewToProtocol(4096, 1, src)
		require.NoError(t, to.SendDevInfo("d", 512, ""))
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				var all []*counter
				for {
					c := new(counter)
					if err := to.StartWrite(PriorityBulk, fill(512, 1), 0, c); err != nil {
						_ = src.Close()
						if c.n.Load() != 0 {
							t.Error("completed, although it could not be started")
						}
						break
					}
					all = append(all, c)
					if len(all) == 100 {
						dst.Abort(errCut)
					}
				}
				for _, c := range all {
					if n := c.n.Load(); n != 1 {
						t.Errorf("completed %d times", n)
					}
				}
			})
		}
		wg.Wait()
		_ = dst.Close()
	}
}

// P6: ten thousand connections leave nothing behind.
func TestTenThousandConnectionsLeaveNothing(t *testing.T) {
	connect := func() {
		a, b := net.Pipe()
		src := NewProtocolRW(t.Context(), a, a, nil)
		dst := NewProtocolRW(t.Context(), b, b, nil)
		var wg sync.WaitGroup
		wg.Go(func() { _ = src.Handle() })
		wg.Go(func() { _ = dst.Handle() })
		NewFromProtocol(1, keep(sources.NewMemoryStorage(4096)), dst)
		to := NewToProtocol(4096, 1, src)
		if err := to.SendDevInfo("d", 512, ""); err != nil {
			t.Error(err)
		}
		if _, err := to.WriteAt(make([]byte, 512), 0); err != nil {
			t.Error(err)
		}
		_ = src.Close()
		wg.Wait()
		_ = dst.Close()
	}
	for range 10 {
		connect()
	}
	before := heap()
	goroutines := runtime.NumGoroutine()
	for range 10_000 {
		connect()
	}
	// One that has said that it is done may not have gone yet.
	for end := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > goroutines && time.Now().Before(end); {
		runtime.Gosched()
	}
	require.LessOrEqual(t, runtime.NumGoroutine(), goroutines)
	require.Less(t, heap(), before+4<<20)
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
