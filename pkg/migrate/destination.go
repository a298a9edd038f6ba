package migrate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/protocol"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// maxDisks bounds how many disks a source may bring to a Destination that
// takes as many as come, and maxBlocks of how many blocks all of them may be:
// each costs memory here.
const (
	maxDisks  = 256
	maxBlocks = 1 << 28
)

// DestinationDisk is the storage that takes one disk.
type DestinationDisk struct {
	// Name is what the disk is called from here on; empty is the source's name.
	Name string
	// Store takes the disk: at least as large as it. The Destination closes it.
	Store storage.StorageProvider
	// KnownZero says that all of Store reads as zeroes, so that zeroes need not
	// be written.
	KnownZero bool
	// Map remembers on disk what is here; nil keeps it in memory, and a restart
	// begins anew. The Destination closes it.
	Map *lazy.Map
	// Completed is told once that the disk is complete, all of it durable, before
	// the source hears so; also of one that was complete before. May be nil.
	Completed func()
}

// Announcement is what a source says of a disk before it sends it.
type Announcement struct {
	Name      string // the other side's: it is no path
	Size      uint64 // bytes
	BlockSize uint32 // bytes
	Identity  Identity
}

// DestinationOptions are the options of a Destination.
type DestinationOptions struct {
	// Open gives the storage for a disk that the source announces. It is called
	// once for each name that is not known by Resume.
	Open func(a Announcement) (DestinationDisk, error)
	// Ready is told of a device that can be used from now on.
	Ready func(name string, dev *lazy.Device) error
	// Disks is how many disks are expected; 0 is as many as the source sends
	// before it closes the connection.
	Disks int
	// Listening says that the Connector accepts connections: one that comes to
	// nothing is logged, and the next is awaited.
	Listening bool
	// MaxCallers is how many connections of a Listening destination are greeted side
	// by side: the first whose other end speaks as a source does is served. 0: one
	// after another.
	MaxCallers int
	// Waiting is told of calls to the devices that wait for the source: see
	// lazy.Options.
	Waiting func(ctx context.Context) (over func())
	// RunDir is a directory that lives as long as the boot: see lazy.Options.
	RunDir string
	Log    *slog.Logger // nil: no log
}

// Destination is the receiving end of a migration: a lazy device for each
// disk, fed over one connection after another.
type Destination struct {
	opts DestinationOptions
	log  *slog.Logger

	mu sync.Mutex // never held over I/O
	// Guarded by mu:
	disks  []*destDisk
	byName map[string]*destDisk // by the source's name
	closed bool

	served bool // a session has come further than its first word; only Run's goroutine uses it
}

// NewDestination returns a Destination. Open and Ready are required.
func NewDestination(opts DestinationOptions) (*Destination, error) {
	if opts.Open == nil || opts.Ready == nil {
		return nil, errors.New("migrate: a destination needs Open and Ready")
	}
	return &Destination{opts: opts, log: logger(opts.Log), byName: make(map[string]*destDisk)}, nil
}

// Run takes disks over one connection after another until all that are
// expected are complete and the source has heard so. It returns
// nil then, the cause of ctx when that ends first, and otherwise what cannot
// be mended by connecting again. The devices go on in any case, until Close.
func (d *Destination) Run(ctx context.Context, connect Connector) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var patience *time.Timer
	loop := sessions{
		connect: connect, listening: d.opts.Listening, log: d.log, known: len(d.all()) > 0,
		lack:  func() []any { return lacking(d.Status()) },
		moved: d.received,
		lobby: lobby{max: d.opts.MaxCallers, proper: properSource},
	}
	loop.session = func(ctx context.Context, c *caller) (bool, error) {
		greeted, err := d.session(ctx, c)
		if errors.Is(err, errUnheard) && patience == nil {
			patience = time.AfterFunc(farewellTimeout, func() { cancel(errUnheard) })
		}
		return greeted, err
	}
	if d.complete() { // resumed: only the source may not know
		patience = time.AfterFunc(farewellTimeout, func() { cancel(errUnheard) })
	}
	err := loop.run(ctx)
	if patience != nil {
		patience.Stop()
	}
	if errors.Is(err, errUnheard) {
		d.log.Warn("all is here, but the source has not come back to hear it; its process may wait for ever and can be ended")
		return nil
	}
	return err
}

