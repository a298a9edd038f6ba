package migrate

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// hanging is a sync that hangs when it is told to.
type hanging struct {
	at   int // the call that hangs; 0: none
	seen int
	hung chan struct{} // closed when it does
	goOn chan struct{}
}

func newHanging(at int) *hanging {
	return &hanging{at: at, hung: make(chan struct{}), goOn: make(chan struct{})}
}

func (h *hanging) sync() {
	if h.seen++; h.seen == h.at {
		close(h.hung)
		<-h.goOn
	}
}

type hangingDisk struct {
	storage.StorageProvider
	*hanging
}

func (d hangingDisk) Flush() error {
	d.sync()
	return d.StorageProvider.Flush()
}

type hangingLedger struct {
	noLedger
	*hanging
}

func (l *hangingLedger) Prepare(to map[string]Owner) error {
	l.sync()
	return l.noLedger.Prepare(to)
}

// hangings are the syncs of a handoff that may hang: of the disk while it is written, of
// the disk while writes are held, and of the state file.
var hangings = map[string]func() (disk, ledger *hanging){
	"disk":             func() (disk, ledger *hanging) { return newHanging(1), newHanging(0) },
	"disk in the hold": func() (disk, ledger *hanging) { return newHanging(2), newHanging(0) },
	"state file":       func() (disk, ledger *hanging) { return newHanging(0), newHanging(1) },
}

// TestAHandoffWhoseSyncHangsCanBeAborted at once, and ends by itself otherwise: writes go
// on, nothing is handed off, and when the sync has ended there is a handoff (rule 7).
func TestAHandoffWhoseSyncHangsCanBeAborted(t *testing.T) {
	for name, of := range hangings {
		for _, abort := range []bool{true, false} {
			synctest.Test(t, func(t *testing.T) { syncHangs(t, name, of, abort) })
		}
	}
}

func syncHangs(t *testing.T, name string, of func() (disk, ledger *hanging), abort bool) {
	store, _ := testDisk(t, 1<<20, 1)
	disk, ledger := of()
	tr := newTracker(t, hangingDisk{store, disk})
	opts := SourceOptions{BlockSize: 4096, Listening: true, Ledger: &hangingLedger{hanging: ledger}}
	src := newSource(t, opts, SourceDisk{Name: "disk", Live: tr, Identity: testID})
	m := migrate(t, src, newDestination(t, DestinationOptions{Listening: true, Disks: 1}, memory), newWires())
	<-m.dst.ready
	synctest.Wait()
	asked := make(chan error, 1)
	m.wg.Go(func() { asked <- src.Handoff(t.Context()) })
	select {
	case <-disk.hung:
	case <-ledger.hung:
	}
	synctest.Wait()
	began := time.Now()
	if abort {
		require.NoError(t, src.AbortHandoff(), name)
		require.Zero(t, time.Since(began), name)
		require.ErrorIs(t, <-asked, errAborted, name)
	} else {
		require.Error(t, <-asked, name)
		limit := prepareLimit
		if name == "disk in the hold" {
			limit = holdLimit
		}
		require.LessOrEqual(t, time.Since(began), limit, name)
	}
	require.False(t, src.HandedOff(), name)
	_, err := tr.WriteAt(make([]byte, 4096), 0)
	require.NoError(t, err, name)

	// What hangs still is not begun once more, and the wait for it has its limit.
	err = src.Handoff(t.Context())
	require.Error(t, err, name)
	require.False(t, errors.Is(err, errAborted), name)
	require.False(t, src.HandedOff(), name)
	close(disk.goOn)
	close(ledger.goOn)
	synctest.Wait()
	require.NoError(t, src.Handoff(t.Context()), name)
	require.Equal(t, []error{nil, nil}, m.end(), name)
	require.NoError(t, m.dst.Close())
}
