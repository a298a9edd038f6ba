package lazy

import (
	"errors"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// fill is what a range is to be filled with: bytes, or zeroes if p is nil.
type fill struct {
	p     []byte
	off   int64 // where p[0] belongs, in bytes from the start of the device
	punch bool  // zeroes: the space may be given back
	fast  bool  // zeroes: only if that takes less time than writing them
	laid  bool  // bytes: they are there, or were, and need not be written
	redo  bool  // bytes from the log: they wait for no source
	trim  bool  // zeroes: what would have to wait for the source may be left out
}

// zeroes is written where the disk cannot zero by itself.
var zeroes [256 << 10]byte

// put writes f to [off, end) of the disk.
func (d *Device) put(f fill, off, end int64) error {
	if off == end || f.laid {
		return nil
	}
	if f.p == nil {
		if f.fast {
			return d.zeroFast(off, end, f.punch)
		}
		return d.zero(off, end, f.punch)
	}
	if _, err := d.disk.WriteAt(f.p[off-f.off:end-f.off], off); err != nil {
		return ioError("write", end-off, off, err)
	}
	return nil
}

func (d *Device) zeroFast(off, end int64, punch bool) error {
	z, ok := d.disk.(storage.FastZeroer)
	if !ok {
		return errors.ErrUnsupported
	}
	if err := z.ZeroFastAt(off, end-off, punch); err != nil {
		return ioError("zero quickly", end-off, off, err)
	}
	return nil
}

func (d *Device) zero(off, end int64, punch bool) error {
	if z, ok := d.disk.(storage.Zeroer); ok {
		err := z.ZeroAt(off, end-off, punch)
		if err == nil {
			return nil
		}
		if !errors.Is(err, errors.ErrUnsupported) {
			return ioError("zero", end-off, off, err)
		}
	}
	for off < end {
		n := min(end-off, int64(len(zeroes)))
		if _, err := d.disk.WriteAt(zeroes[:n], off); err != nil {
			return ioError("zero", n, off, err)
		}
		off += n
	}
	return nil
}
