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

// SourceDisk is a disk to be moved. Nobody may write it meanwhile, but through
// Live.
type SourceDisk struct {
	Name  string // what the destination is told, and its export is called
	Store storage.StorageProvider
	// Live is where the disk is used while it moves, until it is handed off; nil:
	// it is frozen, and the destination's from the start. It is a Tracker for
	// Store, which may then be nil, and for no other Source. One that is handed
	// off already is as frozen.
	Live *Tracker
	// Identity tells the destination after a restart of either side whether this
	// is still the disk of which it has a part. Zero: it gets one for the life of the
	// Source.
	Identity Identity
	// Former are the devices to which the disk was handed off once and which are not its
	// owners any more, whatever they say.
	Former []Device
	// Changed returns what was done to the disk, which must not be written, since its
	// Identity was taken; nil if it is as it was. It is called on each connection,
	// every second while one lasts, and before the destination is told that it has
	// everything; not while the disk is in use here. What it returns ends the Source.
	// It may be called from any goroutine. nil: the disk is not watched.
	Changed func() error
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
	// MaxCallers is how many connections of a Listening source are greeted side by
	// side: the first whose other end speaks as a destination does is served. 0:
	// one after another.
	MaxCallers int
	// Met is told, once, that a destination has answered; nil: nobody is. It may
	// block, and runs beside the migration.
	Met func()
	// Known says that one has answered an earlier Source of these disks. Then it
	// is waited for from the start, however connections fail.
	Known bool
	// AutoHandoff hands live disks off without being asked: when a pass over what
	// has changed leaves so little that it would travel in MaxDowntime, or when
	// another pass would not leave less. Without it Handoff does.
	AutoHandoff bool
	// MaxDowntime is for AutoHandoff; 0 is DefaultMaxDowntime.
	MaxDowntime time.Duration
	// First says what of a disk goes before the rest of the background, the most
	// useful first: what the machine that uses it is going to ask for. It is asked
	// on each connection, while the rest is on its way; of a disk in use for the
	// first pass. What it says is an order and nothing else: what is not on the
	// disk is ignored. nil: nothing does.
	First func(ctx context.Context, disk storage.StorageProvider) ([]Range, error)
	// Ledger keeps over a crash whether the live disks were handed off; nil
	// forgets it.
	Ledger Ledger
	Log    *slog.Logger // nil: no log
}

// DefaultMaxDowntime is the MaxDowntime of SourceOptions that name none.
const DefaultMaxDowntime = 300 * time.Millisecond

// Source is the sending end of a migration.
type Source struct {
	opts  SourceOptions
	log   *slog.Logger
	disks []*sourceDisk
	limit *throttle
	path  atomic.Pointer[window] // of the present connection; nil: there is none
	hand  *hand

	lines      lineBudget  // for what those who connect to us can have logged
	takenNoted atomic.Bool // the ledger knows that the owners are live

	served  bool // a destination has taken the disks; only Run's goroutine uses it
	metOnce sync.Once
	turns   turns

	mu       sync.Mutex
	progress passes // guarded by mu
}

// sourceDisk is one disk and what is known of it over all connections.
type sourceDisk struct {
	SourceDisk
	geo    geometry
	counts counters
	rate   speed // of what clients write
	peer   *peerRecord
	clone  bool // it goes to many, and each owns its copy
	flush  turn // of whom flushes it for a handoff

	comparing comparing

	mu sync.Mutex
	// Guarded by mu:
	order      *order // of the present connection, or of the last
	connected  bool
	reconnects int
	complete   bool // the destination has said that it has everything
	err        error
	errRank    int // of err, as rankOf has it, if it is of this connection; else 0
}

