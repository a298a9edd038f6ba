package sources

import (
	"errors"
	"fmt"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// zeroes is written where the kernel has no quicker way.
var zeroes [256 << 10]byte

// ZeroAt implements storage.Zeroer: by fallocate, on a block device also by
// BLKZEROOUT, and by writing zeroes where there is no quicker way.
func (f *File) ZeroAt(off, length int64, punch bool) error {
	const op = "zero"
	if err := f.mayWrite(op, off, length); err != nil {
		return err
	}
	if length == 0 {
		return nil // fallocate refuses it
	}
	from, to := f.aligned(off, off+length)
	if from >= to {
		return f.writeZeroes(off, off+length)
	}
	if err := f.writeZeroes(off, from); err != nil {
		return err
	}
	quick, err := f.zeroQuickly(from, to, punch)
	if err != nil {
		return f.opError(op, from, to-from, err)
	}
	if !quick {
		if err := f.writeZeroes(from, to); err != nil {
			return err
		}
	}
	return f.writeZeroes(to, off+length)
}

// zeroQuickly tries the ways to zero a range without writing it.
func (f *File) zeroQuickly(from, to int64, punch bool) (done bool, err error) {
	if punch {
		done, err = f.try(&f.noPunch, func(fd int) error {
			return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, from, to-from)
		})
		if done || err != nil {
			return done, err
		}
	}
	return f.try(&f.noZero, func(fd int) error {
		err := unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, from, to-from)
		if f.block != nil && isUnsupported(err) {
			err = blockRange(fd, unix.BLKZEROOUT, from, to-from)
		}
		return err
	})
}

// TrimAt implements storage.Trimmer: by punching a hole, on a block device by
// BLKDISCARD. Where neither is possible it does nothing: it is a hint.
func (f *File) TrimAt(off, length int64) error {
	if err := f.mayWrite("trim", off, length); err != nil {
		return err
	}
	from, to := f.aligned(off, off+length)
	if from >= to {
		return nil
	}
	never, trim := &f.noPunch, func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, from, to-from)
	}
	if f.block != nil {
		never, trim = &f.noDiscard, func(fd int) error {
			return blockRange(fd, unix.BLKDISCARD, from, to-from)
		}
	}
	if _, err := f.try(never, trim); err != nil {
		return f.opError("trim", off, length, err)
	}
	return nil
}

// ExtentAt implements storage.Extenter by SEEK_DATA and SEEK_HOLE. Where they
// do not exist, as on block devices, all is data.
func (f *File) ExtentAt(off int64) (end int64, hole bool, err error) {
	const op = "search for holes"
	if f.closed.Load() {
		return 0, false, f.opError(op, off, 1, ErrClosed)
	}
	if err := storage.CheckRange(off, 1, uint64(f.size)); err != nil {
		return 0, false, f.opError(op, off, 1, err)
	}
	if f.block != nil {
		return f.size, false, nil
	}
	// The descriptor's position is moved by this and used by nothing.
	err = control(f.raw, func(fd int) (err error) {
		if end, err = unix.Seek(fd, off, unix.SEEK_DATA); errors.Is(err, unix.ENXIO) {
			end, err = f.size, nil // no data from here on
		}
		if hole = end > off; hole || err != nil {
			return err
		}
		end, err = unix.Seek(fd, off, unix.SEEK_HOLE)
		return err
	})
	switch {
	case isUnsupported(err):
		return f.size, false, nil
	case err != nil:
		return 0, false, f.opError(op, off, 1, err)
	}
	return min(end, f.size), hole, nil
}

// try does what the file system or device may not be able to do, which is
// remembered in never.
func (f *File) try(never *atomic.Bool, do func(fd int) error) (done bool, err error) {
	if never.Load() {
		return false, nil
	}
	err = control(f.raw, do)
	if isUnsupported(err) {
		never.Store(true)
		return false, nil
	}
	return err == nil, err
}

// isUnsupported says that the kernel has no such operation here. EINVAL is
// among them since our ranges are aligned and inside the file.
func isUnsupported(err error) bool {
	return errors.Is(err, syscall.EOPNOTSUPP) || errors.Is(err, syscall.ENOSYS) ||
		errors.Is(err, syscall.ENOTTY) || errors.Is(err, syscall.EINVAL)
}

// aligned returns the part of a range that the kernel can zero or discard.
func (f *File) aligned(from, to int64) (int64, int64) {
	if f.block == nil {
		return from, to
	}
	a := f.block.align
	return (from + a - 1) / a * a, to / a * a
}

func (f *File) writeZeroes(from, to int64) error {
	for from < to {
		n := min(to-from, int64(len(zeroes)))
		if _, err := f.file.WriteAt(zeroes[:n], from); err != nil {
			return f.opError("zero", from, n, err)
		}
		from += n
	}
	return nil
}

func (f *File) fdatasync() error {
	if err := control(f.raw, unix.Fdatasync); err != nil {
		return fmt.Errorf("%s: flush: %w", f.path, err)
	}
	return nil
}
