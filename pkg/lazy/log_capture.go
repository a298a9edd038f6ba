package lazy

import (
	"encoding/binary"
	"hash/crc32"
	"math/bits"
	"sync"
	"sync/atomic"
)

const (
	maxLogged = 32 << 10 // bytes: a write that is larger is not logged
	maxBatch  = 32 << 10 // bytes: what is written between two flushes is not logged if it is more
	crowdFor  = 16       // flushes after one that was not logged for that
)

// batch is what clients have written since the last flush: a record whose header
// is not yet filled in.
type batch struct {
	buf    []byte // recordLen bytes, then the data of the ranges
	ranges []span // bytes of the disk, in the order in which they were written
}

func newBatch() *batch {
	b := new(batch)
	b.reset()
	return b
}

func (b *batch) reset() {
	b.buf = append(b.buf[:0], zeroes[:recordLen]...)
	b.ranges = b.ranges[:0]
}

func (b *batch) empty() bool { return len(b.ranges) == 0 }

// recordSize is the room that the batch takes in a log, in bytes.
func (b *batch) recordSize() int64 { return aligned(int64(len(b.buf) + rangeLen*len(b.ranges))) }

// add says whether there was room for p.
func (b *batch) add(p []byte, off int64) bool {
	if len(b.buf)+rangeLen*len(b.ranges)+len(p) > maxBatch {
		return false
	}
	b.buf = append(b.buf, p...)
	b.ranges = append(b.ranges, span{off, off + int64(len(p))})
	return true
}

// encode makes a record of the batch, which is of no use any more. docs/MAP.md
// has its bytes.
func (b *batch) encode(device UUID, epoch uint64, index uint32) []byte {
	for _, s := range b.ranges {
		b.buf = binary.LittleEndian.AppendUint64(b.buf, uint64(s.lo))
		b.buf = binary.LittleEndian.AppendUint64(b.buf, uint64(s.hi))
	}
	length := len(b.buf)
	b.buf = append(b.buf, zeroes[:aligned(int64(length))-int64(length)]...)
	h := append(b.buf[:0], logMagic...)
	h = binary.LittleEndian.AppendUint32(h, 0) // the checksum, which comes last
	h = binary.LittleEndian.AppendUint32(h, uint32(length))
	h = append(h, device[:]...)
	h = binary.LittleEndian.AppendUint64(h, epoch)
	h = binary.LittleEndian.AppendUint32(h, index)
	binary.LittleEndian.AppendUint32(h, uint32(len(b.ranges)))
	binary.LittleEndian.PutUint32(b.buf[8:], crc32.Checksum(b.buf[12:length], castagnoli))
	return b.buf
}

// capture collects what clients write, for the log. It is spoiled by every change
// that it does not hold; then the next flush has to be an ordinary one. Of a
// device without a log it is always spoiled, which costs a look.
type capture struct {
	spoiled atomic.Bool // set under mu

	mu sync.Mutex
	// Guarded by mu:
	on         bool
	cur, spare *batch
	crowd      int    // so many flushes more are not worth logging: many write at once
	spoils     uint64 // how often it was spoiled
	busy       uint64 // the flights in use, a bit each
	flights    [64]inFlight
}

// inFlight is a write that is going on.
type inFlight struct {
	off, end int64
	spoils   uint64 // when it began
	tangled  bool   // with another one: nobody knows which of them the disk has
}

// noFlight is a change that is not collected.
const noFlight = -1

// start has what is written from the next flush on collected. That one is an
// ordinary flush: what an earlier process wrote, and did not flush, is on the
// disk for everybody to see, but perhaps not durable.
func (c *capture) start() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.on, c.cur, c.spare = true, newBatch(), newBatch()
	c.spoilLocked()
}

// stop ends that for good.
func (c *capture) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.on, c.cur, c.spare = false, nil, nil
	c.spoilLocked()
}

func (c *capture) spoil() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.spoilLocked()
}

func (c *capture) spoilLocked() {
	c.spoils++
	c.spoiled.Store(true)
}

// begin comes before a change of [off, end) of a disk of size bytes. Whole
// sectors only are collected: of a sector that was written in parts, later parts
// may be on the disk when the log is laid over it.
func (c *capture) begin(f fill, off, end, size int64) (flight int) {
	if c.spoiled.Load() || f.p == nil || end-off > maxLogged || off%sectorSize != 0 || end%sectorSize != 0 && end != size {
		return noFlight
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.spoiled.Load() || ^c.busy == 0 {
		return noFlight
	}
	tangled := false
	for b := c.busy; b != 0; b &= b - 1 {
		if o := &c.flights[bits.TrailingZeros64(b)]; off < o.end && o.off < end {
			o.tangled, tangled = true, true
		}
	}
	flight = bits.TrailingZeros64(^c.busy)
	c.busy |= 1 << flight
	c.flights[flight] = inFlight{off: off, end: end, spoils: c.spoils, tangled: tangled}
	return flight
}

// end comes when the change is published, and before it is answered. The change
// is collected only if no other one of its bytes can have been made at the same
// time: no flight, and nothing that is not collected and ended meanwhile.
func (c *capture) end(flight int, f fill, err error) {
	if flight == noFlight && c.spoiled.Load() {
		return // the next flush is an ordinary one, and takes what we did
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if flight != noFlight {
		c.busy &^= 1 << flight
		was := &c.flights[flight]
		if err == nil && !was.tangled && was.spoils == c.spoils && !c.spoiled.Load() {
			if c.cur.add(f.p, f.off) {
				return
			}
			c.crowd = crowdFor
		}
	}
	c.spoilLocked()
}

// take returns what was collected since the last call, and whether that is all
// that was changed. It is the caller's until it calls again.
func (c *capture) take() (b *batch, all bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.on {
		return nil, false
	}
	all = !c.spoiled.Load()
	b = c.cur
	c.cur, c.spare = c.spare, b
	c.renewLocked()
	return b, all
}

// renewLocked begins to collect for the next flush.
func (c *capture) renewLocked() {
	c.cur.reset()
	c.spoiled.Store(c.crowd > 0)
	c.crowd = max(0, c.crowd-1)
}

// drop forgets what was collected: the disk is about to be synced.
func (c *capture) drop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.on {
		c.renewLocked()
	}
}
