package migrate

import (
	"bytes"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// sent is what all disks have sent, in bytes.
func sent(s *Source) (n int64) {
	for _, d := range s.Status() {
		n += d.BytesSent
	}
	return n
}

func TestRateIsChangedWhileItRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := testDisk(t, 32<<20, 2)
		b, _ := testDisk(t, 32<<20, 3)
		src := newSource(t, SourceOptions{Rate: 1 << 20}, SourceDisk{Name: "a", Store: a}, SourceDisk{Name: "b", Store: b})
		require.EqualValues(t, 1<<20, src.Rate())
		m := migrate(t, src, newDestination(t, DestinationOptions{Disks: 2}, memory), newWires())
		within := func(d time.Duration, want int64) {
			t.Helper()
			before := sent(src)
			<-time.After(d)
			require.InDelta(t, want, sent(src)-before, 4*DefaultBlockSize, "both disks share the rate")
		}
		within(4*time.Second, 4<<20)
		src.SetRate(256 << 10)
		require.EqualValues(t, 256<<10, src.Rate())
		within(16*time.Second, 4<<20)
		src.SetRate(8 << 20)
		within(2*time.Second, 16<<20)
		src.SetRate(-1)
		require.Zero(t, src.Rate())
		begin := time.Now()
		require.Equal(t, []error{nil, nil}, m.end())
		require.Less(t, time.Since(begin), time.Second)
		require.NoError(t, m.dst.Close())
	})
}

// What is owed at a rate that was set too low is paid for at the new one.
func TestRaisedRateDoesNotWaitForTheOldOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _ := testDisk(t, 8<<20, 2)
		src := newSource(t, SourceOptions{Rate: 1}, SourceDisk{Name: "disk", Store: store})
		m := migrate(t, src, newDestination(t, DestinationOptions{}, memory), newWires())
		<-time.After(time.Minute)
		require.LessOrEqual(t, sent(src), int64(2*DefaultBlockSize))
		src.SetRate(1 << 20)
		begin := time.Now()
		require.Equal(t, []error{nil, nil}, m.end())
		require.InDelta(t, 6, time.Since(begin).Seconds(), 0.5) // a quarter of the disk is zeroes
		require.NoError(t, m.dst.Close())
	})
}

// TestPauseHoldsTheBackgroundAndNoRead: neither a short read nor one that is
// long enough to be a hint waits for the end of the pause, on this connection
// and on the next.
func TestPauseHoldsTheBackgroundAndNoRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 16 << 20
		store, want := testDisk(t, size, 2)
		src := newSource(t, SourceOptions{}, SourceDisk{Name: "disk", Store: store})
		src.Pause()
		require.True(t, src.Paused())
		w := newWires()
		m := migrate(t, src, newDestination(t, DestinationOptions{}, memory), w)
		dev := <-m.dst.ready
		<-time.After(time.Hour)
		require.Zero(t, src.Status()[0].BytesDone, "a hole is background, too")
		read := func(off, length int64) {
			t.Helper()
			buf := make([]byte, length)
			begin := time.Now()
			_, err := dev.ReadAt(buf, off)
			require.NoError(t, err)
			require.True(t, bytes.Equal(want[off:off+length], buf))
			require.Less(t, time.Since(begin), time.Millisecond)
		}
		read(5_000_000, 1000)
		read(6<<20, 4<<20)
		before := sent(src)
		<-time.After(time.Hour)
		require.Equal(t, before, sent(src))

		w.cut()
		<-time.After(time.Hour)
		require.Equal(t, before, sent(src), "paused over connections")
		read(12_000_000, 1000)

		src.Resume()
		require.False(t, src.Paused())
		begin := time.Now()
		require.Equal(t, []error{nil, nil}, m.end())
		require.Less(t, time.Since(begin), time.Second)
		require.True(t, bytes.Equal(want, contents(t, m.dst.disks["disk"])))
		require.NoError(t, m.dst.Close())
	})
}

// A pause in the middle stops what flows, and a disk of which all was asked for
// completes in a pause.
func TestPausedDiskCompletesByReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 8 << 20
		store, _ := testDisk(t, size, 2)
		src := newSource(t, SourceOptions{Rate: 1 << 20}, SourceDisk{Name: "disk", Store: store})
		m := migrate(t, src, newDestination(t, DestinationOptions{}, memory), newWires())
		dev := <-m.dst.ready
		<-time.After(2 * time.Second)
		src.Pause()
		before := sent(src)
		require.Greater(t, before, int64(1<<20))
		<-time.After(time.Hour)
		require.LessOrEqual(t, sent(src)-before, int64(DefaultBlockSize), "a packet may have been under way")
		_, err := dev.ReadAt(make([]byte, size), 0)
		require.NoError(t, err)
		require.Equal(t, []error{nil, nil}, m.end())
		require.True(t, src.Paused())
		require.NoError(t, m.dst.Close())
	})
}

// The controls may be used by anybody at any time.
func TestControlsMayBeUsedTogether(t *testing.T) {
	store, want := testDisk(t, 8<<20, 2)
	src := newSource(t, SourceOptions{BlockSize: 4096}, SourceDisk{Name: "disk", Store: store})
	m := migrate(t, src, newDestination(t, DestinationOptions{}, memory), newWires())
	var all sync.WaitGroup
	for i := range 4 {
		all.Go(func() {
			for n := range 200 {
				src.Pause()
				src.SetRate(int64(n * i << 10))
				_, _ = src.Rate(), src.Paused()
				src.Resume()
			}
		})
	}
	all.Wait()
	src.SetRate(0)
	require.Equal(t, []error{nil, nil}, m.end())
	require.True(t, bytes.Equal(want, contents(t, m.dst.disks["disk"])))
	require.NoError(t, m.dst.Close())
}

// TestRateIsSharedEvenly among the disks of one connection, also when they wait for
// nothing else (fault H18).
func TestRateIsSharedEvenly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var disks []SourceDisk
		for i := range 5 {
			store, _ := testDisk(t, 16<<20, uint64(i))
			disks = append(disks, SourceDisk{Name: string(rune('a' + i)), Store: store})
		}
		src := newSource(t, SourceOptions{Rate: 4 << 20}, disks...)
		m := migrate(t, src, newDestination(t, DestinationOptions{Disks: 5}, func(n string, s uint64) storage.StorageProvider {
			if n == "e" {
				return late{memory(n, s), 3 * time.Millisecond} // takes what comes in its own time
			}
			return memory(n, s)
		}), newWires())
		<-time.After(4 * time.Second)
		least, most := int64(1<<62), int64(0)
		for _, st := range src.Status() {
			least, most = min(least, st.BytesSent), max(most, st.BytesSent)
		}
		t.Logf("from %d to %d bytes a disk", least, most)
		require.Less(t, float64(most), 1.2*float64(least))
		m.stop()
		m.end()
		require.NoError(t, m.dst.Close())
	})
}