// NewSource returns a Source for disks, whose names must differ.
func NewSource(disks []SourceDisk, opts SourceOptions) (*Source, error) {
	if opts.BlockSize == 0 {
		opts.BlockSize = DefaultBlockSize
	}
	if len(disks) == 0 {
		return nil, errors.New("migrate: a source needs at least one disk")
	}
	if opts.MaxDowntime == 0 {
		opts.MaxDowntime = DefaultMaxDowntime
	}
	s := &Source{opts: opts, log: logger(opts.Log)}
	s.progress = passes{first: true, gains: true}
	names := make(map[string]bool)
	for _, d := range disks {
		if err := d.live(); err != nil {
			return nil, fmt.Errorf("migrate: disk %s: %w", d.Name, err)
		}
		d.name()
		geo, err := newGeometry(int64(d.Store.Size()), opts.BlockSize)
		if err != nil {
			return nil, fmt.Errorf("migrate: disk %s: %w", d.Name, err)
		}
		if names[d.Name] {
			return nil, fmt.Errorf("migrate: two disks are called %q: give one another name", d.Name)
		}
		names[d.Name] = true
		s.disks = append(s.disks, &sourceDisk{SourceDisk: d, geo: geo, order: newOrder(geo), peer: d.record()})
	}
	if opts.Ledger == nil {
		s.opts.Ledger = new(noLedger)
	}
	if err := s.recall(); err != nil {
		return nil, err
	}
	s.limit = newThrottle(opts.BlockSize, opts.Rate)
	gone, live := s.handedOff()
	if gone > 0 && gone < live {
		return nil, fmt.Errorf("migrate: %d of %d disks were handed off: they belong together", gone, live)
	}
	for _, d := range s.disks {
		d.flush = newTurn()
	}
	s.hand = newHand(s.opts.Ledger, opts.AutoHandoff, gone > 0)
	return s, nil
}

// Run moves the disks over one connection after another, until the
// destination has said of each that it has everything. It returns nil then,
// the cause of ctx when that ends first, and otherwise what cannot be mended
// by connecting again.
func (s *Source) Run(ctx context.Context, connect Connector) error {
	defer s.turns.wait()
	defer s.hand.close()
	loop := sessions{
		connect: connect, listening: s.opts.Listening, log: s.log, session: s.session,
		known: s.opts.Known || s.hasLive(),                     // or somebody uses the disks: the destination may come when it likes
		lack:  func() []any { return lacking(s.Status())[:2] }, // nobody waits here
		moved: s.acknowledged,
		lobby: lobby{max: s.opts.MaxCallers, prepare: s.prepare, announce: s.announce, proper: properDestination(len(s.disks))},
	}
	return loop.run(ctx)
}

// acknowledged is how many packets were.
func (s *Source) acknowledged() (n int64) {
	for _, d := range s.disks {
		n += d.counts.taken.Load()
	}
	return n
}

// errMoved ends the goroutines of a connection, or of a disk on it, that has
// nothing left to do.
var errMoved = errors.New("migrate: everything has been moved")

// announced is a source's end of a connection, from the announcement of the disks on.
type announced struct {
	p     *protocol.ProtocolRW
	to    []*protocol.ToProtocol // of the disks
	said  bool                   // the disks have been announced
	ready chan struct{}          // closed when what comes can be taken
}

// prepare makes our end of a connection. Nothing is sent, and nothing read.
func (s *Source) prepare(ctx context.Context, c *caller) {
	hi := &announced{ready: make(chan struct{})}
	// c is no io.Closer here: its Close ends the protocol.
	hi.p = protocol.NewProtocolRW(ctx, struct{ io.Reader }{c}, c.conn, nil)
	for i, d := range s.disks {
		hi.to = append(hi.to, protocol.NewToProtocol(uint64(d.geo.size), firstDevice+uint32(i), hi.p))
	}
	c.hi = hi
}

// announce tells of all disks before any data (trap M10).
func (s *Source) announce(c *caller) error {
	for i, d := range s.disks {
		if err := c.hi.to[i].SendDevInfoExt(d.info()); err != nil {
			return err
		}
	}
	c.hi.said = true
	return nil
}

