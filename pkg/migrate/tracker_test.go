package migrate

import (
	"context"
	"errors"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// lateWrites is a disk whose writes reach it when they are let go.
type lateWrites struct {
	storage.StorageProvider
	begun, letGo chan struct{}
	err          error
}

func (l *lateWrites) WriteAt(p []byte, off int64) (int, error) {
	l.begun <- struct{}{}
	<-l.letGo
	if l.err != nil {
		return 0, l.err
	}
	return l.StorageProvider.WriteAt(p, off)
}

func lateTracker(t *testing.T, err error) (*Tracker, *lateWrites) {
	late := &lateWrites{StorageProvider: sources.NewMemoryStorage(64 << 10), begun: make(chan struct{}), letGo: make(chan struct{}), err: err}
	return newTracker(t, late), late
}

// Trap M1, in full: the mark was set before the write, and cleared by a sender
// who read the block before the write had reached the disk.
func TestWriteThatLandsAfterTheReadIsDirty(t *testing.T) {
	for _, tracked := range []bool{true, false} { // also one that began before the migration did
		for _, fails := range []error{nil, errors.New("no")} {
			synctest.Test(t, func(t *testing.T) {
				tr, late := lateTracker(t, fails)
				geo := geometry{size: 64 << 10, blockSize: 4096, blocks: 16}
				var d *dirt
				if tracked {
					d = tr.track(geo)
				}
				done := make(chan error)
				go func() { _, err := tr.WriteAt(make([]byte, 10), 5000); done <- err }()
				<-late.begun
				if tracked {
					require.True(t, d.get(1), "marked before the write")
				}
				d = tr.track(geo)
				d.clear(1) // and the sender reads
				require.False(t, d.get(1))
				close(late.letGo)
				require.Equal(t, fails, <-done)
				require.True(t, d.get(1), "a failed write, too, may have changed something")
				require.EqualValues(t, 1, d.count.Load())
			})
		}
	}
}

// Trap M2: a write that was let in is waited for, whenever it began.
func TestHoldWaitsForWritesInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr, late := lateTracker(t, nil)
		wrote := make(chan error, 1)
		go func() { _, err := tr.WriteAt(make([]byte, 10), 0); wrote <- err }()
		<-late.begun
		held := make(chan error, 1)
		go func() { held <- tr.hold(t.Context()) }()
		synctest.Wait()
		require.Empty(t, held)
		second := make(chan error, 1)
		go func() { second <- tr.ZeroAtContext(t.Context(), 4096, 4096, true) }()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, tr.TrimAtContext(ctx, 0, 4096), context.DeadlineExceeded)
		close(late.letGo)
		require.NoError(t, <-wrote)
		require.NoError(t, <-held)
		_, err := tr.ReadAt(make([]byte, 1), 0)
		require.NoError(t, err, "reads go on")
		require.Empty(t, second)
		go func() { <-late.begun }()
		tr.release()
		require.NoError(t, <-second)

		require.NoError(t, tr.hold(t.Context()))
		go func() { second <- tr.TrimAtContext(t.Context(), 0, 4096) }()
		synctest.Wait()
		tr.give(Device{1})
		tr.release() // is too late
		require.ErrorIs(t, <-second, syscall.ESHUTDOWN)
		for _, err := range []error{tr.Sync(), tr.ZeroAtContext(t.Context(), 0, 1, false), tr.TrimAtContext(t.Context(), 0, 1)} {
			require.ErrorIs(t, err, ErrHandedOff)
		}
		_, err = tr.ReadAt(make([]byte, 1), 0)
		require.ErrorIs(t, err, ErrHandedOff)
		_, err = tr.WriteAt(make([]byte, 1), 0)
		require.ErrorIs(t, err, ErrHandedOff)
	})
}

func TestHotBlocksAreTold(t *testing.T) {
	d := newDirt(geometry{size: 64 << 10, blockSize: 4096, blocks: 16})
	d.mark(0, 1)
	d.age()
	d.mark(4096, 4097)
	require.Equal(t, []int{1, 2, 2, 0}, []int{d.heat(0), d.heat(1), d.heat(2), d.heat(3)})
	d.age()
	d.age()
	require.Equal(t, 0, d.heat(1))
	require.EqualValues(t, 3*4096, d.bytes())
	d.markAll()
	require.EqualValues(t, 64<<10, d.bytes())
	d.mark(64<<10, 1)
	d.mark(-1, 5)
	require.EqualValues(t, 64<<10, d.bytes())
}

// What nobody measures costs nothing that counts.
func BenchmarkTrackerWrite(b *testing.B) {
	tr, err := NewTracker(nothing{}, TrackerOptions{})
	require.NoError(b, err)
	p := make([]byte, 4096)
	for b.Loop() {
		_, _ = tr.WriteAtContext(b.Context(), p, 0)
	}
}

type nothing struct{ storage.StorageProvider }

func (nothing) Size() uint64                             { return 1 << 20 }
func (nothing) WriteAt(p []byte, off int64) (int, error) { return len(p), nil }
