package sources

import (
	"io"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// CanSplice implements storage.Splicer.
func (f *File) CanSplice() bool { return !f.quick.noSplice.Load() }

// SpliceAt implements storage.Splicer by splice(2), and by a copy where the file
// system has no such thing.
func (f *File) SpliceAt(pipe int, off, length int64) error {
	if err := f.mayWrite("write", off, length); err != nil {
		return err
	}
	for length > 0 {
		n, err := f.quick.splice(pipe, off, length)
		if isUnsupported(err) {
			f.quick.noSplice.Store(true)
			n, err = f.copyFrom(pipe, off, length)
		}
		switch {
		case err == syscall.EINTR:
			continue
		case err == syscall.EAGAIN, n == 0 && err == nil:
			err = io.ErrUnexpectedEOF // the pipe has less than that
		}
		if err != nil {
			return f.opError("write", off, length, err)
		}
		off += n
		length -= n
	}
	return nil
}

// copyFrom writes some of the length bytes that are in the pipe to off, and says
// how many.
func (f *File) copyFrom(pipe int, off, length int64) (int64, error) {
	b := make([]byte, min(length, 64<<10))
	n, err := unix.Read(pipe, b)
	if err != nil {
		return 0, err
	}
	n, err = f.file.WriteAt(b[:n], off)
	return int64(n), err
}

// splice moves some of length bytes from a pipe to off, and says how many.
func (q *quick) splice(pipe int, off, length int64) (int64, error) {
	op := newQuickOp(q, nil, off)
	defer op.free()
	op.pipe, op.length = pipe, int(min(length, maxQuick))
	if q.raw.Control(op.splice) != nil {
		return 0, ErrClosed
	}
	if op.errno != 0 {
		return 0, op.errno
	}
	return int64(op.n), nil
}

func (op *quickOp) doSplice(fd uintptr) {
	call := syscall.Syscall6
	if op.q.memory {
		call = syscall.RawSyscall6
	}
	n, _, errno := call(unix.SYS_SPLICE, uintptr(op.pipe), 0, fd, uintptr(unsafe.Pointer(&op.off)), uintptr(op.length), unix.SPLICE_F_NONBLOCK)
	if op.errno = errno; errno == 0 {
		op.n = int(n)
	}
}