// farewellTimeout is how long a complete destination waits for a source that
// may not have got the answer to Completed, because the connection broke.
const farewellTimeout = 30 * time.Second

// errUnheard says that every disk is complete and the source may not know.
var errUnheard = errors.New("all is here, but the connection ended before the source could confirm it")

// session takes what comes over the connection c, which it closes. It ends well
// when the connection does and every disk is complete.
func (d *Destination) session(ctx context.Context, c *caller) (bool, error) {
	s := &destSession{dest: d, hello: c.hello}
	group, ctx := errgroup.WithContext(ctx)
	s.proto = protocol.NewProtocolRW(ctx, c, c.conn, s.newDevice)
	group.Go(s.proto.Handle)
	group.Go(func() error { return s.hello.await(ctx, s.proto.Done()) })
	err := group.Wait()
	_ = s.proto.Close() // it has ended already; waits for what it started
	s.detach()
	if refusal := s.refusal(); refusal != nil {
		return true, d.weigh(refusal)
	}
	if err := d.brokenDisk(); err != nil {
		return true, &FatalError{err}
	}
	d.served = d.served || s.hello.said()
	if d.complete() {
		return s.hello.said(), d.unheard()
	}
	return s.hello.said(), err
}

// weigh makes a refusal the end of Run, but not for what a stranger said who
// called us, and not while there are devices that somebody may use: then the
// right source is waited for.
func (d *Destination) weigh(refusal error) error {
	var local *localError
	if lazy.NoRoom(refusal) && len(d.all()) > 0 { // of a map: nothing has happened, and the next connection tries again
		return &refusedError{refusal}
	}
	if errors.As(refusal, &local) || !d.opts.Listening && !d.served && !d.resumed() {
		return &FatalError{refusal}
	}
	return &refusedError{refusal}
}

// resumed says that a part of a disk was here before the first connection.
func (d *Destination) resumed() bool {
	return slices.ContainsFunc(d.all(), func(disk *destDisk) bool { return disk.resumed })
}

// localError says that the trouble is on this side.
type localError struct{ error }

func (e *localError) Unwrap() error { return e.error }

// complete says whether every disk that is expected is complete.
func (d *Destination) complete() bool {
	disks := d.all()
	if len(disks) == 0 || len(disks) < d.opts.Disks {
		return false
	}
	for _, disk := range disks {
		if !disk.complete.Load() {
			return false
		}
	}
	return true
}

// unheard returns errUnheard if the source of a complete disk may not know
// that it is. A plain Silo source has no word for it.
func (d *Destination) unheard() error {
	for _, disk := range d.all() {
		if !disk.plain && !disk.heard.Load() {
			return errUnheard
		}
	}
	return nil
}

// brokenDisk returns why a disk could not take what came, if one could not and
// is not complete.
func (d *Destination) brokenDisk() error {
	for _, disk := range d.all() {
		if err := disk.refusal(); err != nil && !disk.complete.Load() {
			return &DiskError{Name: disk.name, Err: err}
		}
	}
	return nil
}

func (d *Destination) all() []*destDisk {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]*destDisk(nil), d.disks...)
}

// received is how many bytes of content came, and were taken.
func (d *Destination) received() (n int64) {
	for _, disk := range d.all() {
		n += disk.received.Load()
	}
	return n
}

// Status returns the progress of each disk, in the order in which they came.
func (d *Destination) Status() []DiskStatus {
	disks := d.all()
	all := make([]DiskStatus, len(disks))
	for i, disk := range disks {
		all[i] = disk.status()
	}
	return all
}

// Close ends the devices: reads that wait get an error, what was written is
// flushed, and the storage is closed.
func (d *Destination) Close() error {
	d.mu.Lock()
	disks := d.disks
	d.disks, d.byName, d.closed = nil, nil, true
	d.mu.Unlock()
	var errs []error
	for _, disk := range disks {
		errs = append(errs, disk.close())
	}
	return errors.Join(errs...)
}

