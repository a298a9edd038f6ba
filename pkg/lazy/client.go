package lazy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// ReadAt is ReadAtContext with nothing to cancel it.
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	return d.ReadAtContext(context.Background(), p, off)
}

// WriteAt is WriteAtContext with nothing to cancel it.
func (d *Device) WriteAt(p []byte, off int64) (int, error) {
	return d.WriteAtContext(context.Background(), p, off)
}

// Sync is SyncContext with nothing to cancel it.
func (d *Device) Sync() error { return d.SyncContext(context.Background()) }

// ReadAtContext reads len(p) bytes at off, with the contract of io.ReaderAt. It
// waits for what is missing, and asks for it, until it arrives, ctx ends (the
// error is its cause) or the device is closed (ErrClosed). After it has
// returned p is not touched.
func (d *Device) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if d.direct.Load() {
		return d.disk.ReadAt(p, off)
	}
	if off < 0 {
		return 0, storage.ErrOutOfRange
	}
	if !d.ops.enter() {
		return 0, ErrClosed
	}
	defer d.ops.leave()
	if len(p) == 0 {
		return 0, nil
	}
	if off >= d.size {
		return 0, io.EOF
	}
	length := min(int64(len(p)), d.size-off)
	n, err := d.read(ctx, p[:length], off)
	if err == nil && n < len(p) {
		err = io.EOF
	}
	return n, err
}

// read reads a range that lies inside the device.
func (d *Device) read(ctx context.Context, p []byte, off int64) (int, error) {
	if err := d.waitLive(ctx, off); err != nil {
		return 0, err
	}
	end := off + int64(len(p))
	for {
		inval := d.inval.Load() // before the check
		if !d.readable(off, end) {
			if err := d.waitReadable(ctx, off, end); err != nil {
				return 0, err
			}
		}
		n, err := d.disk.ReadAt(p, off)
		// What arrives anew is written to the disk only after its block was
		// counted as invalidated, so if nothing was, what was read is of one age.
		if d.revocable && d.inval.Load() != inval {
			continue
		}
		if n == len(p) {
			return n, nil
		}
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF // the disk is shorter than it said
		}
		return n, ioError("read", int64(len(p)), off, err)
	}
}

// readable says whether all of [off, end) is on the disk.
func (d *Device) readable(off, end int64) bool {
	lo, hi := d.span(off, end)
	return d.nextUnreadable(lo, hi, off, end) == hi
}

// nextUnreadable is the first block of [lo, hi) whose part of [off, end) is not
// on the disk, or hi.
func (d *Device) nextUnreadable(lo, hi, off, end int64) int64 {
	for {
		lo = d.state.nextMissing(lo, hi)
		if lo == hi {
			return hi
		}
		first, last, _ := d.sectors(lo, off, end)
		if !d.state.partial.has(lo, first, last) {
			return lo
		}
		lo++
	}
}

// WriteAtContext writes all of p at off. It does not wait for the source, but
// for one case: an edge that lies inside a sector of a missing block. A write
// that is not inside the device is refused whole with storage.ErrOutOfRange.
func (d *Device) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if d.direct.Load() {
		return d.disk.WriteAt(p, off)
	}
	if err := d.change(ctx, fill{p: p, off: off}, off, int64(len(p))); err != nil {
		return 0, err
	}
	return len(p), nil
}

// CanSplice implements storage.Splicer: when nothing has to be kept of who wrote
// what, which is when the device is complete.
func (d *Device) CanSplice() bool {
	s, ok := d.disk.(storage.Splicer)
	return ok && d.direct.Load() && s.CanSplice()
}

// SpliceAt implements storage.Splicer once CanSplice has said yes.
func (d *Device) SpliceAt(pipe int, off, length int64) error {
	s, ok := d.disk.(storage.Splicer)
	if !ok || !d.direct.Load() {
		return errors.ErrUnsupported
	}
	return s.SpliceAt(pipe, off, length)
}

// ZeroAtContext makes [off, off+length) read as zeroes, exactly. With punch the
// space may be given back. It waits as WriteAtContext does.
func (d *Device) ZeroAtContext(ctx context.Context, off, length int64, punch bool) error {
	if d.direct.Load() {
		if err := storage.CheckRange(off, length, uint64(d.size)); err != nil {
			return err
		}
		return d.eachChunk(ctx, off, off+length, func(off, end int64) error {
			return d.put(fill{punch: punch}, off, end)
		})
	}
	return d.change(ctx, fill{punch: punch}, off, length)
}

// CanFastZero says whether there is a quick way to zero, which is a matter of
// the disk.
func (d *Device) CanFastZero() bool {
	z, ok := d.disk.(storage.FastZeroer)
	return ok && z.CanZeroFast()
}

