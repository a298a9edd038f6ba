package protocol

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// script is a store that writes down what it is told, and waits for a step
// before each write returns.
type script struct {
	*sources.MemoryStorage
	step chan struct{}

	mu      sync.Mutex
	log     []string
	answer  func(error)
	failing error
}

func newScript(size int) *script {
	return &script{MemoryStorage: sources.NewMemoryStorage(size), step: make(chan struct{}, 100)}
}

func (s *script) note(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = append(s.log, fmt.Sprintf(format, args...))
}

func (s *script) lines() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.log)
}

func (s *script) WriteAt(p []byte, off int64) (int, error) {
	s.note("write %d", off)
	<-s.step
	if s.failing != nil {
		return 0, s.failing
	}
	n, err := s.MemoryStorage.WriteAt(p, off)
	s.note("written %d", off)
	return n, err
}

func (s *script) HandleEvent(ev *wire.Event, answer func(error)) {
	s.note("event %s", ev.Type)
	s.answer = answer
}

func (s *script) HandleDirtyList(blockSize uint32, blocks []uint32) error {
	s.note("dirty %d %v", blockSize, blocks)
	<-s.step
	return s.failing
}

func (s *script) HandleHashes(hashes []wire.Hash) error {
	s.note("hashes %d", len(hashes))
	return s.failing
}

func (s *script) HandleRemoveDev() { s.note("remove") }

// Events and lists of a device come in order, after the writes before them and
// before those behind them.
func TestEventsAndListsAreBarriers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScript(1 << 20)
		raw, _, _ := destination(t, s)
		raw.mustSend(1, 1, devInfo(1<<20, 512))
		raw.mustSend(1, 2, writeAt(0, fill(512, 1)))
		synctest.Wait()
		raw.mustSend(1, 3, writeAt(512, fill(512, 1)))
		raw.mustSend(1, 4, cat([]byte{5}, le32(512), le32(2), le32(0), le32(1)))
		raw.mustSend(1, 5, cat([]byte{8}, le32(7), fill(32, 0)))
		raw.mustSend(1, 6, []byte{7, 2})
		raw.mustSend(1, 7, writeAt(1024, fill(512, 1)))
		raw.mustSend(1, 8, []byte{0x0a})
		synctest.Wait()
		require.Equal(t, []string{"write 0", "write 512"}, s.lines(), "writes run at once, the list waits")
		s.step <- struct{}{}
		synctest.Wait()
		require.Len(t, s.lines(), 3, "one write is still running")
		require.NotContains(t, s.lines(), "dirty 512 [0 1]")
		s.step <- struct{}{}
		synctest.Wait()
		require.Equal(t, "dirty 512 [0 1]", s.lines()[4], "nothing passes the list")
		require.Len(t, s.lines(), 5)
		require.ElementsMatch(t, []uint32{2, 3}, []uint32{raw.next().id, raw.next().id})
		require.Empty(t, raw.got)
		s.step <- struct{}{}
		raw.expect(1, 4, []byte{0x87})
		raw.expect(1, 5, []byte{0x86})
		synctest.Wait()
		require.Equal(t, []string{"hashes 1", "event PreUnlock", "write 1024"}, s.lines()[5:],
			"a write starts when the handler has returned, also before the event is answered")
		require.Empty(t, raw.got)
		s.answer(nil)
		raw.expect(1, 6, []byte{0x85})
		s.answer(errors.New("a second answer counts for nothing"))
		s.step <- struct{}{}
		raw.expect(1, 7, written(512))
		synctest.Wait()
		require.Equal(t, "remove", s.lines()[len(s.lines())-1])
	})
}

// A store that cannot write is answered for, and the connection lives; one that
// cannot act on an event or a list ends it, since the protocol has no other no.
func TestAFailingStore(t *testing.T) {
	broken := errors.New("broken disk")
	synctest.Test(t, func(t *testing.T) {
		s := newScript(4096)
		s.failing = broken
		s.step <- struct{}{}
		raw, p, _ := destination(t, s)
		raw.mustSend(1, 1, devInfo(4096, 512))
		raw.mustSend(1, 2, writeAt(0, fill(512, 1)))
		raw.expect(1, 2, []byte{0x84})
		s.step <- struct{}{}
		raw.mustSend(1, 3, cat([]byte{2, 2}, le64(0), []byte{0x09, 7})) // a run of sevens
		raw.expect(1, 3, []byte{0x84})
		require.NoError(t, p.Err())
		raw.mustSend(1, 4, []byte{7, 4})
		synctest.Wait()
		s.answer(broken)
		require.ErrorIs(t, p.Err(), broken)
		require.ErrorContains(t, p.Err(), "Completed")
	})
	for name, body := range map[string][]byte{"DirtyList": cat([]byte{5}, le32(512), le32(0)), "Hashes": {8}} {
		synctest.Test(t, func(t *testing.T) {
			s := newScript(4096)
			s.failing = broken
			s.step <- struct{}{}
			raw, p, ended := destination(t, s)
			raw.mustSend(1, 1, devInfo(4096, 512))
			raw.mustSend(1, 2, body)
			require.ErrorIs(t, <-ended, broken)
			require.ErrorContains(t, p.Err(), name)
		})
	}
}