// session moves what is missing over the connection c, which it closes.
func (s *Source) session(ctx context.Context, c *caller) (bool, error) {
	group, ctx := errgroup.WithContext(ctx)
	if c.hi == nil {
		s.prepare(ctx, c)
	}
	p, hello := c.hi.p, c.hello
	defer context.AfterFunc(ctx, func() { p.Abort(context.Cause(ctx)) })()
	var moveErr error
	group.Go(func() error {
		select {
		case <-c.hi.ready:
		case <-p.Done():
		}
		return p.Handle()
	})
	group.Go(func() error {
		defer s.met(hello)
		return hello.await(ctx, p.Done())
	})
	group.Go(func() error {
		moveErr = s.moveAll(ctx, c)
		_ = p.Close() // ends Handle; what Close has to say is in moveErr
		return cmp.Or(moveErr, errMoved)
	})
	err := group.Wait()
	var fatal *FatalError
	var refused *protocol.RefusedError
	switch {
	case errors.As(p.Err(), &refused):
		return true, s.classifyRefusal(refused)
	case errors.As(moveErr, &fatal):
		err = moveErr
	case s.complete(): // however the connection ended
		err = nil
	case moveErr != nil: // Handle may only have seen that we closed the connection for it
		err = moveErr
	}
	s.served = s.served || hello.said()
	return hello.said(), err
}

// met tells of the first destination that has answered.
func (s *Source) met(hello *greeting) {
	if s.opts.Met != nil && hello.said() {
		s.metOnce.Do(s.opts.Met)
	}
}

// waitsForPeers reports whether nothing that a peer does ends the source: it
// listens, so that anybody may connect, or its disks are in use.
func (s *Source) waitsForPeers() bool { return s.opts.Listening || s.hasLive() }

// classify makes err the end of Run if connecting again cannot help: a disk of ours
// cannot be read, or the destination that was dialled cannot write it. A disk that
// is in use here is served on, and tried again on the next connection.
func (s *Source) classify(err error) error {
	var disk *DiskError
	switch {
	case errors.As(err, new(*differsError)):
		if s.waitsForPeers() || s.served {
			return err
		}
	case !errors.As(err, &disk):
		return err
	case disk.Peer && s.waitsForPeers():
		return err
	case !disk.Peer && s.hasLive() && !s.HandedOff():
		return err
	}
	return &FatalError{err}
}

// moveAll moves the disks side by side, until each is complete or one of them
// cannot be moved.
func (s *Source) moveAll(ctx context.Context, conn *caller) error {
	p, hello := conn.hi.p, conn.hello
	if err := s.unchanged(); err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	live := &liveSession{src: s, window: newWindow(s.opts.BlockSize, plainBulkPackets), ended: make(chan struct{}, 1)}
	var lines []*line
	s.path.Store(live.window)
	defer s.path.Store(nil)
	for i, d := range s.disks {
		c := s.line(d, conn.hi.to[i], live, hello)
		defer d.end()
		defer func() { d.counts.damage.noteEnd(s.log, d.Name, p.Err()) }()
		lines = append(lines, c)
	}
	defer s.hand.part()
	close(conn.hi.ready)
	if !conn.hi.said {
		if err := s.announce(conn); err != nil {
			return err
		}
	}
	why := &causes{}
	run := func(move func() error) {
		group.Go(func() error {
			err := move()
			if err != nil {
				why.note(err)
				_ = p.Close() // wakes the other disks, which may be writing to it
			}
			return err
		})
	}
	run(func() error { return (&admission{src: s, lines: lines, conn: conn.conn}).run(ctx) })
	var moving sync.WaitGroup
	moving.Add(len(lines))
	moved := make(chan struct{})
	for _, c := range lines {
		run(func() error { defer moving.Done(); return s.move(ctx, c) })
	}
	group.Go(func() error { moving.Wait(); close(moved); return nil })
	if s.watched() {
		run(func() error { return s.watchLoop(ctx, moved) })
	}
	if len(live.lines) > 0 {
		run(func() error {
			if err := live.lines[0].pump.awaitAdmission(ctx); err != nil { // all are admitted together
				return err
			}
			return live.passLoop(ctx)
		})
	}
	_ = group.Wait() // its first error may be what another one's end of the connection caused
	return s.classify(why.first())
}

// causes is why the disks of a connection were not moved. What is wrong with a disk
// counts before the end of the connection, which may be its consequence.
type causes struct {
	mu sync.Mutex
	// Guarded by mu:
	err  error
	rank int // of err
}

// rankOf is the higher the more err says of a disk, from 1 on.
func rankOf(err error) int {
	var disk *DiskError
	switch {
	case errors.As(err, new(*FatalError)):
		return 4
	case errors.As(err, &disk) && !disk.Peer:
		return 3
	case disk != nil:
		return 2
	}
	return 1
}

