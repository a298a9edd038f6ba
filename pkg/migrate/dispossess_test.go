package migrate

import (
	"bytes"
	"errors"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// TestALiveSourceThatWasRolledBackStopsWhenItsOwnerAnswers: its host was restored to
// before the handoff, so that nothing here knows of it. What was written here since is
// lost with it; but the disk has one owner again, and that is noted (rule 6, trap I4).
func TestALiveSourceThatWasRolledBackStopsWhenItsOwnerAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _ := testDisk(t, 1<<20, 1)
		w := newWires()
		m := startMoveOver(t, w, SourceOptions{Rate: 128 << 10}, SourceDisk{Name: "disk", Live: newTracker(t, store), Identity: testID})
		h := newHost(t)
		h.start(t.Context(), from(w.dst))
		<-time.After(time.Second)
		require.NoError(t, m.src.Handoff(m.ctx))
		m.end()

		for range 2 { // also if it is rolled back once more
			tr := newTracker(t, store)
			ledger := new(noLedger)
			m = startMoveOver(t, w, SourceOptions{Ledger: ledger},
				SourceDisk{Name: "disk", Live: tr, Identity: Identity{UUID: testID.UUID, Generation: 99}})
			_, err := tr.WriteAt([]byte("a machine was started"), 0)
			require.NoError(t, err)
			err = <-m.done
			require.ErrorAs(t, err, new(*FatalError))
			require.ErrorContains(t, err, "is in use at a destination")
			_, err = tr.WriteAt([]byte("and stops"), 0)
			require.ErrorIs(t, err, ErrHandedOff)
			require.Zero(t, m.src.Status()[0].BytesSent)
			owner, gone := ledger.Owner("disk")
			require.True(t, gone)
			require.Equal(t, h.dst.all()[0].device, owner.Device)
			require.Equal(t, 1, m.log.count("level=ERROR"))
			m.end()
		}
		require.Positive(t, h.log.count("is in use here"))
		h.end()
	})
}

// TestASourceThatTookItsDiskBackServesOnWhenTheFormerOwnerAnswers: a disk is taken back
// when its destination cannot be reached, which may come back and knows nothing of it
// (rule 6).
func TestASourceThatTookItsDiskBackServesOnWhenTheFormerOwnerAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _ := testDisk(t, 1<<20, 1)
		w := newWires()
		m := startMoveOver(t, w, SourceOptions{Rate: 128 << 10}, SourceDisk{Name: "disk", Live: newTracker(t, store), Identity: testID})
		h := newHost(t)
		h.start(t.Context(), from(w.dst))
		<-time.After(time.Second)
		require.NoError(t, m.src.Handoff(m.ctx))
		m.end()

		tr := newTracker(t, store)
		m = startMoveOver(t, w, SourceOptions{}, SourceDisk{
			Name: "disk", Live: tr, Identity: Identity{UUID: testID.UUID, Generation: 99}, Former: []Device{h.dst.all()[0].device},
		})
		<-time.After(time.Minute)
		require.Positive(t, h.log.count("is in use here"))
		require.Empty(t, m.done)
		require.Zero(t, m.src.Status()[0].BytesSent)
		_, err := tr.WriteAt([]byte("a machine runs"), 0)
		require.NoError(t, err)
		m.end()
		h.end()
	})
}

// TestAFormerOwnerGetsNothing of a frozen disk that was taken back from it, also if it
// has the very contents (rule 6).
func TestAFormerOwnerGetsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _ := testDisk(t, 1<<20, 1)
		w := newWires()
		m := startMoveOver(t, w, SourceOptions{Rate: 128 << 10}, SourceDisk{Name: "disk", Store: store, Identity: testID})
		h := newHost(t)
		h.start(t.Context(), from(w.dst))
		<-h.dev.Live()
		m.end()
		m = startMoveOver(t, w, SourceOptions{}, SourceDisk{
			Name: "disk", Store: store, Identity: testID, Former: []Device{h.dst.all()[0].device},
		})
		<-time.After(time.Minute)
		require.Empty(t, m.done)
		require.Zero(t, m.src.Status()[0].BytesSent)
		require.Positive(t, h.log.count("was taken back from this destination"))
		m.end()
		h.end()
	})
}

