package sources

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// probeFastZero finds out whether the kernel gives back a range at once, so
// that it reads as zeroes, without trying it on the data.
func (f *File) probeFastZero() bool {
	if f.rdonly {
		return false
	}
	if f.block != nil {
		return zeroesByItself("/sys/dev/block", f.block.number)
	}
	return f.punchesFiles()
}

// punchesFiles reports whether the file system of the file takes space back. It
// asks with a file that has no name: asked with the disk's, past its end, it would
// change nothing but the disk's times, which prove that the disk was not written.
func (f *File) punchesFiles() bool {
	const page = 4096
	// The directory of the file that the path leads to.
	path, err := filepath.EvalSymlinks(f.path)
	if err != nil {
		return false
	}
	fd, err := unix.Open(filepath.Dir(path), unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return false
	}
	defer unix.Close(fd) // it is gone then
	var ours, theirs unix.Stat_t
	err = errors.Join(unix.Fstat(fd, &ours), control(f.raw, func(fd int) error { return unix.Fstat(fd, &theirs) }))
	if err != nil || ours.Dev != theirs.Dev {
		return false // the file alone is mounted there
	}
	return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, page) == nil
}

// zeroesByItself says whether a block device zeroes a range on a command of
// its own. A partition has what its disk has, whose directory is around its.
func zeroesByItself(sys, number string) bool {
	for _, path := range []string{"queue/write_zeroes_max_bytes", "../queue/write_zeroes_max_bytes"} {
		dir, err := filepath.EvalSymlinks(filepath.Join(sys, number))
		if err != nil {
			return false
		}
		text, err := os.ReadFile(filepath.Join(dir, path))
		if err == nil {
			most, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
			return err == nil && most > 0
		}
	}
	return false
}

// CanZeroFast implements storage.FastZeroer. It is found out by OpenFile.
func (f *File) CanZeroFast() bool { return f.fastZero }

// ZeroFastAt implements storage.FastZeroer: by fallocate only. If it is not
// possible, nothing has changed.
func (f *File) ZeroFastAt(off, length int64, punch bool) error {
	const op = "zero quickly"
	if err := f.mayWrite(op, off, length); err != nil {
		return err
	}
	if length == 0 {
		return nil
	}
	if f.block != nil && !punch { // the kernel would write zeroes where the device cannot
		return f.opError(op, off, length, errors.ErrUnsupported)
	}
	from, to := f.aligned(off, off+length)
	if from >= to {
		return f.writeZeroes(off, off+length) // less than two pages
	}
	done, err := false, error(nil)
	switch {
	case f.block != nil:
		done, err = f.punchDevice(from, to)
	case punch:
		done, err = f.try(&f.noPunch, func(fd int) error {
			return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, from, to-from)
		})
	default:
		done, err = f.try(&f.noZeroRange, func(fd int) error {
			return unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, from, to-from)
		})
	}
	if err == nil && !done {
		err = errors.ErrUnsupported
	}
	if err != nil {
		return f.opError(op, from, to-from, err)
	}
	if err := f.writeZeroes(off, from); err != nil {
		return err
	}
	return f.writeZeroes(to, off+length)
}

// punchDevice gives back a range of a block device. The kernel drops the cached
// pages of the range, those that are not written yet too, before it asks the
// device. So until the device has done it once they are written first; one that
// refuses later has the range zeroed as slowly as may be.
func (f *File) punchDevice(from, to int64) (done bool, err error) {
	known := f.punched.Load()
	done, err = f.try(&f.noPunch, func(fd int) error {
		if !known {
			const all = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
			if err := unix.SyncFileRange(fd, from, to-from, all); err != nil {
				return err
			}
		}
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, from, to-from)
	})
	switch {
	case done:
		f.punched.Store(true)
	case known && err == nil:
		return true, f.writeZeroes(from, to)
	}
	return done, err
}

// deviceNumber is MAJOR:MINOR of an open block device.
func deviceNumber(raw syscall.RawConn) (string, error) {
	var st unix.Stat_t
	if err := control(raw, func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
		return "", fmt.Errorf("ask for the device's number: %w", err)
	}
	return fmt.Sprintf("%d:%d", unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev))), nil
}
