package migrate

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/protocol"
	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// destDisk is one disk of a Destination, over all connections.
type destDisk struct {
	name   string
	geo    geometry
	store  DestinationDisk
	dev    *lazy.Device
	device Device // which device this is; no other one has it
	log    *slog.Logger

	complete atomic.Bool
	plain    bool         // the source is a plain Silo one
	resumed  bool         // from an earlier process
	heard    atomic.Bool  // the source knows that we are complete
	received atomic.Int64 // bytes of content that came
	damage   damage

	comparing comparing

	mu sync.Mutex
	// Guarded by mu:
	id       Identity
	attached int   // connections that feed it: 0 or 1
	sessions int   // connections so far
	refused  span  // the first blocks that came and were not taken, and have not come again since
	err      error // why they were not
	shortage shortage
	unequal  *unequalError // of the last comparison that failed; nil: none has
}

// newDestDisk makes the device that takes what a announces into opened.
func (d *Destination) newDestDisk(a Announcement, plain bool, opened DestinationDisk) (*destDisk, error) {
	geo, err := newGeometry(int64(a.Size), int64(a.BlockSize))
	if err != nil {
		return nil, err
	}
	store, err := fit(opened.Store, geo.size)
	if err != nil {
		return nil, err
	}
	disk := &destDisk{
		name: cmp.Or(opened.Name, a.Name), geo: geo, id: a.Identity, store: opened, plain: plain, log: d.log,
		device: deviceOf(opened),
	}
	disk.dev, err = lazy.New(store, lazy.Options{
		BlockSize: geo.blockSize,
		// Until the source says that nobody writes its disk any more; a map may know.
		Standby:   !plain,
		KnownZero: opened.KnownZero,
		// A plain Silo source goes on writing, and takes blocks back.
		Revocable: plain,
		Map:       opened.Map,
		RunDir:    d.opts.RunDir,
		Log:       d.log.With("disk", disk.name),
		Waiting:   d.opts.Waiting,
	})
	if err != nil {
		return nil, err
	}
	if disk.dev.Stats().Complete {
		disk.completed()
	}
	return disk, nil
}

// completed notes that the disk is complete, which may be said again.
func (d *destDisk) completed() {
	if !d.complete.Swap(true) && d.store.Completed != nil {
		d.store.Completed()
	}
}

func (d *destDisk) attach(from *protocol.FromProtocol) *lazy.Stream {
	d.mu.Lock()
	d.attached++
	d.sessions++
	d.err = nil
	d.refused = span{}
	d.mu.Unlock()
	return d.dev.Attach(asker{from, d.log})
}

func (d *destDisk) detach(s *lazy.Stream) {
	_ = s.Close() // detaching cannot fail
	d.mu.Lock()
	defer d.mu.Unlock()
	d.attached--
}