// TestAFrozenSourceThatWasRolledBack: with other contents it sends nothing and ends;
// with the same ones, which its generation or a comparison proves, the destination that uses the disk
// is its owner, and gets the rest (rule 6, trap I4).
func TestAFrozenSourceThatWasRolledBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, want := testDisk(t, 1<<20, 1)
		w := newWires()
		m := startMoveOver(t, w, SourceOptions{Rate: 128 << 10}, SourceDisk{Name: "disk", Store: store, Identity: testID})
		h := newHost(t)
		h.start(t.Context(), from(w.dst))
		<-h.dev.Live()
		<-time.After(time.Second)
		m.end()

		other, _ := testDisk(t, 1<<20, 2)
		m = startMoveOver(t, w, SourceOptions{}, SourceDisk{Name: "disk", Store: other, Identity: Identity{UUID: testID.UUID, Generation: 99}})
		err := <-m.done
		require.ErrorAs(t, err, new(*FatalError))
		require.ErrorContains(t, err, "is in use at a destination")
		require.Zero(t, m.src.Status()[0].BytesSent)
		m.end()

		ledger := new(noLedger)
		m = startMoveOver(t, w, SourceOptions{Ledger: ledger}, SourceDisk{Name: "disk", Store: store, Identity: testID})
		require.NoError(t, <-m.done)
		require.NoError(t, <-h.done)
		owner, gone := ledger.Owner("disk")
		require.True(t, gone && owner.Taken)
		require.Equal(t, h.dst.all()[0].device, owner.Device)
		require.Positive(t, m.log.count("it is noted as the owner"))
		m.end()
		h.close()
		got, err := os.ReadFile(h.disk)
		require.NoError(t, err)
		require.True(t, bytes.Equal(want, got))
	})
}

// TestADestinationOfAnotherDiskStopsNoSource: it refuses, and says that its own disk is
// live (rule 8, fault B2).
func TestADestinationOfAnotherDiskStopsNoSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _ := testDisk(t, 64<<10, 1)
		tr := newTracker(t, store)
		m := startMove(t, SourceOptions{}, SourceDisk{Name: "disk", Live: tr, Identity: testID})
		for _, ext := range []wire.Extension{
			{Refused: "no"},
			{Refused: "no", Live: true, Device: Device{1}},
			{Refused: "no", Live: true, Device: Device{1}, Identity: Identity{UUID: [16]byte{6}, Generation: 1}},
			{Refused: "no", Device: Device{1}, Identity: testID},
			{Refused: "no", Live: true, Identity: testID},
		} {
			p := newRawPeer((<-m.wires.dst).(net.Conn))
			h, _, err := p.read()
			require.NoError(t, err)
			ext.Revision = wire.RevisionReason
			require.NoError(t, p.answer(h.Dev, h.ID, &wire.DevInfoResponse{Extension: ext}))
			_, _, err = p.read()
			for err == nil {
				_, _, err = p.read()
			}
			_ = p.conn.Close()
			synctest.Wait()
			require.Empty(t, m.done)
			_, err = tr.WriteAt([]byte("on"), 0)
			require.NoError(t, err)
		}
		m.end()
	})
}

// stuckLedger keeps HandOff waiting, and fails.
type stuckLedger struct {
	noLedger
	in, out chan struct{}
}

var errNoRoomForNote = errors.New("no room for the note")

func (l *stuckLedger) HandOff() error {
	close(l.in)
	<-l.out
	return errNoRoomForNote
}

// TestHandoffThatCannotBeNotedFailsForAllThatAsk, also for one that has asked while it
// was being noted (fault X5).
func TestHandoffThatCannotBeNotedFailsForAllThatAsk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _ := testDisk(t, 1<<20, 1)
		l := &stuckLedger{in: make(chan struct{}), out: make(chan struct{})}
		m := startMove(t, SourceOptions{Ledger: l}, SourceDisk{Name: "disk", Live: newTracker(t, store), Identity: testID})
		h := newHost(t)
		h.start(m.ctx, from(m.wires.dst))
		m.settled()
		all := make(chan error, 2)
		m.wg.Go(func() { all <- m.src.Handoff(m.ctx) })
		<-l.in
		m.wg.Go(func() { all <- m.src.Handoff(m.ctx) })
		synctest.Wait()
		close(l.out)
		require.ErrorIs(t, <-all, errNoRoomForNote)
		require.ErrorIs(t, <-all, errNoRoomForNote)
		h.end()
		m.end()
	})
}

// TestAbortOfNoHandoffLeavesItAutomatic (fault X5).
func TestAbortOfNoHandoffLeavesItAutomatic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _ := testDisk(t, 1<<20, 1)
		m := startMove(t, SourceOptions{AutoHandoff: true}, SourceDisk{Name: "disk", Live: newTracker(t, store), Identity: testID})
		require.ErrorIs(t, m.src.AbortHandoff(), ErrNoHandoff)
		h := newHost(t)
		h.start(m.ctx, from(m.wires.dst))
		require.NoError(t, <-m.done)
		require.True(t, m.src.HandedOff())
		require.NoError(t, <-h.done)
		h.close()
		m.end()
	})
}
