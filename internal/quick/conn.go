// Package quick reads and writes sockets without telling the Go scheduler.
//
// A system call that may block has to be announced to the scheduler, which then
// watches it from a thread of its own, many thousand times a second. A socket of
// the runtime's poller never blocks: it moves what it can and says that it would
// have to wait. So there is nothing to watch; on a machine with few processors
// that was a fifth of the time of a stream.
package quick

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// maxCall is the most that one call moves, in bytes, since the scheduler cannot
	// interrupt it.
	maxCall = 1 << 20
	// maxVectors is how many slices one call takes.
	maxVectors = 64
)

// socket is what *net.TCPConn and *net.UnixConn have in common.
type socket interface {
	net.Conn
	syscall.Conn
	CloseWrite() error
}

// Conn is a stream socket with quick Read and Write. All else is the socket's own.
type Conn struct {
	socket
	raw syscall.RawConn
	at  atomic.Pointer[place] // nil, or what has taken the socket's place

	mu sync.Mutex // held while the socket is replaced, closed, or has its deadlines set
	// Guarded by mu:
	readBy, writeBy time.Time // its deadlines
}

// New makes a TCP or unix stream connection quick, and returns others as they
// are.
func New(c net.Conn) net.Conn {
	switch c.(type) {
	case *net.TCPConn, *net.UnixConn:
	default:
		return c
	}
	s := c.(socket)
	raw, err := s.SyscallConn()
	if err != nil {
		return c // closed already, which its Read tells
	}
	return &Conn{socket: s, raw: raw}
}

// NetConn returns the socket, as that of *tls.Conn does. Once the connection is waited
// for in place it is closed, and of no use.
func (c *Conn) NetConn() net.Conn { return c.socket }

// Read implements net.Conn.
func (c *Conn) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	op := newOp()
	defer op.free()
	op.b = b[:min(len(b), maxCall)]
	if err := op.result(c, "read", c.waits().Read(op.read)); err != nil {
		return 0, err
	}
	if op.n == 0 {
		return 0, io.EOF
	}
	return op.n, nil
}

// Write implements net.Conn.
func (c *Conn) Write(b []byte) (int, error) {
	op := newOp()
	defer op.free()
	op.b = b
	err := op.result(c, "write", c.waits().Write(op.write))
	return op.n, err
}

// WriteBuffers writes all of v, in as few system calls as possible, and takes
// what was written out of v, as net.Buffers.WriteTo does on a socket.
func (c *Conn) WriteBuffers(v *net.Buffers) (int64, error) {
	op := newOp()
	defer op.free()
	op.v = v
	err := op.result(c, "writev", c.waits().Write(op.writev))
	return int64(op.n), err
}

// op is one operation. Its methods are made into function values once, since
// that costs an allocation.
type op struct {
	b     []byte       // to be read into, or left to be written
	v     *net.Buffers // left to be written
	iov   [maxVectors]unix.Iovec
	n     int
	errno syscall.Errno

	read, write, writev func(fd uintptr) bool
}

var ops = sync.Pool{New: func() any {
	op := new(op)
	op.read, op.write, op.writev = op.doRead, op.doWrite, op.doWritev
	return op
}}

func newOp() *op { return ops.Get().(*op) }

func (op *op) free() {
	op.b, op.v, op.n, op.errno = nil, nil, 0, 0
	ops.Put(op)
}

// result is the error of the operation, with the names of both ends. waited is
// what waiting for the socket said: that it is closed, or a deadline over.
func (op *op) result(c *Conn, name string, waited error) error {
	err := waited
	if named, ok := errors.AsType[*net.OpError](waited); ok {
		err = named.Err // of the operation "raw-read", which nobody has asked for
	}
	if err == nil && op.errno != 0 {
		err = os.NewSyscallError(name, op.errno)
	}
	if err == nil {
		return nil
	}
	return &net.OpError{Op: name, Net: c.LocalAddr().Network(), Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}

// failed says whether the operation has ended, and not only one call: false waits
// for the socket and tries again.
func (op *op) failed(errno syscall.Errno) (ended bool) {
	if errno == syscall.EAGAIN {
		return false
	}
	op.errno = errno
	return true
}

func (op *op) doRead(fd uintptr) bool {
	n, errno := call(unix.SYS_READ, fd, unsafe.Pointer(&op.b[0]), len(op.b))
	if errno != 0 {
		return op.failed(errno)
	}
	op.n = n
	return true
}

func (op *op) doWrite(fd uintptr) bool {
	for len(op.b) > 0 {
		n, errno := call(unix.SYS_WRITE, fd, unsafe.Pointer(&op.b[0]), min(len(op.b), maxCall))
		if errno != 0 {
			return op.failed(errno)
		}
		op.n += n
		op.b = op.b[n:]
	}
	return true
}

func (op *op) doWritev(fd uintptr) bool {
	for {
		vectors := op.fill()
		if vectors == 0 {
			return true
		}
		n, errno := call(unix.SYS_WRITEV, fd, unsafe.Pointer(&op.iov[0]), vectors)
		clear(op.iov[:vectors])
		if errno != 0 {
			return op.failed(errno)
		}
		op.n += n
		consume(op.v, n)
	}
}

// fill makes vectors of what is left to be written, maxCall bytes at most.
func (op *op) fill() (vectors int) {
	left := maxCall
	for _, b := range *op.v {
		if len(b) == 0 {
			continue
		}
		if vectors == maxVectors || left == 0 {
			break
		}
		n := min(len(b), left)
		op.iov[vectors].Base = &b[0]
		op.iov[vectors].SetLen(n)
		left -= n
		vectors++
	}
	return vectors
}

// consume takes n bytes out of v.
func consume(v *net.Buffers, n int) {
	for len(*v) > 0 && n >= len((*v)[0]) {
		n -= len((*v)[0])
		(*v)[0] = nil
		*v = (*v)[1:]
	}
	if n > 0 {
		(*v)[0] = (*v)[0][n:]
	}
}

// call makes a system call that does not block, again if a signal came between.
func call(trap, fd uintptr, p unsafe.Pointer, n int) (int, syscall.Errno) {
	for {
		r, _, errno := syscall.RawSyscall(trap, fd, uintptr(p), uintptr(n))
		if errno == 0 {
			return int(r), 0
		}
		if errno != syscall.EINTR {
			return 0, errno
		}
	}
}
