package migrate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/silo-nbd/silo-nbd/pkg/protocol"
	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// firstDevice is the device id of a source's first disk: later versions of
// Silo keep 0 for themselves.
const firstDevice = 1

// SourceDisk is a disk to be moved. Nobody may write it meanwhile.
type SourceDisk struct {
	Name  string // what the destination is told, and its export is called
	Store storage.StorageProvider
	// Identity tells the destination after a restart of either side whether this
	// is still the disk of which it has a part. Zero: it cannot tell.
	Identity Identity
}

// Identity says which disk it is, and which of its contents.
type Identity = wire.Identity

// SourceOptions are the options of a Source; the zero value works.
type SourceOptions struct {
	// BlockSize is the unit of the migration in bytes, a power of two; 0 is
	// DefaultBlockSize.
	BlockSize int64
	// Rate bounds the background in bytes a second, over all disks, until
	// SetRate; 0 is no bound. Blocks that were asked for are exempt.
	Rate int64
	// Listening says that the Connector accepts connections: one that comes to
	// nothing is logged, and the next is awaited.
	Listening bool
	Log       *slog.Logger // nil: no log
}

// Source is the sending end of a migration.
type Source struct {
	opts  SourceOptions
	log   *slog.Logger
	disks []*sourceDisk
	limit *throttle
	path  atomic.Pointer[window] // of the present connection; nil: there is none

	served bool // a destination has taken the disks; only Run's goroutine uses it
}

// sourceDisk is one disk and what is known of it over all connections.
type sourceDisk struct {
	SourceDisk
	geo    geometry
	counts counters

	mu sync.Mutex
	// Guarded by mu:
	order      *order // of the present connection, or of the last
	connected  bool
	reconnects int
	complete   bool // the destination has said that it has everything
	err        error
}

// NewSource returns a Source for disks, whose names must differ.
func NewSource(disks []SourceDisk, opts SourceOptions) (*Source, error) {
	if opts.BlockSize == 0 {
		opts.BlockSize = DefaultBlockSize
	}
	if len(disks) == 0 {
		return nil, errors.New("migrate: a source needs at least one disk")
	}
	s := &Source{opts: opts, log: logger(opts.Log)}
	names := make(map[string]bool)
	for _, d := range disks {
		geo, err := newGeometry(int64(d.Store.Size()), opts.BlockSize)
		if err != nil {
			return nil, fmt.Errorf("migrate: disk %s: %w", d.Name, err)
		}
		if names[d.Name] {
			return nil, fmt.Errorf("migrate: two disks are called %q: give one another name", d.Name)
		}
		names[d.Name] = true
		s.disks = append(s.disks, &sourceDisk{SourceDisk: d, geo: geo, order: newOrder(geo)})
	}
	s.limit = newThrottle(opts.BlockSize, opts.Rate)
	return s, nil
}

// Run moves the disks over one connection after another, until the
// destination has said of each that it has everything. It returns nil then,
// the cause of ctx when that ends first, and otherwise what cannot be mended
// by connecting again.
func (s *Source) Run(ctx context.Context, connect Connector) error {
	loop := sessions{
		connect: connect, listening: s.opts.Listening, log: s.log, session: s.session,
		lack: func() []any { return lacking(s.Status())[:2] }, // nobody waits here
	}
	return loop.run(ctx)
}

// Status returns the progress of each disk, in the order of NewSource.
func (s *Source) Status() []DiskStatus {
	all := make([]DiskStatus, len(s.disks))
	for i, d := range s.disks {
		all[i] = d.status()
	}
	return all
}

func (d *sourceDisk) status() DiskStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	st := DiskStatus{
		Name: d.Name, Size: d.geo.size, BlockSize: d.geo.blockSize,
		State:      StateWaiting,
		BytesDone:  max(0, d.geo.size-d.order.unsettled()*d.geo.blockSize),
		BytesAsked: d.counts.asked.Load(), // before BytesSent, which is never less
		BytesSent:  d.counts.sent.Load(),
		Damaged:    d.counts.damage.count(),
		Connected:  d.connected, Reconnects: max(0, d.reconnects), Err: d.err,
	}
	if _, full := d.order.full(); full && d.connected {
		st.Err = errNoRoom
	}
	switch {
	case d.complete:
		st.State, st.BytesDone = StateComplete, d.geo.size
	case d.connected:
		st.State = StateMigrating
	}
	return st
}

// errMoved ends the goroutines of a connection, or of a disk on it, that has
// nothing left to do.
var errMoved = errors.New("migrate: everything has been moved")

// session moves what is missing over conn, which it closes.
func (s *Source) session(ctx context.Context, conn io.ReadWriteCloser) (bool, error) {
	group, ctx := errgroup.WithContext(ctx)
	p := protocol.NewProtocolRW(ctx, conn, conn, nil)
	hello := newGreeting()
	var moveErr error
	group.Go(p.Handle)
	group.Go(func() error { return hello.await(ctx, p.Done()) })
	group.Go(func() error {
		moveErr = s.moveAll(ctx, p, hello)
		_ = p.Close() // ends Handle; what Close has to say is in moveErr
		return cmp.Or(moveErr, errMoved)
	})
	err := group.Wait()
	var fatal *FatalError
	var refused *protocol.RefusedError
	switch {
	case errors.As(p.Err(), &refused):
		return true, s.weigh(refused)
	case errors.As(moveErr, &fatal):
		err = moveErr
	case s.complete(): // however the connection ended
		err = nil
	}
	s.served = s.served || hello.said()
	return hello.said(), err
}