// disk returns the disk for what the source announces: the one it announced
// before, or a new one.
func (d *Destination) disk(di *protocol.DevInfo) (disk *destDisk, fresh bool, err error) {
	d.mu.Lock()
	known, closed, n, blocks := d.byName[di.Name], d.closed, len(d.disks), int64(0)
	for _, disk := range d.disks {
		blocks += disk.geo.blocks
	}
	d.mu.Unlock()
	switch {
	case closed:
		return nil, false, ErrClosed
	case known != nil:
		return known, false, known.same(di)
	case d.opts.Disks > 0 && n >= d.opts.Disks:
		return nil, false, fmt.Errorf("the source brings another disk, %q: %d expected", cut(di.Name, maxName), d.opts.Disks)
	case n >= maxDisks:
		return nil, false, fmt.Errorf("the source brings more than %d disks", maxDisks)
	}
	if err := elsewhere(di, Device{}); err != nil {
		return nil, false, err
	}
	geo, err := newGeometry(int64(di.Size), int64(di.BlockSize))
	if err != nil {
		return nil, false, fmt.Errorf("disk %q: the source announces %w", cut(di.Name, maxName), err)
	}
	if blocks+geo.blocks > maxBlocks {
		return nil, false, fmt.Errorf("disk %q: %d blocks of %d bytes are more than are taken: let the source use a larger --block-size",
			cut(di.Name, maxName), geo.blocks, geo.blockSize)
	}
	disk, err = d.open(di)
	if err != nil {
		return nil, false, err
	}
	return disk, true, d.add(di.Name, disk)
}

// open makes the device for a disk that is new.
func (d *Destination) open(di *protocol.DevInfo) (*destDisk, error) {
	a := announcement(di)
	opened, err := d.opts.Open(a)
	if err != nil {
		return nil, fmt.Errorf("disk %q: %w", cut(di.Name, maxName), err)
	}
	disk, err := d.newDestDisk(a, di.Extension == nil, opened)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("disk %q: %w", cut(di.Name, maxName), err), opened.close())
	}
	return disk, nil
}

// Resume goes on with a disk of which a part is here, as its map knows: it can
// be used at once, also when the source is not there. sourceName is what the
// source calls it.
func (d *Destination) Resume(sourceName string, opened DestinationDisk) error {
	id := opened.Map.Identity()
	a := Announcement{
		Name: sourceName, Size: uint64(id.Size), BlockSize: uint32(id.BlockSize),
		Identity: Identity{UUID: id.Source, Generation: id.Generation},
	}
	disk, err := d.newDestDisk(a, false, opened)
	if err != nil {
		return errors.Join(fmt.Errorf("disk %q: %w", sourceName, err), opened.close())
	}
	disk.resumed = true
	if err := d.add(sourceName, disk); err != nil {
		return err
	}
	st := disk.dev.Stats()
	d.log.Info("resuming", "disk", disk.name, "local", st.BytesLocal, "bytes", st.Size, "complete", st.Complete)
	return d.opts.Ready(disk.name, disk.dev)
}

func (o DestinationDisk) close() error {
	err := o.Store.Close()
	if o.Map != nil {
		err = errors.Join(err, o.Map.Close())
	}
	return err
}

func announcement(di *protocol.DevInfo) Announcement {
	a := Announcement{Name: di.Name, Size: di.Size, BlockSize: di.BlockSize}
	if di.Extension != nil {
		a.Identity = di.Extension.Identity
	}
	return a
}

// add makes disk known, unless the Destination was closed meanwhile or another
// device of the connection brought the same name.
func (d *Destination) add(name string, disk *destDisk) error {
	d.mu.Lock()
	var err error
	switch {
	case d.closed:
		err = ErrClosed
	case d.byName[name] != nil:
		err = fmt.Errorf("the source brings two disks called %q", cut(name, maxName))
	default:
		d.byName[name] = disk
		d.disks = append(d.disks, disk)
	}
	d.mu.Unlock()
	if err != nil {
		return errors.Join(err, disk.close())
	}
	return nil
}
