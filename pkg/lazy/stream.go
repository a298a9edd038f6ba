package lazy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// Source is what a device needs of where its contents come from. Both are called
// from a goroutine of the device, one call at a time; they may block, as on a
// socket. Offsets and lengths are in bytes, and cover whole blocks (the last of
// the device may be short).
type Source interface {
	// NeedAt says that somebody waits for the range: send it before all else.
	NeedAt(off, length int64)
	// DontNeedAt says that the range is not needed any more.
	DontNeedAt(off, length int64)
}

// Stream is the source's hand on a device, for one session. It is a
// storage.StorageProvider and a storage.Zeroer: what is written to it is what
// arrives.
type Stream struct {
	d    *Device
	src  Source
	ops  *gate         // operations of this session
	kick chan struct{} // capacity 1: there is something to ask
}

var (
	_ storage.StorageProvider = (*Stream)(nil)
	_ storage.Zeroer          = (*Stream)(nil)
)

// Attach begins a session with src. The session before it is over: when Attach
// returns, its operations have ended, and later ones fail with ErrDetached. All
// that is waited for is asked of src. On a closed device the stream is dead from
// the start.
func (d *Device) Attach(src Source) *Stream {
	s := &Stream{d: d, src: src, ops: newGate(), kick: make(chan struct{}, 1)}
	d.attaching.Lock()
	defer d.attaching.Unlock()
	d.detach(d.waits.current())
	if d.ops.isShut() {
		s.ops.shut()
		return s
	}
	d.waits.attach(d, s)
	d.loops.Go(s.askLoop)
	return s
}

// detach ends a session and waits for its operations, which wait for nothing but
// the disk. What is being told to the source is not waited for: it may hang.
func (d *Device) detach(s *Stream) {
	if s == nil {
		return
	}
	d.waits.detach(s)
	s.ops.shut()
	wake(s.kick)
	<-s.ops.idle
}

// Close ends the session: its operations have ended when Close returns, and
// later ones fail with ErrDetached. Readers of what is missing wait on, for the
// next session. It may be called again; the error is always nil.
func (s *Stream) Close() error {
	s.d.attaching.Lock() // else an Attach could return before our operations have ended
	defer s.d.attaching.Unlock()
	s.d.detach(s)
	return nil
}

// Size is the number of bytes of the device.
func (s *Stream) Size() uint64 { return uint64(s.d.size) }

// enter begins an operation of the session.
func (s *Stream) enter() error {
	if !s.ops.enter() {
		if s.d.ops.isShut() {
			return ErrClosed
		}
		return ErrDetached
	}
	return nil
}

// WriteAt takes what arrives: every missing block that p holds whole is written
// to the disk, around the sectors that were written here, and published. Blocks
// that are local, and the parts of blocks at the edges of p, are left alone. A
// write that is not inside the device is refused with storage.ErrOutOfRange; if
// the disk fails nothing is published and the error is returned.
func (s *Stream) WriteAt(p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, storage.CheckRange(off, 0, uint64(s.d.size))
	}
	if err := s.arrive(fill{p: p, off: off}, off, int64(len(p))); err != nil {
		return 0, err
	}
	return len(p), nil
}

// ZeroAt is WriteAt for zeroes: the length, in bytes, may be that of the device.
// With punch the space may be given back. A failure leaves published what was
// zeroed before it.
func (s *Stream) ZeroAt(off, length int64, punch bool) error {
	return s.arrive(fill{punch: punch}, off, length)
}

func (s *Stream) arrive(f fill, off, length int64) error {
	d := s.d
	if err := storage.CheckRange(off, length, uint64(d.size)); err != nil {
		return err
	}
	if err := s.enter(); err != nil {
		return err
	}
	defer s.ops.leave()
	d.waits.heard.Store(time.Now().UnixNano())
	if d.sealed.Load() {
		return ErrComplete
	}
	if err := d.payOwed(); err != nil {
		return err
	}
	// Whole blocks only. The end of the device ends a block, however short.
	lo, hi := blocksOf(off, d.blockSize), (off+length)/d.blockSize
	if off+length == d.size {
		hi = d.state.blocks
	}
	for lo < hi {
		next := hi
		if f.p == nil {
			next = min(hi, lo+max(1, zeroChunk/d.blockSize))
		}
		if err := d.arriveRun(f, lo, next); err != nil {
			return err
		}
		lo = next
	}
	return nil
}

// arriveRun takes the blocks [lo, hi), which f covers.
func (d *Device) arriveRun(f fill, lo, hi int64) error {
	c := d.claims.acquire(lo, hi)
	defer d.claims.release(c)
	if err := d.flush.failure(); err != nil {
		return err
	}
	for from := d.state.nextMissing(lo, hi); from < hi; {
		to := d.state.nextLocal(from, hi)
		if err := d.putAround(f, from, to); err != nil {
			d.knownZero.Store(false) // who knows what is there now
			d.waits.refused(lo, hi, err)
			return err
		}
		from = d.state.nextMissing(to, hi)
	}
	for from := d.state.nextMissing(lo, hi); from < hi; {
		to := d.state.nextLocal(from, hi)
		d.state.setFetched(from, to)
		if !d.revocable { // else the block may have to be merged again
			d.state.partial.drop(from, to)
		}
		from = d.state.nextMissing(to, hi)
	}
	d.waits.changed(d, lo, hi)
	return nil
}