// weigh makes a refusal the end of Run, but not when it is of one who called us,
// or when there was a destination that took the disks.
func (s *Source) weigh(refused *protocol.RefusedError) error {
	if !s.opts.Listening && !s.served {
		return &FatalError{refused}
	}
	return refused
}

// moveAll moves the disks side by side, until each is complete or one of them
// cannot be moved.
func (s *Source) moveAll(ctx context.Context, p *protocol.ProtocolRW, hello *greeting) error {
	group, ctx := errgroup.WithContext(ctx)
	shared := newWindow(s.opts.BlockSize, plainBulkPackets)
	s.path.Store(shared)
	defer s.path.Store(nil)
	for i, d := range s.disks {
		group.Go(func() error {
			err := s.move(ctx, d, p, firstDevice+uint32(i), shared, hello)
			if err != nil {
				_ = p.Close() // wakes the other disks, which may be writing to it
			}
			return err
		})
	}
	err := group.Wait()
	var disk *DiskError
	if errors.As(err, &disk) {
		return &FatalError{err}
	}
	return err
}

// move sends one disk over one connection, from DevInfo to the answer to
// Completed.
func (s *Source) move(ctx context.Context, d *sourceDisk, p protocol.Protocol, dev uint32, w *window, hello *greeting) error {
	o := d.begin()
	defer d.end()
	defer func() { d.counts.damage.noteEnd(s.log, d.Name, p.Err()) }()
	to := protocol.NewToProtocol(uint64(d.geo.size), dev, p)
	to.HandleNeedAt(func(off, length int64) { hello.say(); o.ask(off, length) })
	to.HandleDontNeedAt(func(off, length int64) { hello.say(); o.drop(off, length) })
	pump := newPump(d.SourceDisk, o, to, w, s.limit, &d.counts, hello.say, s.log)
	if err := to.SendDevInfoExt(d.info()); err != nil {
		return err
	}
	s.log.Info("sending", "disk", d.Name, "bytes", d.geo.size, "block", d.geo.blockSize)

	loops, ctx := errgroup.WithContext(ctx)
	loops.Go(func() error { return pump.upgradeLoop(ctx) })
	loops.Go(func() error { return pump.bulkLoop(ctx) })
	loops.Go(func() error { return pump.demandLoop(ctx) })
	loops.Go(func() error { return d.finish(ctx, o, to) })
	if err := loops.Wait(); err != nil && !errors.Is(err, errMoved) {
		d.note(err)
		return err
	}
	s.log.Info("complete", "disk", d.Name, "sent", d.counts.sent.Load())
	return nil
}

// finish waits until every block is settled, says Completed, and returns
// errMoved when the destination has agreed.
func (d *sourceDisk) finish(ctx context.Context, o *order, to *protocol.ToProtocol) error {
	for !o.settled() {
		select {
		case <-o.settledC:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if err := to.SendEvent(ctx, &wire.Event{Type: wire.EventCompleted}); err != nil {
		return err
	}
	d.mu.Lock()
	d.complete = true
	d.mu.Unlock()
	if _, extended := to.Peer(); extended {
		// Tells the destination that its answer has come (trap M15). If this is
		// lost, it waits a little for us to ask again.
		_ = to.RemoveDev()
	}
	return errMoved
}

// complete says whether every disk is.
func (s *Source) complete() bool {
	for _, d := range s.disks {
		if !d.isComplete() {
			return false
		}
	}
	return true
}

func (d *sourceDisk) info() *protocol.DevInfo {
	return &protocol.DevInfo{
		Size: uint64(d.geo.size), BlockSize: uint32(d.geo.blockSize), Name: d.Name,
		// A plain Silo destination wants these two of a schema.
		Schema:    fmt.Sprintf("size = \"%d\"\nsystem = \"memory\"\n", d.geo.size),
		Extension: &wire.Extension{Revision: wire.Revision, Identity: d.Identity},
	}
}

func (d *sourceDisk) isComplete() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.complete
}

// begin starts a connection: nothing that an earlier one acknowledged counts,
// only what the destination claims on this one.
func (d *sourceDisk) begin() *order {
	o := newOrder(d.geo)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.order, d.connected, d.complete = o, true, false
	return o
}

func (d *sourceDisk) end() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.connected = false
	d.reconnects++
}

func (d *sourceDisk) note(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.err = err
}

// greeting is the other side's first word.
type greeting struct {
	once sync.Once
	done chan struct{}
}

func newGreeting() *greeting { return &greeting{done: make(chan struct{})} }

func (g *greeting) say() { g.once.Do(func() { close(g.done) }) }

func (g *greeting) said() bool {
	select {
	case <-g.done:
		return true
	default:
		return false
	}
}

// await returns errSilent if there is no greeting in time, and nil when there
// is or when gone says that it does not matter any more.
func (g *greeting) await(ctx context.Context, gone <-chan struct{}) error {
	t := time.NewTimer(greetTimeout)
	defer t.Stop()
	select {
	case <-t.C:
		return errSilent
	case <-g.done:
	case <-gone:
	case <-ctx.Done():
	}
	return nil
}
