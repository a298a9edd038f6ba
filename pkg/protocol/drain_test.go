package protocol

import (
	"errors"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// slowStore takes its time, and counts what it was given.
type slowStore struct {
	*sources.MemoryStorage
	pause         time.Duration
	writes, hears atomic.Int32
}

func (s *slowStore) WriteAt(p []byte, off int64) (int, error) {
	<-time.After(s.pause)
	s.writes.Add(1)
	return s.MemoryStorage.WriteAt(p, off)
}

func (s *slowStore) HandleRemoveDev() { s.hears.Add(1) }

// hangUp is a peer that sends all of b and hangs up.
func hangUp(conn net.Conn, b []byte) {
	go func() {
		_, _ = conn.Write(b) // it is read to its end
		_ = conn.Close()
	}()
}

// farewell is a device, n writes of 512 bytes, and RemoveDev.
func farewell(n int) []byte {
	b := frame(1, 1, checkedInfo(int64(n)*512, 512))
	for i := range n {
		b = append(b, checkedFrame(1, uint32(2+i), writeAt(int64(i)*512, fill(512, byte(i+1))))...)
	}
	return append(b, checkedFrame(1, uint32(2+n), []byte{0x0a})...)
}

// What a peer sent before it hung up is done, also when the device's receiver is
// only then found, its store is slow, and answers go nowhere.
func TestWhatCameBeforeThePeerHungUpIsDone(t *testing.T) {
	for name, v := range map[string]struct {
		finding, opening, writing time.Duration
	}{
		"the receiver comes late": {4 * time.Second, 0, 0},
		"the store comes late":    {0, 4 * time.Second, 0},
		"the store is slow":       {0, 0, 3 * time.Second},
		"all of it":               {4 * time.Second, 4 * time.Second, 4 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const n = 20
				store := &slowStore{MemoryStorage: sources.NewMemoryStorage(n * 512), pause: v.writing}
				a, b := net.Pipe()
				p := NewProtocolRW(t.Context(), b, b, func(p Protocol, dev uint32) {
					<-time.After(v.finding)
					NewFromProtocol(dev, func(*DevInfo) storage.StorageProvider {
						<-time.After(v.opening)
						return store
					}, p)
				})
				ended := handle(t, p)
				hangUp(a, farewell(n))
				require.ErrorIs(t, <-ended, io.EOF)
				require.EqualValues(t, n, store.writes.Load())
				require.EqualValues(t, 1, store.hears.Load())
				for i := range n {
					require.Equal(t, byte(i+1), content(t, store.MemoryStorage)[i*512])
				}
			})
		})
	}
}

// A DevInfo is something that was said, too.
func TestADevInfoAloneOpensItsDevice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		opened := 0
		p := NewProtocolRW(t.Context(), b, b, func(p Protocol, dev uint32) {
			<-time.After(time.Second)
			NewFromProtocol(dev, func(*DevInfo) storage.StorageProvider {
				<-time.After(time.Second)
				opened++
				return sources.NewMemoryStorage(512)
			}, p)
		})
		ended := handle(t, p)
		hangUp(a, frame(1, 1, checkedInfo(512, 512)))
		require.ErrorIs(t, <-ended, io.EOF)
		require.Equal(t, 1, opened)
	})
}

