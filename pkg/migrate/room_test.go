package migrate

import (
	"bytes"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/internal/faultdev"
	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/protocol"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// syncBuffer is a log that may be read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) count(text string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Count(s.b.String(), text)
}

// TestFullDestinationWaitsForRoom is trap L12 from end to end.
func TestFullDestinationWaitsForRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 64 << 20
		store, want := testDisk(t, size, 1)
		var srcLog, dstLog syncBuffer
		src := newSource(t, SourceOptions{Rate: 8 << 20, Listening: true, Log: slog.New(slog.NewTextHandler(&srcLog, nil))}, SourceDisk{Name: "disk", Store: store})
		var full atomic.Bool
		var wrote atomic.Int64
		dst := newDestination(t, DestinationOptions{Disks: 1, Log: slog.New(slog.NewTextHandler(&dstLog, nil))}, func(n string, s uint64) storage.StorageProvider {
			return faultdev.New(memory(n, s), func(op faultdev.Op) error {
				if full.Load() && (op.Kind == faultdev.Write || op.Kind == faultdev.Zero && !op.Punch) {
					return syscall.ENOSPC
				}
				if op.Kind == faultdev.Write {
					wrote.Add(op.Len)
				}
				return nil
			})
		})
		m := migrate(t, src, dst, newWires())
		dev := <-m.dst.ready
		_, err := dev.WriteAt([]byte("before"), size-512)
		require.NoError(t, err)
		copy(want[size-512:], "before")
		<-time.After(time.Second)
		full.Store(true)
		local, sent := dev.Stats().BytesLocal, src.Status()[0].BytesSent
		<-time.After(10*time.Minute + time.Second)

		require.LessOrEqual(t, dev.Stats().BytesLocal, local+size/2, "only holes found a place")
		require.Less(t, src.Status()[0].BytesSent-sent, int64(48<<20), "little is sent in vain: a window, and a block now and then")
		require.InDelta(t, 11, dstLog.count("no room: the migration waits"), 1, "a line a minute")
		require.InDelta(t, 11, srcLog.count("the destination has no room"), 1)
		require.Equal(t, 1, dstLog.count("bytes_needed_at_most=")/dstLog.count("no room: the migration waits"))
		require.ErrorIs(t, src.Status()[0].Err, ErrFull)
		require.ErrorIs(t, src.NoRoom(), ErrFull)
		require.ErrorContains(t, src.NoRoom(), "disk \"disk\", for 10m")
		require.ErrorIs(t, dst.Status()[0].Err, syscall.ENOSPC)
		_, err = dev.WriteAt([]byte("refused"), size-1024)
		require.ErrorIs(t, err, syscall.ENOSPC)
		got := make([]byte, 6)
		_, err = dev.ReadAt(got, size-512)
		require.NoError(t, err)
		require.Equal(t, "before", string(got))

		m.wires.cut() // a broken connection does not make an end of it
		<-time.After(time.Minute)
		var read atomic.Bool
		reader := make(chan error, 1)
		go func() { // somebody waits for a block that has no room
			_, err := dev.ReadAt(make([]byte, 512), size-1<<20)
			read.Store(true)
			reader <- err
		}()
		<-time.After(time.Minute)
		require.False(t, read.Load())
		synctest.Wait() // no write is between its refusal and the word of it
		full.Store(false)
		freed := time.Now()
		require.NoError(t, <-reader)
		require.LessOrEqual(t, time.Since(freed), maxRoomPause+time.Second)
		require.Equal(t, []error{nil, nil}, m.end())
		require.Less(t, time.Since(freed), maxRoomPause+10*time.Second)
		require.True(t, bytes.Equal(want, contents(t, dst.disks["disk"])))
		require.Equal(t, 1, dstLog.count("there is room again"))
		require.NoError(t, dst.Status()[0].Err)
		require.NoError(t, src.NoRoom())
		require.NoError(t, dst.Close())
	})
}

