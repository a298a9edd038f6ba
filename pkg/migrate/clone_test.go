package migrate

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// cloning is a Cloner at work.
type cloning struct {
	*Cloner
	calls *calls
	done  chan error
	stop  context.CancelFunc
	wg    sync.WaitGroup
}

func clone(t *testing.T, opts SourceOptions, disks ...SourceDisk) *cloning {
	t.Helper()
	c, err := NewCloner(disks, opts)
	require.NoError(t, err)
	ctx, stop := context.WithCancel(t.Context())
	all := &cloning{Cloner: c, done: make(chan error, 1), stop: stop}
	all.calls = newCalls(ctx, &all.wg)
	all.wg.Go(func() { all.done <- c.Run(ctx, from(all.calls.conns)) })
	return all
}

func (c *cloning) end(t *testing.T) {
	c.stop()
	require.ErrorIs(t, <-c.done, context.Canceled)
	c.wg.Wait()
}

func goldenImage(t *testing.T, size int) (SourceDisk, []byte) {
	store, data := testDisk(t, size, 5)
	return SourceDisk{Name: "disk", Store: store, Identity: Identity{UUID: [16]byte{9}, Generation: 1}}, data
}

// TestCloneGoesToManyAtOnce: each owns its copy, and one that stands still holds up no
// other. The source does not end, and knows how many are complete.
func TestCloneGoesToManyAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk, want := goldenImage(t, 1<<20)
		c := clone(t, SourceOptions{BlockSize: 4096}, disk)
		goOn := make(chan struct{})
		stuck := newDestination(t, DestinationOptions{Disks: 1}, func(n string, s uint64) storage.StorageProvider {
			return standsStill{memory(n, s), 0, goOn}
		})
		stuckEnd := c.calls.move(t, stuck)
		<-stuck.ready
		var all []*destination
		var ends []chan error
		for range 5 {
			d := newDestination(t, DestinationOptions{Disks: 1}, memory)
			all, ends = append(all, d), append(ends, c.calls.move(t, d))
		}
		for i, d := range all {
			require.NoError(t, <-ends[i])
			dev := <-d.ready
			require.True(t, isLive(dev))
			_, err := dev.WriteAt([]byte(fmt.Sprintf("copy %d", i)), 512)
			require.NoError(t, err)
			own := bytes.Clone(want)
			copy(own[512:], fmt.Sprintf("copy %d", i))
			require.True(t, bytes.Equal(own, contents(t, d.disks["disk"])))
			require.NoError(t, d.Close())
		}
		synctest.Wait()
		require.Equal(t, Copies{Complete: 5, UnderWay: 1, Unfinished: 1}, c.Copies())
		require.Equal(t, StateMigrating, c.Status()[0].State)
		close(goOn)
		require.NoError(t, <-stuckEnd)
		require.NoError(t, stuck.Close())
		synctest.Wait()
		require.Equal(t, Copies{Complete: 6}, c.Copies())
		require.Equal(t, StateWaiting, c.Status()[0].State)
		require.Empty(t, c.done, "it serves on")
		c.end(t)
	})
}

// TestCopyThatConnectsAgainGoesOn with what it lacks, and is counted once.
func TestCopyThatConnectsAgainGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 4 << 20
		disk, want := goldenImage(t, size)
		c := clone(t, SourceOptions{BlockSize: 4096, Rate: 512 << 10}, disk)
		d := newDestination(t, DestinationOptions{Disks: 1}, memory)
		done := make(chan error, 1)
		conns := make(chan io.ReadWriteCloser)
		c.wg.Go(func() { done <- d.Run(t.Context(), from(conns)) })
		for range 3 {
			conn := c.calls.call(t)
			conns <- conn
			<-time.After(time.Second)
			require.Equal(t, Copies{UnderWay: 1, Unfinished: 1}, c.Copies())
			require.NoError(t, conn.Close())
			synctest.Wait()
			require.Equal(t, Copies{Unfinished: 1}, c.Copies())
		}
		c.SetRate(0)
		conns <- c.calls.call(t)
		require.NoError(t, <-done)
		synctest.Wait()
		require.Equal(t, Copies{Complete: 1}, c.Copies())
		require.True(t, bytes.Equal(want, contents(t, d.disks["disk"])))
		require.Less(t, c.Status()[0].BytesSent, int64(size), "nothing went twice: a quarter is zero")
		require.NoError(t, d.Close())
		c.end(t)
	})
}

// TestCopiesShareOneRate, and evenly.
func TestCopiesShareOneRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk, _ := goldenImage(t, 32<<20)
		c := clone(t, SourceOptions{Rate: 4 << 20}, disk)
		var all []*destination
		for range 4 {
			d := newDestination(t, DestinationOptions{Disks: 1}, memory)
			all = append(all, d)
			c.calls.move(t, d)
		}
		<-time.After(6 * time.Second) // before the zeroes, which cost nothing
		least, most := int64(1<<62), int64(0)
		for _, d := range all {
			n := d.Status()[0].BytesReceived
			least, most = min(least, n), max(most, n)
		}
		require.InDelta(t, 24<<20, c.Status()[0].BytesSent, 2<<20)
		require.Less(t, float64(most), 1.3*float64(least), "from %d to %d", least, most)
		c.end(t)
		for _, d := range all {
			require.NoError(t, d.Close())
		}
	})
}

// TestCloneThatIsWrittenEnds for all of its copies (rule 3).
func TestCloneThatIsWrittenEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk, _ := goldenImage(t, 4<<20)
		var written atomic.Bool
		disk.Changed = func() error {
			if written.Load() {
				return errWritten
			}
			return nil
		}
		c := clone(t, SourceOptions{Rate: 1 << 20}, disk)
		d, e := newDestination(t, DestinationOptions{Disks: 1}, memory), newDestination(t, DestinationOptions{Disks: 1}, memory)
		ends := []chan error{c.calls.move(t, d), c.calls.move(t, e)}
		<-time.After(time.Second)
		written.Store(true)
		require.ErrorIs(t, <-c.done, errWritten)
		c.stop()
		for _, end := range ends {
			require.Error(t, <-end)
		}
		require.Zero(t, c.Copies().Complete)
		c.wg.Wait()
		require.NoError(t, d.Close())
		require.NoError(t, e.Close())
	})
}

// TestStrangersKeepNoCopyOut: connections that say nothing, however many (trap R3).
func TestStrangersKeepNoCopyOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk, _ := goldenImage(t, 1<<20)
		c := clone(t, SourceOptions{MaxCallers: 4}, disk)
		for range 10 {
			conn := c.calls.call(t)
			c.wg.Go(func() { _, _ = io.Copy(io.Discard, conn) })
		}
		d := newDestination(t, DestinationOptions{Disks: 1}, memory)
		began := time.Now()
		require.NoError(t, <-c.calls.move(t, d))
		require.Less(t, time.Since(began), 5*time.Second)
		require.NoError(t, d.Close())
		c.end(t)
	})
}

func TestDiskInUseIsNotCloned(t *testing.T) {
	disk, _ := goldenImage(t, 4096)
	_, err := NewCloner([]SourceDisk{{Name: "disk", Live: newTracker(t, disk.Store)}}, SourceOptions{})
	require.ErrorContains(t, err, "in use")
}
