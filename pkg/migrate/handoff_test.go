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

// slowLedger takes its time, and looks around.
type slowLedger struct {
	noLedger
	look func()
}

func (l *slowLedger) HandOff(map[string]Device) error {
	<-time.After(time.Second)
	l.look()
	return nil
}

// While it is noted to whom the disks belong, and that is not durable yet, the
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
		looked := false
		ledger := &slowLedger{look: func() {
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
		src := newSource(t, SourceOptions{BlockSize: 4096, Rate: 256 << 10, Ledger: ledger}, SourceDisk{Name: "disk", Live: tr})
		dst = newDestination(t, DestinationOptions{}, memory)
		m := migrate(t, src, dst, newWires())
		dev := <-m.dst.ready
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		var wg sync.WaitGroup
		wg.Go(func() { w.run(t, ctx, tr, func() blockDevice { return dev }, time.Millisecond) })
		<-time.After(time.Second)
		require.NoError(t, src.Handoff(t.Context()))
		require.True(t, looked)
		require.Equal(t, []error{nil, nil}, m.end())
		stop()
		wg.Wait()
		require.True(t, bytes.Equal(w.want, contents(t, m.dst.disks["disk"])))
		require.NoError(t, m.dst.Close())
	})
}
