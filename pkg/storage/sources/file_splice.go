package sources

import (
	"io"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// CanSplice implements storage.Splicer.
func (f *File) CanSplice() bool { return !f.noSplice.Load() }

// SpliceAt implements storage.Splicer by splice(2), and by a copy where the file
// system has no such thing.
func (f *File) SpliceAt(pipe int, off, length int64) error {
	if err := f.mayWrite("write", off, length); err != nil {
		return err
	}
	for length > 0 {
		n, err := f.splice(pipe, off, length)
		if isUnsupported(err) {
			f.noSplice.Store(true)
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

// maxSplice is the most that one call moves, in bytes.
const maxSplice = 1 << 20

// splice moves some of length bytes from a pipe to off, and says how many.
func (f *File) splice(pipe int, off, length int64) (int64, error) {
	op := spliceOps.Get().(*spliceOp)
	defer spliceOps.Put(op)
	op.pipe, op.off, op.length = pipe, off, int(min(length, maxSplice))
	if f.raw.Control(op.call) != nil {
		return 0, ErrClosed
	}
	if op.errno != 0 {
		return 0, op.errno
	}
	return int64(op.n), nil
}

// spliceOp is one call. Its method is made into a function value once, since that
// costs an allocation.
type spliceOp struct {
	pipe   int
	off    int64
	length int
	call   func(fd uintptr)

	n     int // bytes moved
	errno syscall.Errno
}

var spliceOps = sync.Pool{New: func() any {
	op := new(spliceOp)
	op.call = op.do
	return op
}}

func (op *spliceOp) do(fd uintptr) {
	n, _, errno := syscall.Syscall6(unix.SYS_SPLICE, uintptr(op.pipe), 0, fd, uintptr(unsafe.Pointer(&op.off)), uintptr(op.length), unix.SPLICE_F_NONBLOCK)
	op.n, op.errno = int(n), errno
}