// FastZeroAtContext is ZeroAtContext where that takes less time than to write
// the range, and does not wait for the source. Where that is not so, nothing is
// changed, and the error is errors.ErrUnsupported.
func (d *Device) FastZeroAtContext(ctx context.Context, off, length int64, punch bool) error {
	if err := storage.CheckRange(off, length, uint64(d.size)); err != nil {
		return err
	}
	f := fill{punch: punch, fast: true}
	if d.direct.Load() {
		return d.put(f, off, off+length)
	}
	if !d.isLive.Load() {
		return errors.ErrUnsupported
	}
	if _, _, ok := d.waitsFor(f, off, off+length); !ok && length > 0 {
		return errors.ErrUnsupported
	}
	return d.change(ctx, f, off, length)
}

// TrimAtContext gives [off, off+length) back: what lies in whole sectors of it
// reads as zeroes afterwards, the rest is left alone. Once the device is complete the
// disk is told instead, and what the range reads as is not defined. It never waits for
// the source.
func (d *Device) TrimAtContext(ctx context.Context, off, length int64) error {
	if err := storage.CheckRange(off, length, uint64(d.size)); err != nil {
		return err
	}
	end := off + length
	off = (off + sectorSize - 1) &^ (sectorSize - 1)
	if end != d.size {
		end &^= sectorSize - 1
	}
	if off >= end {
		return nil
	}
	f := fill{punch: true, trim: true}
	if !d.direct.Load() {
		return d.change(ctx, f, off, end-off)
	}
	if t, ok := d.disk.(storage.Trimmer); ok { // no bit depends on what it reads as
		return d.eachChunk(ctx, off, end, func(off, end int64) error {
			if err := t.TrimAt(off, end-off); err != nil {
				return ioError("trim", end-off, off, err)
			}
			return nil
		})
	}
	return d.ZeroAtContext(ctx, off, end-off, true)
}

// eachChunk calls do for the pieces of [off, end), until it fails, ctx ends or the
// device is closed.
func (d *Device) eachChunk(ctx context.Context, off, end int64, do func(off, end int64) error) error {
	for off < end {
		if err := d.over(ctx); err != nil {
			return err
		}
		next := min(end, off-off%zeroChunk+zeroChunk)
		if err := do(off, next); err != nil {
			return err
		}
		off = next
	}
	return nil
}

// over is why a long change must not go on: its caller has gone, or the device is
// being closed.
func (d *Device) over(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return fmt.Errorf("lazy: given up: %w", context.Cause(ctx))
	case <-d.closing:
		return ErrClosed
	default:
		return nil
	}
}

// SyncContext returns when every write that was answered before the call, to
// whomever, is on stable storage. A flush that failed is final: this and every
// later write and flush fails with it.
func (d *Device) SyncContext(ctx context.Context) error {
	if !d.ops.enter() {
		return ErrClosed
	}
	defer d.ops.leave()
	return d.flush.flush(ctx, d, false)
}

// Prefetch asks the source for what is missing of [off, off+length) and does not
// wait for it.
func (d *Device) Prefetch(off, length int64) error {
	if err := storage.CheckRange(off, length, uint64(d.size)); err != nil {
		return err
	}
	if d.direct.Load() || length == 0 {
		return nil
	}
	if !d.ops.enter() {
		return ErrClosed
	}
	defer d.ops.leave()
	lo, hi := d.span(off, off+length)
	d.waits.prefetch(d, lo, hi)
	return nil
}

// zeroChunk is the most that is zeroed, in bytes, while its blocks are claimed.
const zeroChunk = 32 << 20

// change writes f to [off, off+length) on behalf of a client.
func (d *Device) change(ctx context.Context, f fill, off, length int64) error {
	if err := storage.CheckRange(off, length, uint64(d.size)); err != nil {
		return err
	}
	if !d.ops.enter() {
		return ErrClosed
	}
	defer d.ops.leave()
	if length == 0 {
		return nil
	}
	if err := d.waitLive(ctx, off); err != nil {
		return err
	}
	end := off + length
	flight := d.capture.begin(f, off, end, d.size)
	err := d.changeAll(ctx, f, off, end)
	d.capture.end(flight, f, err)
	return err
}

// changeAll is change for a range that lies inside a device that is live.
func (d *Device) changeAll(ctx context.Context, f fill, off, end int64) error {
	start := off
	for off < end {
		next := end
		if f.p == nil {
			next = min(end, (off/d.blockSize+max(1, zeroChunk/d.blockSize))*d.blockSize)
			if err := d.over(ctx); err != nil && off > start {
				return err
			}
		}
		err := d.changeRun(ctx, f, off, next)
		if f.fast && off > start && errors.Is(err, errors.ErrUnsupported) {
			f.fast = false // a part is changed already: the rest has to follow
			continue
		}
		if err != nil {
			return err
		}
		off = next
	}
	return nil
}

