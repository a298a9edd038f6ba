package migrate

import (
	"bytes"
	"fmt"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// reader reads runs of a disk into a buffer of its own.
type reader struct {
	disk SourceDisk
	geo  geometry
	buf  []byte
	ext  storage.Extenter // nil: the disk knows no holes
	// zero says that what was read last was zero at its end. Only then is a hole
	// looked for: to find the end of data can take as long as to move much of it.
	zero bool
	// The extent that was looked up last, in bytes.
	extFrom, extTo int64
	extHole        bool
}

func (p *pump) newReader() *reader {
	ext, _ := p.disk.Store.(storage.Extenter)
	return &reader{
		disk: p.disk, geo: p.order.geo, ext: ext,
		buf: make([]byte, max(maxPacket, p.order.geo.blockSize)),
	}
}

// run returns how many blocks from block from on can go into one packet of at
// most packet bytes; for a hole, how many lie wholly inside it.
func (r *reader) run(from, packet int64) (blocks int64, hole bool, err error) {
	blocks = packet / r.geo.blockSize
	if r.ext == nil {
		return blocks, false, nil
	}
	off := from * r.geo.blockSize
	if off < r.extFrom || off >= r.extTo {
		if !r.zero {
			return blocks, false, nil
		}
		end, hole, err := r.ext.ExtentAt(off)
		if err != nil {
			return 0, false, err
		}
		r.extFrom, r.extTo, r.extHole = off, end, hole
	}
	if !r.extHole {
		return blocks, false, nil
	}
	inHole, ok := r.geo.inside(off, min(r.extTo-off, maxZeroRun))
	if !ok {
		return 1, false, nil // the hole ends inside the block
	}
	return inHole.len(), true, nil
}

// read returns the bytes of s, which the next call overwrites.
func (r *reader) read(s span) ([]byte, error) {
	off, length := r.geo.bytes(s)
	b := r.buf[:length]
	if n, err := r.disk.Store.ReadAt(b, off); n < len(b) {
		return nil, fmt.Errorf("read %d bytes at %d: %w", length, off, err)
	}
	return b, nil
}

// stretch returns how many blocks at the start of data are alike: all zero, or
// none.
func (r *reader) stretch(data []byte) (blocks int64, zero bool) {
	bs := int(r.geo.blockSize)
	zero = isZero(data[:min(bs, len(data))])
	blocks = 1
	for data = data[min(bs, len(data)):]; len(data) > 0; blocks++ {
		n := min(bs, len(data))
		if isZero(data[:n]) != zero {
			break
		}
		data = data[n:]
	}
	r.zero = zero
	return blocks, zero
}

var zeroes [4096]byte

// isZero says whether all of b is zero. Data is nearly always told by its
// first bytes.
func isZero(b []byte) bool {
	for len(b) > 0 {
		n := min(len(b), len(zeroes))
		if !bytes.Equal(b[:n], zeroes[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}