// refuse notes that [off, off+length) came and was not taken, and returns what
// the source is to be told.
func (d *destDisk) refuse(off, length int64, err error) error {
	if lazy.NoRoom(err) && !d.plain { // a plain Silo source would not send it again
		return d.short(err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err == nil {
		d.log.Error("the disk does not take what comes; it will be sent again", "disk", d.name, "error", err)
		d.refused, _ = d.geo.touching(off, length)
		d.err = err
	}
	return err
}

// take notes that [off, off+length) came and was taken.
func (d *destDisk) take(off, length int64) {
	d.received.Add(length)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err == nil {
		return
	}
	if s, ok := d.geo.inside(off, length); ok && s.from <= d.refused.from && s.to > d.refused.from {
		d.refused.from = min(s.to, d.refused.to)
	}
	if d.refused.from == d.refused.to {
		d.err = nil
	}
}

// fail notes that the disk cannot be completed, which no connection mends.
func (d *destDisk) fail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refused, d.err = span{0, d.geo.blocks}, err
}

// refusal returns why blocks that came were not taken, if some were not and
// have not come again. That there was only no room for them does not count.
func (d *destDisk) refusal() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

func (d *destDisk) status() DiskStatus {
	st := d.dev.Stats()
	d.mu.Lock()
	defer d.mu.Unlock()
	s := DiskStatus{
		Name: d.name, Size: d.geo.size, BlockSize: d.geo.blockSize,
		State:         StateWaiting,
		BytesDone:     st.BytesLocal,
		BytesReceived: d.received.Load(),
		Damaged:       d.damage.count(),
		BytesWritten:  min(d.geo.size, st.Written*d.geo.blockSize),
		Waiting:       st.Waiting,
		Connected:     d.attached > 0,
		Reconnects:    max(0, d.sessions-1),
		Err:           cmp.Or(d.err, d.shortage.err),
	}
	if st.Waiting > 0 {
		s.OldestWait = time.Since(st.OldestWait)
	}
	switch {
	case d.complete.Load():
		s.State = StateComplete
	case s.Connected && !st.Live:
		s.State = StateStandby
	case s.Connected:
		s.State = StateMigrating
	}
	d.comparing.status(&s)
	return s
}

func (d *destDisk) close() error {
	return errors.Join(d.dev.Close(), d.store.close())
}

// arrivals is the source's hand on a disk, for one connection: what the
// protocol receives goes through it into the device, dirty lists too.
type arrivals struct {
	*lazy.Stream
	disk *destDisk
	from *protocol.FromProtocol
	gone <-chan struct{} // closed when the connection has ended

	epoch   wire.Epoch  // of the device, on this connection; zero for a plain source
	written bool        // the source's disk is in use
	refused func(error) // hears why the connection ends: one side refuses the other
	compare *comparison // nil: none on this connection
}

// WriteAt lays down data that came. An error is answered, and the source sends
// the blocks again later.
func (a *arrivals) WriteAt(p []byte, off int64) (int, error) {
	if err := a.busyComparing(); err != nil {
		return 0, err
	}
	n, err := a.Stream.WriteAt(p, off)
	if errors.Is(err, lazy.ErrComplete) {
		return len(p), nil // sent before the source knew: all of it is here
	}
	if err != nil {
		return n, a.disk.refuse(off, int64(len(p)), err)
	}
	a.disk.take(off, int64(n))
	a.disk.roomy()
	return n, nil
}

// ZeroAt lays down a run of zeroes.
func (a *arrivals) ZeroAt(off, length int64, punch bool) error {
	if err := a.busyComparing(); err != nil {
		return err
	}
	err := a.Stream.ZeroAt(off, length, punch)
	if errors.Is(err, lazy.ErrComplete) {
		return nil
	}
	if err != nil {
		return a.disk.refuse(off, length, err)
	}
	a.disk.take(off, length)
	return nil
}

// HandleDirtyList hears that the source has changed blocks that are here.
func (a *arrivals) HandleDirtyList(blockSize uint32, blocks []uint32) error {
	return a.disk.withRoom(a.gone, func() error { return a.Stream.HandleDirtyList(blockSize, blocks) })
}

// HandleDamage hears of data that was changed on the way.
func (a *arrivals) HandleDamage() { a.disk.damage.note(a.disk.log, a.disk.name) }

// HandleEvent answers the source's events. Completed is held against the map:
// if a block is missing, the migration is not complete, whatever the source
// says, and the connection ends so that the rest is claimed on the next.
func (a *arrivals) HandleEvent(ev *wire.Event, answer func(error)) {
	if err := a.busyComparing(); err != nil && (ev.Type == wire.EventCompleted || ev.Type == wire.EventPostLock) {
		answer(err)
		return
	}
	switch ev.Type {
	case wire.EventCompleted:
	case wire.EventCustom:
		if ev.CustomType == customRefused {
			a.refused(refusalBy(ev.Payload))
		}
		answer(nil)
		return
	case wire.EventPreLock:
		answer(a.lock())
		return
	case wire.EventPostLock:
		answer(a.disk.withRoom(a.gone, func() error { return a.disk.goLive("the source has handed it off") }))
		return
	default:
		answer(nil)
		return
	}
	if err := a.disk.withRoom(a.gone, a.disk.dev.Complete); err != nil {
		if !lazy.NoRoom(err) && !errors.As(err, new(*lazy.IncompleteError)) {
			a.disk.fail(err)
		}
		answer(fmt.Errorf("the source says that disk %q is complete: %w", a.disk.name, err))
		return
	}
	a.disk.completed()
	a.disk.log.Info("complete", "disk", a.disk.name, "received", a.disk.received.Load())
	answer(nil)
}

// HandleRemoveDev hears that the source is done with the disk: it has got our
// answer to Completed.
func (a *arrivals) HandleRemoveDev() {
	a.disk.heard.Store(a.disk.complete.Load())
}

// claim tells the source of every run that is here. It stops where the
// connection does; the next one is told all of it.
func (a *arrivals) claim() {
	a.disk.dev.EachLocal(func(off, length int64) bool {
		return a.from.DontNeedAt(off, length) == nil
	})
}

// asker lets the device ask the source that is at the other end of a
// connection.
type asker struct {
	from *protocol.FromProtocol
	log  *slog.Logger
}

// NeedAt asks for a range now. An error is the connection's, whose end is
// handled where it is read; the device asks again on the next.
func (a asker) NeedAt(off, length int64) { a.check("NeedAt", a.from.NeedAt(off, length)) }

// DontNeedAt tells that a range need not be sent. If it is lost, the range is
// sent and ignored.
func (a asker) DontNeedAt(off, length int64) { a.check("DontNeedAt", a.from.DontNeedAt(off, length)) }

func (a asker) check(op string, err error) {
	if err != nil {
		a.log.Debug("not asked: the connection is gone", "op", op, "error", err)
	}
}