// A sync that finds no room has lost what it did not write: no room mends that.
func TestSyncWithoutRoomIsFinal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _ := testDisk(t, 1<<20, 1)
		src := newSource(t, SourceOptions{Listening: true, Rate: 100 << 10}, SourceDisk{Name: "disk", Store: store})
		dst := newDestination(t, DestinationOptions{Disks: 1}, func(n string, s uint64) storage.StorageProvider {
			return faultdev.New(memory(n, s), func(op faultdev.Op) error {
				if op.Kind == faultdev.Flush {
					return syscall.ENOSPC
				}
				return nil
			})
		})
		m := migrate(t, src, dst, newWires())
		dev := <-m.dst.ready
		require.ErrorIs(t, dev.Sync(), syscall.ENOSPC)
		_, err := dev.WriteAt(make([]byte, 512), 0)
		require.False(t, lazy.NoRoom(err))
		var disk *DiskError
		require.ErrorAs(t, <-m.errs, &disk)
		m.stop()
		<-m.errs
		m.wg.Wait()
		require.Error(t, dst.Close())
	})
}

func TestOrderSendsOneBlockNowAndThenToAFullDestination(t *testing.T) {
	o := testOrder(t, 64)
	now := time.Unix(1000, 0)
	o.release(now)
	first, _, _ := o.takeNext(8)
	second, _, _ := o.takeNext(8)
	o.noRoom(second, now)
	o.noRoom(first, now)
	_, none := o.full()
	require.True(t, none)
	require.EqualValues(t, 64, o.unsettled())
	require.Empty(t, takeAll(o, 8))
	require.Equal(t, firstRoomPause, o.release(now))
	o.ask(40*4096, 2*4096)
	require.Equal(t, []span{{40, 42}}, takeAll(o, 8), "who waits may try")
	o.noRoom(span{40, 42}, now.Add(time.Second/2))
	require.Empty(t, takeAll(o, 8), "and comes first when one is due, or when he asks again")

	for _, pause := range []time.Duration{firstRoomPause + time.Second/2, 2 * firstRoomPause, maxRoomPause, maxRoomPause, maxRoomPause} {
		require.Positive(t, o.release(now.Add(pause-1)))
		require.Empty(t, takeAll(o, 8))
		now = now.Add(pause)
		require.Zero(t, o.release(now))
		require.Equal(t, []span{{40, 41}}, takeAll(o, 8))
		require.Zero(t, o.release(now.Add(time.Hour)), "one at a time")
		require.Empty(t, takeAll(o, 8))
		o.noRoom(span{40, 41}, now)
	}
	o.release(now.Add(maxRoomPause))
	require.Equal(t, []span{{40, 41}}, takeAll(o, 8))
	o.done(span{40, 41})
	_, none = o.full()
	require.False(t, none)
	rest := takeAll(o, 8)
	require.Equal(t, span{41, 49}, rest[0])
	require.Contains(t, rest, span{0, 8})
}

// A block is asked for while it is on its way, and comes to a full disk just
// before somebody there waits for it: he does not ask again.
func TestWhatWasAskedForOnItsWayToAFullDiskGoesFirst(t *testing.T) {
	o := testOrder(t, 64)
	now := time.Now()
	s, _, _ := o.takeNext(4)
	require.Equal(t, span{0, 4}, s)
	o.ask(2*4096, 4096)
	o.noRoom(s, now)
	require.Empty(t, takeAll(o, 8))
	require.Equal(t, firstRoomPause, o.release(now))
	require.Zero(t, o.release(now.Add(firstRoomPause)))
	b, hint, ok := o.peekBulk()
	require.True(t, ok)
	require.True(t, hint, "neither the rate nor a pause holds it")
	require.EqualValues(t, 2, b)
}

func TestBlockThatIsNotNeededDoesNotComeBackForWantOfRoom(t *testing.T) {
	o := testOrder(t, 4)
	s, _, _ := o.takeNext(4)
	o.drop(0, 2*4096)
	o.noRoom(s, time.Now())
	require.EqualValues(t, 2, o.unsettled())
	o.drop(0, 4*4096)
	require.True(t, o.settled())
}

func TestPlainSourceOfAFullDestinationIsNotWaitedFor(t *testing.T) {
	d := &destDisk{plain: true, log: logger(nil)}
	var err error
	d.geo, err = newGeometry(1<<20, 4096)
	require.NoError(t, err)
	err = d.refuse(0, 4096, syscall.ENOSPC)
	require.NotErrorIs(t, err, protocol.ErrNoRoom, "it counts what was refused as done")
	require.ErrorIs(t, d.refusal(), syscall.ENOSPC)
}
