package lazy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// DefaultBlockSize is the block size, in bytes, of a device whose Options name
// none.
const DefaultBlockSize = 64 << 10

const maxBlockSize = 1 << 30 // bytes

// Options say how a device behaves. The zero value works: blocks of 64 KiB,
// live at once, on a disk of unknown contents, its blocks never taken back.
type Options struct {
	// BlockSize is the unit in which the source sends, in bytes: a power of two,
	// at least 512. 0 means DefaultBlockSize.
	BlockSize int64
	// Standby makes client I/O wait until GoLive, since the source may still
	// change any block.
	Standby bool
	// KnownZero says that the disk is known to read as zeroes, so that zeroes
	// which arrive need not be written.
	KnownZero bool
	// Revocable lets the source invalidate blocks while the device is live. What
	// was written here is never lost by it. It costs a claim a write and a
	// second look a read.
	Revocable bool
	// Map remembers on disk what is here, for the next start. Nil keeps it in
	// memory only. A map that was live or complete makes the device so, whatever
	// Standby says; its block size is the default. It stays the caller's to
	// close, after the device.
	Map *Map
	// Waiting is told that the call whose context it gets begins to wait for the
	// source, and what it returns, which must not be nil, that this is over. Waits
	// for the disk are not told. Nil: nobody is.
	Waiting func(ctx context.Context) (over func())
	// RunDir is a directory that lives as long as the boot. There is kept what the map
	// does not have yet, so that it outlives a kill of the process, as what clients wrote
	// does. Empty: there is none, and a kill is like a power cut.
	RunDir string
	// MaskMemory is how much memory, in bytes, what is written to parts of missing
	// blocks may take. Beyond that a block is fetched before it is written to. 0 means
	// DefaultMaskMemory, less than 0 no limit. It does not hold for a device that is
	// Revocable.
	MaskMemory int64
	// Log is told of reads that wait, and of a disk or map that fails. Nil means
	// slog.Default().
	Log *slog.Logger

	boot   func(size int64) (memory, error) // in place of RunDir, for tests
	bootID func() (string, error)           // in place of bootfile.BootID, for tests
}

// Device is a disk that is usable while its contents arrive. All methods may be
// called from any number of goroutines at once.
type Device struct {
	disk      storage.StorageProvider
	size      int64
	blockSize int64
	revocable bool
	log       *slog.Logger
	onWait    func(ctx context.Context) (over func()) // Options.Waiting

	// direct is the one thing that client I/O looks at when the device is
	// complete: reads and writes then go straight to the disk. It is only true
	// while the device is complete, not closed, and no flush has failed.
	direct atomic.Bool

	state   *state
	claims  claims
	waits   waits
	demand  histogram // how long what waited for missing blocks has waited
	flush   *flusher
	saver   saver   // touched by holders of the flusher's turns only
	capture capture // what the next flush may log
	mapped  bool    // there was a map in Options that was not complete
	epoch   deviceEpochs
	owed    owed // what the map has yet to forget
	witness witness

	isLive    atomic.Bool
	live      chan struct{} // closed by enterLive
	knownZero atomic.Bool   // every missing sector that was not written here reads as zero
	inval     atomic.Uint64 // counts invalidations, under the claim of their blocks

	sealMu   sync.Mutex  // makes sealing, going live and taking blocks back one at a time
	leaving  bool        // standby is about to end; guarded by sealMu
	sealed   atomic.Bool // no block can be taken back any more; set under sealMu
	complete atomic.Bool // Complete has succeeded

	ops     *gate         // client I/O that is not direct
	closing chan struct{} // closed by Close
	loops   sync.WaitGroup
	closer  sync.Once
	closed  error // the result of Close; read only after closer

	attaching sync.Mutex // makes beginnings and ends of sessions one at a time; guards no state
}