// changeRun is change for what is claimed at once.
func (d *Device) changeRun(ctx context.Context, f fill, off, end int64) error {
	if err := d.flush.failure(); err != nil {
		return err
	}
	lo, hi := d.span(off, end)
	if d.nextUnsettled(lo, hi) == hi {
		return d.overwrite(f, off, end)
	}
	for {
		c := d.claims.acquire(lo, hi)
		from, to, ok := d.waitsFor(f, off, end)
		if ok {
			err := d.overwrite(f, off, end)
			if err == nil {
				err = d.recallEdges(off, end)
			}
			if err == nil {
				d.publishWritten(off, end)
			} else if !f.fast || !errors.Is(err, errors.ErrUnsupported) { // that changes nothing
				d.knownZero.Store(false) // who knows what is there now
			}
			d.claims.release(c)
			return err
		}
		d.claims.release(c) // never held over a wait
		switch {
		case f.fast:
			return errors.ErrUnsupported
		case f.trim: // all but that block
			if from > off {
				end = from
			} else if off = min(to, end); off == end {
				return nil
			}
			lo, hi = d.span(off, end)
			continue
		}
		if err := d.waitReadable(ctx, from, to); err != nil {
			return err
		}
	}
}

// waitsFor finds what has to be on the disk before f can be written to [off, end):
// the sector at an edge that lies inside it, or a block that is written in part and
// can have no mask. The caller holds the claim of the blocks. ok reports that there is
// nothing.
func (d *Device) waitsFor(f fill, off, end int64) (from, to int64, ok bool) {
	if from, to, ok = d.loneEdge(off, end); !ok || f.redo || d.state.partial.limit == math.MaxInt64 {
		return from, to, ok
	}
	lo, hi := d.span(off, end)
	for _, block := range [...]int64{lo, hi - 1} {
		from, to = d.extent(block)
		whole := off <= from && to <= end
		if !whole && d.nextUnsettled(block, block+1) == block && !d.state.partial.takes(block) {
			return from, to, false
		}
	}
	return 0, 0, true
}

// nextUnsettled is the first block of [lo, hi) whose contents may yet come from
// the source, or hi. A write to a settled block needs no claim, since its state
// can never change again.
func (d *Device) nextUnsettled(lo, hi int64) int64 {
	if d.revocable {
		return d.state.nextUnwritten(lo, hi)
	}
	return d.state.nextMissing(lo, hi)
}

// nextSettled is the first block of [lo, hi) that is settled, or hi.
func (d *Device) nextSettled(lo, hi int64) int64 {
	if d.revocable {
		return d.state.nextWritten(lo, hi)
	}
	return d.state.nextLocal(lo, hi)
}

// loneEdge finds an edge of [off, end) that lies inside a sector which is not on
// the disk: with the write alone the sector would be neither the source's nor
// ours. It returns the range of that sector, or ok if there is none.
func (d *Device) loneEdge(off, end int64) (from, to int64, ok bool) {
	if off%sectorSize != 0 {
		from = off &^ (sectorSize - 1)
		if to = min(from+sectorSize, d.size); !d.readable(from, to) {
			return from, to, false
		}
	}
	if end%sectorSize != 0 && end != d.size {
		from = end &^ (sectorSize - 1)
		if to = min(from+sectorSize, d.size); !d.readable(from, to) {
			return from, to, false
		}
	}
	return 0, 0, true
}

// publishWritten records that [off, end) was written here and is on the disk.
// The caller holds the claim of its blocks.
func (d *Device) publishWritten(off, end int64) {
	lo, hi := d.span(off, end)
	first, last := lo, hi // the blocks that were written whole
	if start, _ := d.extent(lo); off > start {
		d.publishSectors(lo, off, end)
		first++
	}
	if _, stop := d.extent(hi - 1); end < stop && first < hi {
		d.publishSectors(hi-1, off, end)
		last--
	}
	for from := d.nextUnsettled(first, last); from < last; {
		to := d.nextSettled(from, last)
		d.publishBlocks(from, to)
		from = d.nextUnsettled(to, last)
	}
	d.waits.changed(d, lo, hi)
}

// publishSectors is publishWritten for a block at an edge of [off, end).
func (d *Device) publishSectors(block, off, end int64) {
	if d.nextUnsettled(block, block+1) > block {
		return // nobody will ever write over it
	}
	first, last, count := d.sectors(block, off, end)
	if d.state.partial.add(block, first, last, count) {
		d.publishBlocks(block, block+1)
	}
}

// publishBlocks records that [lo, hi) was wholly written here.
func (d *Device) publishBlocks(lo, hi int64) {
	d.state.setWritten(lo, hi) // before the masks go: a reader finds the one or the other
	d.state.partial.drop(lo, hi)
	d.waits.needless(lo, hi)
}
