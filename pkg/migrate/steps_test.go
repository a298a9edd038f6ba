package migrate

import (
	"errors"
	"io"
	"log/slog"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// busyLedger sees the disk written while it prepares, which takes its time, and can
// forget to note what comes after the handoff, as a process that is killed does.
type busyLedger struct {
	noLedger
	preparing func()
	killed    bool // once the disks were handed off nothing more is noted
	gone      bool
}

var errKilled = errors.New("the process has been killed")

func (l *busyLedger) Prepare(to map[string]Owner) error {
	l.preparing()
	return l.noLedger.Prepare(to)
}

func (l *busyLedger) HandOff() error {
	l.gone = l.killed
	return l.noLedger.HandOff()
}

func (l *busyLedger) Confirm(disk string, o Owner) error {
	if l.gone {
		return errKilled
	}
	return l.noLedger.Confirm(disk, o)
}

func (l *busyLedger) Taken() error {
	if l.gone {
		return errKilled
	}
	return l.noLedger.Taken()
}

// TestAnOwnerThatWasToldOfManyBlocksInTheHoldGoesOn with a source that is started again:
// all of the disk was trimmed while the handoff was prepared, so that it took two dirty
// lists. It does not matter whether the source could note that the disk was taken
// (fault A3).
func TestAnOwnerThatWasToldOfManyBlocksInTheHoldGoesOn(t *testing.T) {
	for name, killed := range map[string]bool{"taken is noted": false, "killed before": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { manyBlocksInTheHold(t, killed) })
		})
	}
}

func manyBlocksInTheHold(t *testing.T, killed bool) {
	const size = (maxListed + 1) * 512
	store := sources.NewMemoryStorage(size)
	tr := newTracker(t, store)
	ledger := &busyLedger{killed: killed, preparing: func() {
		tr.dirt.Load().mark(0, size) // as of a write, or a trim, of all of it
	}}
	opts := SourceOptions{BlockSize: 512, Listening: true, Ledger: ledger, Log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	src := newSource(t, opts, SourceDisk{Name: "disk", Live: tr, Identity: testID})
	dst := newDestination(t, DestinationOptions{Disks: 1, Listening: true}, memory)
	w := newWires()
	m := migrate(t, src, dst, w)
	<-dst.ready
	synctest.Wait()
	// The source ends as soon as the destination has it.
	require.NoError(t, src.Handoff(t.Context()))
	device := dst.all()[0].device
	m.stop()
	m.end()
	require.NoError(t, dst.Close())

	last, _ := tr.record.get()
	owner, owned := ledger.Owner("disk")
	require.True(t, owned)
	require.EqualValues(t, device, owner.Device)
	if killed {
		require.Equal(t, uint32(3), last.Steps-owner.Steps, "two lists and PostLock")
	} else {
		require.Equal(t, last.Owner, owner)
	}
	ledger.gone = false
	next, err := NewTracker(store, TrackerOptions{HandedOff: true, Owner: owner.Device})
	require.NoError(t, err)
	again := newSource(t, opts, SourceDisk{Name: "disk", Live: next, Identity: testID})
	var told told
	told.Device, told.Live = device, true
	told.Epoch.Before, told.Epoch.Steps = last.Epoch, last.Steps
	peer, owned := again.disks[0].peer.get()
	require.True(t, owned)
	require.NoError(t, peer.owns(told), "the owner is refused")
	told.Epoch.Steps = owner.Steps - 1
	require.ErrorIs(t, peer.owns(told), errOtherState)
}
