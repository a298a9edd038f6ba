package migrate

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// slowFlush is a disk whose flush takes a while, and that knows what was not
// flushed.
type slowFlush struct {
	storage.StorageProvider
	unflushed atomic.Int64 // writes
}

func (s *slowFlush) WriteAt(p []byte, off int64) (int, error) {
	s.unflushed.Add(1)
	return s.StorageProvider.WriteAt(p, off)
}

func (s *slowFlush) Flush() error {
	covered := s.unflushed.Load()
	<-time.After(10 * time.Millisecond)
	s.unflushed.Add(-covered)
	return s.StorageProvider.Flush()
}

// slowDest is a destination's disk that takes long for what comes.
type slowDest struct{ storage.StorageProvider }

func (s *slowDest) WriteAt(p []byte, off int64) (int, error) {
	<-time.After(300 * time.Millisecond)
	return s.StorageProvider.WriteAt(p, off)
}

// slowLedger takes its time, and has a look around.
type slowLedger struct {
	noLedger
	first func() // when it is called
	look  func() // before it returns
}

func (l *slowLedger) HandOff() error {
	l.first()
	<-time.After(time.Second)
	l.look()
	return nil
}

// When the handoff is noted no data is in flight, which would bring old bytes
// after the list of what is old (trap M12). While it is noted to whom the disks belong, and that is not durable yet, the
// destination has been told nothing, no write is let in, and all that were
// before are on stable storage: a client that flushes at the destination relies
// on that.
func TestHandoffIsNotedBeforeAnybodyActsOnIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		memory0, data := testDisk(t, 1<<20, 1)
		store := &slowFlush{StorageProvider: memory0}
		tr := newTracker(t, store)
		w := &steadyWriter{want: bytes.Clone(data)}
		var dst *destination
		var src *Source
		looked := false
		ledger := &slowLedger{first: func() {
			if !src.disks[0].order.landed() {
				t.Error("data is in flight")
			}
		}, look: func() {
			looked = true
			if n := store.unflushed.Load(); n != 0 {
				t.Errorf("%d writes were not flushed", n)
			}
			if tr.HandedOff() || dst.Status()[0].State != StateStandby {
				t.Errorf("somebody acts on it: source %v, destination %s", tr.HandedOff(), dst.Status()[0].State)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
			defer cancel()
			if _, err := tr.WriteAtContext(ctx, make([]byte, 4096), 0); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("a write was let in: %v", err)
			}
		}}
		src = newSource(t, SourceOptions{BlockSize: 4096, Rate: 256 << 10, Ledger: ledger}, SourceDisk{Name: "disk", Live: tr})
		dst = newDestination(t, DestinationOptions{}, func(_ string, size uint64) storage.StorageProvider {
			return &slowDest{sources.NewMemoryStorage(int(size))}
		})
		var wg sync.WaitGroup
		here, there := laggyPipe(5*time.Millisecond, &wg)
		ended := make(chan error, 2)
		wg.Go(func() { ended <- src.Run(t.Context(), once(here)) })
		wg.Go(func() { ended <- dst.Run(t.Context(), once(there)) })
		dev := <-dst.ready
		wg.Go(func() {
			<-dev.Live()
			if !tr.HandedOff() {
				t.Error("the destination is live, and the source serves reads")
			}
		})
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		wg.Go(func() { w.run(t, ctx, tr, func() blockDevice { return dev }, time.Millisecond) })
		<-time.After(time.Second)
		require.NoError(t, src.Handoff(t.Context()))
		require.True(t, looked)
		require.NoError(t, <-ended)
		require.NoError(t, <-ended)
		stop()
		wg.Wait()
		require.True(t, bytes.Equal(w.want, contents(t, dst.disks["disk"])))
		require.NoError(t, dst.Close())
	})
}
