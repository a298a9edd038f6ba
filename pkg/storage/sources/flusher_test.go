package sources

import (
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestFailedFlushStaysFailed(t *testing.T) { // D4
	path := filepath.Join(t.TempDir(), "disk")
	f := create(t, path, 4096)
	works := f.flusher.sync
	f.flusher.sync = func() error { return syscall.EIO }
	require.ErrorIs(t, f.Flush(), syscall.EIO)
	f.flusher.sync = works
	require.ErrorIs(t, f.Flush(), syscall.EIO, "no retry turns it into success")
	_, err := f.WriteAt(make([]byte, 512), 0)
	require.EqualError(t, err, path+": write of 512 bytes at 0: an earlier flush has failed: input/output error")
	require.ErrorIs(t, err, syscall.EIO)
	require.ErrorIs(t, f.ZeroAt(0, 512, true), syscall.EIO)
	require.ErrorIs(t, f.TrimAt(0, 512), syscall.EIO)
	_, err = f.ReadAt(make([]byte, 512), 0)
	require.NoError(t, err)
	require.NoError(t, f.Close())
}

func TestConcurrentFlushesShareOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var rounds atomic.Int64
		var s flusher
		s.init(func() error {
			rounds.Add(1)
			<-time.After(time.Second)
			return nil
		})
		var wg sync.WaitGroup
		wg.Go(func() { require.NoError(t, s.flush()) })
		synctest.Wait() // the first round runs: who comes now needs another
		began := time.Now()
		for range 20 {
			wg.Go(func() { require.NoError(t, s.flush()) })
		}
		wg.Wait()
		require.EqualValues(t, 2, rounds.Load())
		require.Equal(t, 2*time.Second, time.Since(began))
		require.NoError(t, s.flush())
		require.EqualValues(t, 3, rounds.Load())
	})
}

func TestFailureReachesEveryFlushThatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s flusher
		s.init(func() error {
			<-time.After(time.Second)
			return syscall.EIO
		})
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if err := s.flush(); err != syscall.EIO {
					t.Errorf("flush answered %v", err)
				}
			})
		}
		wg.Wait()
	})
}