// Nothing is waited for that cannot come, and nothing that does not move.
func TestAPeerThatHungUpIsNotServedForEver(t *testing.T) {
	for name, v := range map[string]struct {
		newDevice func(p Protocol, dev uint32)
		takes     time.Duration
	}{
		"nobody takes it":            {func(Protocol, uint32) {}, 0},
		"somebody is told and stays": {func(p Protocol, _ uint32) { <-p.Done() }, drainTime},
		"a factory that stays": {func(p Protocol, dev uint32) {
			NewFromProtocol(dev, func(*DevInfo) storage.StorageProvider { <-p.Done(); return nil }, p)
		}, drainTime},
		"a store that stays": {func(p Protocol, dev uint32) {
			NewFromProtocol(dev, keep(stuckStore{sources.NewMemoryStorage(4 * 512), p.Done()}), p)
		}, drainTime},
		"a factory that refuses": {func(p Protocol, dev uint32) {
			made := make(chan struct{})
			var from *FromProtocol
			from = NewFromProtocol(dev, func(*DevInfo) storage.StorageProvider {
				<-made
				from.Refuse("no")
				return nil
			}, p)
			close(made)
		}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := net.Pipe()
				p := NewProtocolRW(t.Context(), b, b, v.newDevice)
				ended := handle(t, p)
				began := time.Now()
				hangUp(a, farewell(4))
				require.Error(t, <-ended)
				require.InDelta(t, v.takes, time.Since(began), float64(100*time.Millisecond))
				require.NoError(t, p.Close())
				require.Zero(t, p.Stats().Received)
			})
		})
	}
}

type stuckStore struct {
	*sources.MemoryStorage
	until <-chan struct{}
}

func (s stuckStore) WriteAt([]byte, int64) (int, error) {
	<-s.until
	return 0, errors.New("stuck")
}

// brokenPipe gives what was sent before the peer went, and takes no write.
type brokenPipe struct {
	io.Reader
	err    error
	writes atomic.Int32
}

func (b *brokenPipe) Write([]byte) (int, error) {
	b.writes.Add(1)
	return 0, b.err
}

// A peer that has gone is noticed by a write, perhaps before its last words were
// read: they are, and are done.
func TestAFailedWriteDoesNotLoseThePeersLastWords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 20
		r, w := io.Pipe()
		conn := &brokenPipe{Reader: r, err: &net.OpError{Op: "write", Err: syscall.EPIPE}}
		store := &slowStore{MemoryStorage: sources.NewMemoryStorage(n * 512)}
		p := NewProtocolRW(t.Context(), conn, conn, func(p Protocol, dev uint32) { NewFromProtocol(dev, keep(store), p) })
		ended := handle(t, p)
		for _, part := range frames(t, farewell(n)) {
			_, err := w.Write(frame(part.dev, part.id, part.body))
			require.NoError(t, err)
			<-time.After(50 * time.Millisecond) // each is read, and its answer fails
		}
		require.NoError(t, w.Close())
		require.ErrorIs(t, <-ended, io.EOF)
		require.EqualValues(t, n, store.writes.Load())
		require.EqualValues(t, 1, store.hears.Load())
		require.EqualValues(t, 1, conn.writes.Load(), "once is enough")
	})
}

// If there are no last words, the connection ends a moment later, with what the
// write said; at once if nothing of the peer's is to be done, or the write says
// something else.
func TestAFailedWriteEndsTheConnection(t *testing.T) {
	broken := errors.New("broken")
	for name, v := range map[string]struct {
		err    error
		comes  []byte
		within time.Duration
	}{
		"the peer went":    {syscall.EPIPE, frame(1, 1, checkedInfo(512, 512)), drainTime},
		"a device of ours": {syscall.EPIPE, nil, 0},
		"something else":   {broken, frame(1, 1, checkedInfo(512, 512)), 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, w := io.Pipe()
				conn := &brokenPipe{Reader: r, err: v.err}
				p := NewProtocolRW(t.Context(), conn, conn, func(p Protocol, dev uint32) {
					if dev == 1 {
						NewFromProtocol(dev, keep(sources.NewMemoryStorage(512)), p)
					}
				})
				ended := handle(t, p)
				began := time.Now()
				if v.comes == nil {
					require.ErrorIs(t, NewToProtocol(512, 2, p).SendDevInfoExt(&DevInfo{Extension: &wire.Extension{Revision: wire.Revision}}), v.err)
				} else {
					_, err := w.Write(v.comes)
					require.NoError(t, err)
				}
				<-p.Done()
				require.ErrorIs(t, p.Err(), v.err)
				require.Equal(t, v.within, time.Since(began))
				_ = w.Close()
				require.ErrorIs(t, <-ended, v.err)
			})
		})
	}
}