// Urgent packets go before bulk ones that have waited longer.
func TestUrgentGoesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe() // nobody reads yet
		p := NewProtocolRW(t.Context(), b, b, nil)
		handle(t, p)
		to := NewToProtocol(1<<20, 1, p)
		var wg sync.WaitGroup
		start := func(f func() error) {
			wg.Go(func() {
				if err := f(); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait() // it has its place in the queue
		}
		start(func() error { return to.SendDevInfo("d", 512, "") })
		for i := range int64(3) {
			start(func() error { return to.StartWrite(PriorityBulk, fill(512, 0), i*512, ignored{}) })
		}
		start(func() error { return to.StartWrite(PriorityUrgent, fill(512, 0), 4096, ignored{}) })
		start(func() error { return to.StartZero(PriorityUrgent, 8192, 512, ignored{}) })
		raw := newRawPeer(t, a)
		wg.Wait()
		var offs []byte
		require.Equal(t, byte(6), raw.next().body[0])
		for range 5 {
			offs = append(offs, raw.next().body[3]) // off / 256
		}
		require.Equal(t, []byte{16, 32, 0, 2, 4}, offs)
		_ = a.Close()
	})
}

// A block that is on its way as bulk data may be the one that somebody waits for
// by now. However much goes before it, it arrives, after a bounded number of
// urgent packets.
func TestABulkPacketIsNotOvertakenForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		p := NewProtocolRW(t.Context(), b, b, nil)
		handle(t, p)
		to := NewToProtocol(1<<20, 1, p)
		var stop atomic.Bool
		var wg sync.WaitGroup
		raw := &rawPeer{t: t, conn: a, got: make(chan packet)} // takes one packet at a time
		go raw.readLoop()
		defer func() {
			stop.Store(true)
			_ = a.Close()
			wg.Wait()
			for range raw.got { // what was on its way
			}
		}()
		wg.Go(func() {
			if err := to.SendDevInfo("d", 512, ""); err != nil {
				t.Error(err)
			}
		})
		raw.next()
		synctest.Wait()
		send := func(pri Priority, off int64) {
			for !stop.Load() && to.StartWrite(pri, fill(512, 0), off, ignored{}) == nil && pri == PriorityUrgent {
			}
		}
		for range 3 { // of three disks with demand, two wait whenever one has the socket
			wg.Go(func() { send(PriorityUrgent, 0) })
			synctest.Wait()
		}
		wg.Go(func() { send(PriorityBulk, 4096) })
		wg.Go(func() { send(PriorityBulk, 4096) })
		synctest.Wait()
		var ahead []int
		for n := 0; len(ahead) < 2; n++ {
			require.LessOrEqual(t, n, 2*maxUrgentRun, "a bulk packet waits while as many urgent ones have gone")
			synctest.Wait() // everybody who wants the socket waits for it
			if raw.next().body[3] != 0 {
				ahead = append(ahead, n)
				n = -1
			}
		}
		require.Greater(t, ahead[0], maxUrgentRun/2, "and urgent ones do go first")
		require.Equal(t, maxUrgentRun, ahead[1])
	})
}

// countingConn counts the writes of a connection.
type countingConn struct {
	net.Conn
	mu     sync.Mutex
	writes int
}

func (c *countingConn) Write(b []byte) (int, error) {
	c.mu.Lock()
	c.writes++
	c.mu.Unlock()
	return c.Conn.Write(b)
}

// Answers that come while the socket is busy go out together.
func TestAnswersAreBatched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		conn := &countingConn{Conn: b}
		p := NewProtocolRW(t.Context(), conn, conn, nil)
		handle(t, p)
		from := NewFromProtocol(1, keep(sources.NewMemoryStorage(1<<20)), p)
		_, err := a.Write(frame(1, 1, devInfo(1<<20, 512)))
		require.NoError(t, err)
		synctest.Wait()
		var wg sync.WaitGroup
		for i := range int64(1000) { // nobody reads: the first is written, the others gather
			wg.Go(func() { _ = from.NeedAt(i*512, 512) })
		}
		synctest.Wait()
		raw := newRawPeer(t, a)
		wg.Wait()
		for range 1000 {
			require.Equal(t, byte(3), raw.next().body[0])
		}
		conn.mu.Lock()
		require.Equal(t, 2, conn.writes)
		conn.mu.Unlock()
		_ = a.Close()
	})
}

// Answers that nobody reads do not pile up: those who answer wait.
func TestTheOutboxIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		p := NewProtocolRW(t.Context(), b, b, nil)
		handle(t, p)
		from := NewFromProtocol(1, keep(sources.NewMemoryStorage(1<<20)), p)
		_, err := a.Write(frame(1, 1, devInfo(1<<20, 512)))
		require.NoError(t, err)
		synctest.Wait()
		errs := make(chan error, 10_000)
		for range cap(errs) {
			go func() { errs <- from.NeedAt(0, 512) }()
		}
		synctest.Wait()
		p.outbox.mu.Lock()
		require.Less(t, len(p.outbox.buf), maxOutbox+64)
		p.outbox.mu.Unlock()
		require.Less(t, len(errs), maxOutbox/25+2)
		require.NoError(t, p.Close())
		failed := 0
		for range cap(errs) {
			if err := <-errs; err != nil {
				require.ErrorIs(t, err, ErrClosed)
				failed++
			}
		}
		require.Positive(t, failed)
		_ = a.Close()
	})
}