// note keeps err unless an earlier one says as much.
func (c *causes) note(err error) {
	rank := rankOf(err)
	c.mu.Lock()
	defer c.mu.Unlock()
	if rank > c.rank {
		c.err, c.rank = err, rank
	}
}

func (c *causes) first() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// line begins to move a disk over a connection.
func (s *Source) line(d *sourceDisk, to *protocol.ToProtocol, live *liveSession, hello *greeting) *line {
	o := d.begin(live.ended)
	to.HandleNeedAt(func(off, length int64) { hello.say(); o.ask(off, length) })
	to.HandleDontNeedAt(func(off, length int64) { hello.say(); o.drop(off, length) })
	pump := newPump(d.SourceDisk, o, to, live.window, s.limit, &d.counts, hello.say, s.log)
	c := &line{disk: d, order: o, to: to, pump: pump}
	if o.live != nil {
		live.lines = append(live.lines, c)
	}
	return c
}

// move sends one disk over one connection, from DevInfo to the answer to
// Completed.
func (s *Source) move(ctx context.Context, c *line) error {
	d := c.disk
	if _, ok := s.lines.take(); ok {
		s.log.Info("sending", "disk", d.Name, "bytes", d.geo.size, "block", d.geo.blockSize)
	}
	loops, ctx := errgroup.WithContext(ctx)
	loops.Go(func() error { return c.pump.upgradeLoop(ctx) })
	loops.Go(func() error { return c.pump.bulkLoop(ctx) })
	loops.Go(func() error { return c.pump.demandLoop(ctx) })
	loops.Go(func() error { s.first(ctx, c); return nil })
	loops.Go(func() error { return s.finish(ctx, c) })
	if err := loops.Wait(); err != nil && !errors.Is(err, errMoved) {
		err = c.pump.cause(err)
		d.note(err)
		return err
	}
	s.log.Info("complete", "disk", d.Name, "sent", d.counts.sent.Load())
	return nil
}

// finish waits until every block is settled, says Completed, and returns
// errMoved when the destination has agreed.
func (s *Source) finish(ctx context.Context, c *line) error {
	d := c.disk
	if err := c.pump.awaitAdmission(ctx); err != nil {
		return err
	}
	o, to := c.order, c.to
	for !o.settled() {
		select {
		case <-o.settledC:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if err := d.unchanged(); err != nil {
		return err
	}
	if err := to.SendEvent(ctx, &wire.Event{Type: wire.EventCompleted}); err != nil {
		return err
	}
	d.mu.Lock()
	d.complete = true
	d.mu.Unlock()
	if _, extended := to.Peer(); extended && s.noteComplete() {
		// Tells the destination that its answer has come (trap M15). If this is
		// lost, it waits a little for us to ask again.
		_ = to.RemoveDev()
	}
	return errMoved
}

// noteComplete notes that all disks are complete, if they are, before the destination
// stops waiting for us: a source that is killed in between and started again would
// wait for it for good. It reports false if that could not be noted.
func (s *Source) noteComplete() bool {
	if !s.complete() || s.disks[0].clone {
		return true
	}
	err := s.hand.ledger.Complete()
	if err != nil {
		s.log.Warn("all is at the destination, which could not be noted: a source that is started again will look for it", "error", err)
	}
	return err == nil
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
		Extension: d.extension(),
	}
}

func (d *sourceDisk) isComplete() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.complete
}

// begin starts a connection: nothing that an earlier one acknowledged counts,
// only what the destination claims on this one, and of a live disk what has not
// changed since.
func (d *sourceDisk) begin(ended chan struct{}) *order {
	o := newOrder(d.geo)
	if d.stillWritten() {
		o = newLiveOrder(d.geo, d.Live.track(d.geo), ended)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.order, d.connected, d.complete, d.errRank = o, true, false, 0
	return o
}

func (d *sourceDisk) end() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.connected = false
	d.reconnects++
}

// note keeps what went wrong with the disk on this connection: the first that says as
// much, not what came of it.
func (d *sourceDisk) note(err error) {
	rank := rankOf(err)
	d.mu.Lock()
	defer d.mu.Unlock()
	if rank > d.errRank {
		d.err, d.errRank = err, rank
	}
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