// New makes a device of the size of disk, all of whose blocks are missing, but
// for those that its map knows to be here. The disk stays the caller's to close,
// after the device.
func New(disk storage.StorageProvider, o Options) (*Device, error) {
	if o.BlockSize == 0 {
		o.BlockSize = DefaultBlockSize
		if o.Map != nil {
			o.BlockSize = o.Map.Identity().BlockSize
		}
	}
	if err := checkBlockSize(o.BlockSize); err != nil {
		return nil, fmt.Errorf("lazy: %w", err)
	}
	size := int64(disk.Size())
	if size < 0 {
		return nil, fmt.Errorf("lazy: disk of %d bytes: want less than 8 EiB", disk.Size())
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	d := &Device{
		disk:      disk,
		size:      size,
		blockSize: o.BlockSize,
		revocable: o.Revocable,
		log:       o.Log,
		onWait:    o.Waiting,
		state:     newState(blocksOf(size, o.BlockSize)),
		live:      make(chan struct{}),
		ops:       newGate(),
		closing:   make(chan struct{}),
		flush:     newFlusher(),
		witness:   witness{turn: make(chan struct{}, 1)},
	}
	d.waits.init(d.state.blocks, o.BlockSize)
	if !o.Revocable {
		d.state.partial.limit = maskLimit(o.MaskMemory, o.maskWords())
	}
	d.knownZero.Store(o.KnownZero)
	d.capture.spoil() // until there is a log
	d.epoch.init(o.Map)
	if o.Map != nil {
		if err := d.adopt(o.Map, o); err != nil {
			return nil, errors.Join(err, d.state.mirror.close())
		}
	}
	if !o.Standby {
		if err := d.GoLive(); err != nil {
			return nil, errors.Join(err, d.state.mirror.close())
		}
	}
	d.loops.Go(d.watchLoop)
	if m := d.epoch.m; m != nil && m.backing != nil && m.header().bond.flags&bondMarking != 0 {
		d.loops.Go(d.markLoop)
	}
	if d.mapped {
		d.loops.Go(d.saveLoop)
	}
	return d, nil
}

// maskWords is the words that the mask of a block takes in memory.
func (o Options) maskWords() int { return int((o.BlockSize/sectorSize + 63) / 64) }

// blocksOf is the number of blocks that size bytes take; the last may be short.
func blocksOf(size, blockSize int64) int64 {
	n := size / blockSize
	if size%blockSize != 0 {
		n++
	}
	return n
}

// extent is the range of a block, in bytes.
func (d *Device) extent(block int64) (off, end int64) {
	off = block * d.blockSize
	return off, off + min(d.blockSize, d.size-off)
}

// span is the blocks that touch [off, end).
func (d *Device) span(off, end int64) (lo, hi int64) {
	return off / d.blockSize, blocksOf(end, d.blockSize)
}

// sectors is the sectors of the block that touch [off, end), and how many the
// block has.
func (d *Device) sectors(block, off, end int64) (lo, hi, count int64) {
	start, stop := d.extent(block)
	lo = (max(off, start) - start) / sectorSize
	hi = (min(end, stop) - start + sectorSize - 1) / sectorSize
	return lo, hi, (stop - start + sectorSize - 1) / sectorSize
}

// Size is the number of bytes of the device, which never changes. The error is
// always nil.
func (d *Device) Size() (int64, error) { return d.size, nil }

// BlockSize is the unit in which blocks arrive, in bytes. The last block may be
// shorter.
func (d *Device) BlockSize() int64 { return d.blockSize }

// GoLive lets client I/O in: the source has handed over and changes nothing any
// more. With a map that is durable before GoLive returns, and before any client
// gets in. If there is no room for that (NoRoom), nothing has happened, and it may
// be tried again; after any other error it may be durable or not, and that is
// final. It may be called again.
func (d *Device) GoLive() error {
	if d.isLive.Load() {
		return nil
	}
	if !d.ops.enter() {
		return ErrClosed
	}
	defer d.ops.leave()
	d.sealMu.Lock()
	d.leaving = true // from here on no block is taken back
	d.sealMu.Unlock()
	if d.mapped {
		err := d.flush.alone(d, d.saver.goLive)
		if noRoom(err) {
			d.sealMu.Lock()
			d.leaving = d.isLive.Load()
			d.sealMu.Unlock()
		}
		if err != nil {
			return err
		}
	}
	if d.enterLive() && !d.mapped {
		d.epoch.step()
	}
	return nil
}

// enterLive reports whether the device was not live before.
func (d *Device) enterLive() bool {
	d.sealMu.Lock()
	defer d.sealMu.Unlock()
	if d.isLive.Swap(true) {
		return false
	}
	close(d.live)
	return true
}

// Live returns a channel that is closed once the device is live.
func (d *Device) Live() <-chan struct{} { return d.live }

// Complete ends the migration of this device: it makes sure that every block is
// here, flushes the disk, and from then on client I/O goes straight to the disk
// and nothing is taken from a source. When it returns nil, all is on stable
// storage, the map says so and has shrunk to its header: the source may be
// deleted. It returns an *IncompleteError if blocks are missing, ErrStandby
// before GoLive, or the error of the flush; the device then goes on as before. It
// may be called again.
func (d *Device) Complete() error {
	if !d.ops.enter() {
		return ErrClosed
	}
	defer d.ops.leave()
	if !d.isLive.Load() {
		return ErrStandby
	}
	if err := d.seal(); err != nil {
		return err
	}
	if err := d.flush.flush(context.Background(), d, true); err != nil {
		return err
	}
	if d.mapped {
		if err := d.flush.alone(d, d.finish); err != nil {
			return err
		}
	}
	d.complete.Store(true)
	d.flush.mu.Lock()
	defer d.flush.mu.Unlock()
	if d.flush.failed == nil && !d.ops.isShut() {
		d.direct.Store(true)
	}
	return d.flush.failed
}

// seal makes sure that no block is missing and that none can be any more.
func (d *Device) seal() error {
	d.sealMu.Lock()
	defer d.sealMu.Unlock()
	missing := d.state.blocks - d.state.local.Load()
	if missing > 0 {
		first := d.state.nextMissing(0, d.state.blocks)
		return &IncompleteError{Missing: missing, First: first * d.blockSize}
	}
	d.sealed.Store(true)
	return nil
}

// Close ends the device: every waiting call returns ErrClosed, those in progress
// end, the stream attached is dead, and the disk is flushed and its map saved. It
// does not close them. Calls that come later get ErrClosed; on a complete device calls in
// progress are not waited for, so end the clients first. A call of the source's
// NeedAt or DontNeedAt is waited for, so end its connection first, too.
func (d *Device) Close() error {
	d.closer.Do(func() {
		d.flush.mu.Lock()
		d.ops.shut()
		d.direct.Store(false)
		d.flush.mu.Unlock()
		close(d.closing)
		d.attaching.Lock()
		d.detach(d.waits.current())
		d.attaching.Unlock()
		<-d.ops.idle
		d.loops.Wait()
		if d.closed = d.flush.flush(context.Background(), d, true); d.closed == nil {
			if err := d.bindCleanly(); err != nil {
				d.log.Warn("the map could not note the clean end of its disk: it will be taken for one that was killed", "map", d.epoch.m.path, "error", err)
			}
			if err := d.leave(); err != nil {
				d.log.Warn("the map could not note that the disk was left in order: the next start may warn of a kill that was none", "map", d.epoch.m.path, "error", err)
			}
			d.state.mirror.forget() // all of it is in the map
		}
		d.closed = errors.Join(d.closed, d.state.mirror.close())
	})
	return d.closed
}

// ioError says which operation of the disk failed, where.
func ioError(op string, off, length int64, err error) error {
	return fmt.Errorf("lazy: %s %d bytes at %d: %w", op, length, off, err)
}