// putAround writes f to the missing blocks [lo, hi), except where sectors were
// written here.
func (d *Device) putAround(f fill, lo, hi int64) error {
	if f.p == nil && d.knownZero.Load() {
		return nil
	}
	from, _ := d.extent(lo) // of what is not yet written
	for block := lo; block < hi && !d.state.partial.none(); block++ {
		if err := d.recallMask(block); err != nil {
			return err
		}
		m := d.state.partial.get(block)
		if m == nil {
			continue
		}
		start, end := d.extent(block)
		_, _, count := d.sectors(block, start, end)
		for s := int64(0); s < count; {
			set := m.nextSet(s, count)
			if set == count {
				break
			}
			if err := d.put(f, from, start+set*sectorSize); err != nil {
				return err
			}
			s = m.nextClear(set, count)
			from = min(start+s*sectorSize, end)
		}
	}
	_, end := d.extent(hi - 1)
	return d.put(f, from, end)
}

// ReadAt reads back what is here, without waiting: ErrMissing if part of it is
// not.
func (s *Stream) ReadAt(p []byte, off int64) (int, error) {
	d := s.d
	if err := storage.CheckRange(off, int64(len(p)), uint64(d.size)); err != nil {
		return 0, err
	}
	if err := s.enter(); err != nil {
		return 0, err
	}
	defer s.ops.leave()
	if len(p) == 0 {
		return 0, nil
	}
	if !d.readable(off, off+int64(len(p))) {
		return 0, ioError("read", int64(len(p)), off, ErrMissing)
	}
	n, err := d.disk.ReadAt(p, off)
	if n == len(p) {
		return n, nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, ioError("read", int64(len(p)), off, err)
}

// Flush returns when all that was taken before is on stable storage.
func (s *Stream) Flush() error {
	if err := s.enter(); err != nil {
		return err
	}
	defer s.ops.leave()
	return s.d.flush.flush(context.Background(), s.d, true)
}

// DirtyList takes back that the blocks were fetched: the source changed them
// since and sends them again. What was written here stays. Every block that
// exists is taken back, also if another does not, which is an error. It is
// refused with ErrLive once the device is live, unless it is Revocable, and with
// ErrComplete once it is complete. When it returns, that is durable: what comes
// for these blocks from then on may be laid over what was there. If there is no
// room for that (NoRoom), the source must send the list again, and until there is
// room nothing that comes is taken.
func (s *Stream) DirtyList(blocks []uint32) error {
	return s.HandleDirtyList(uint32(s.d.blockSize), blocks)
}

// HandleDirtyList is DirtyList for blocks of another size, in bytes: every block
// of the device that touches one of them is taken back.
func (s *Stream) HandleDirtyList(blockSize uint32, blocks []uint32) error {
	d := s.d
	if blockSize == 0 {
		return fmt.Errorf("lazy: dirty list with a block size of 0")
	}
	if err := s.enter(); err != nil {
		return err
	}
	defer s.ops.leave()
	var bad error
	var spans []span // that were taken back
	for len(blocks) > 0 {
		n := min(len(blocks), takeBackAtOnce)
		spans = spans[:0]
		err := d.takeBack(int64(blockSize), blocks[:n], &spans)
		if ferr := d.forget(spans); ferr != nil { // of those before an error, too
			return ferr
		}
		if err != nil && !errors.Is(err, storage.ErrOutOfRange) {
			return err
		}
		bad = cmp.Or(bad, err)
		blocks = blocks[n:]
	}
	return bad
}

// takeBackAtOnce is how many blocks of a dirty list are taken back by one change of
// the map. It bounds what a list costs that does not ascend; our own are no longer.
const takeBackAtOnce = 1 << 20

// takeBack is HandleDirtyList but for the map. It adds what it took back to
// spans.
func (d *Device) takeBack(blockSize int64, blocks []uint32, spans *[]span) error {
	var bad error
	for i := 0; i < len(blocks); {
		n := 1 // of a run of ascending blocks
		for i+n < len(blocks) && int64(blocks[i+n]) == int64(blocks[i])+int64(n) {
			n++
		}
		off := int64(blocks[i]) * blockSize
		end := min(off+int64(n)*blockSize, d.size)
		if last := (int64(blocks[i]) + int64(n) - 1) * blockSize; last >= d.size && bad == nil {
			bad = fmt.Errorf("lazy: dirty list names block %d of %d bytes, past the end of the device at %d: %w",
				blocks[i+n-1], blockSize, d.size, storage.ErrOutOfRange)
		}
		if off < end {
			lo, hi := d.span(off, end)
			if err := d.invalidate(lo, hi); err != nil {
				return err
			}
			*spans = append(*spans, span{lo, hi})
		}
		i += n
	}
	return bad
}

// invalidate takes back that [lo, hi) was fetched.
func (d *Device) invalidate(lo, hi int64) error {
	c := d.claims.acquire(lo, hi) // so that nothing arrives between clearing and counting
	defer d.claims.release(c)
	if err := d.clear(lo, hi); err != nil {
		return err
	}
	d.waits.invalidated(d, lo, hi)
	return nil
}

// clear clears the bits, and counts, unless it is too late for that.
func (d *Device) clear(lo, hi int64) error {
	d.sealMu.Lock()
	defer d.sealMu.Unlock()
	if d.sealed.Load() {
		return ErrComplete
	}
	if (d.isLive.Load() || d.leaving) && !d.revocable {
		return ErrLive
	}
	d.knownZero.Store(false) // what was fetched is still on the disk
	d.state.clearFetched(lo, hi)
	d.inval.Add(1)
	return nil
}
