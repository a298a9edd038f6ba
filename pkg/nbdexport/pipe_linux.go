package nbdexport

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// pipe takes bytes off a socket. It belongs to one goroutine at a time.
type pipe struct {
	r, w   int // its ends, which never block
	socket syscall.RawConn
	move   func(fd uintptr) bool // doMove: a function value costs an allocation
	page   [pipePage]byte        // for pack

	// Of the call under way:
	want  int
	wait  bool
	n     int
	errno syscall.Errno
}

// canSplice says whether this system moves bytes from a socket to a pipe.
var canSplice = sync.OnceValue(func() bool {
	s, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer closeAll(s[:])
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return false
	}
	defer closeAll(p[:])
	if _, err := unix.Write(s[0], []byte{1}); err != nil {
		return false
	}
	n, err := unix.Splice(s[1], nil, p[1], nil, 1, unix.SPLICE_F_NONBLOCK)
	return n == 1 && err == nil
})

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd) // nothing is written that could be lost
	}
}

// newPipe makes a pipe for what comes from nc, or nil where there is none: over
// TLS, or when there are too many open files.
func newPipe(nc net.Conn) *pipe {
	switch nc.(type) {
	case *net.TCPConn, *net.UnixConn, buffersWriter:
	default: // others may change what they read, whatever they are made of
		return nil
	}
	s, is := nc.(syscall.Conn)
	if !is || !canSplice() {
		return nil
	}
	socket, err := s.SyscallConn()
	if err != nil {
		return nil
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil
	}
	p := &pipe{r: fds[0], w: fds[1], socket: socket}
	p.move = p.doMove
	if !p.grow(pipeSize) {
		p.close()
		return nil
	}
	return p
}

// grow has the pipe take size bytes, and says whether it takes what the connection's
// reader may have: of a user with many pipes it may be smaller than that. Less than
// size is no harm.
func (p *pipe) grow(size int) bool {
	_, _ = unix.FcntlInt(uintptr(p.w), unix.F_SETPIPE_SZ, size)
	got, err := unix.FcntlInt(uintptr(p.w), unix.F_GETPIPE_SZ, 0)
	return err == nil && got >= readBuffer
}

func (p *pipe) close() { closeAll([]int{p.r, p.w}) }

// put copies b into the pipe, which is empty.
func (p *pipe) put(b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(p.w, b)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return os.NewSyscallError("write", err)
		}
		b = b[n:]
	}
	return nil
}

// take takes up to n bytes off the socket, and says how many. Where none are there,
// or the pipe is full, it waits for the socket if it is to, or takes none. Of a socket
// that has no such thing, or is at urgent data, which splice does not get past, the error
// is errors.ErrUnsupported, and none are taken.
func (p *pipe) take(n int, wait bool) (int, error) {
	if n == 0 {
		return 0, nil
	}
	p.want, p.wait, p.n, p.errno = n, wait, 0, 0
	if err := p.socket.Read(p.move); err != nil {
		return 0, err
	}
	switch {
	case p.errno == unix.EAGAIN:
		return 0, nil
	case p.errno == unix.EINVAL, p.errno == unix.ENOSYS, p.errno == unix.EOPNOTSUPP:
		return 0, errors.ErrUnsupported
	case p.errno != 0:
		return 0, os.NewSyscallError("splice", p.errno)
	case p.n == 0:
		return 0, io.ErrUnexpectedEOF
	}
	return p.n, nil
}

// doMove is one call, which does not block.
func (p *pipe) doMove(fd uintptr) (done bool) {
	for inVain := 0; ; {
		n, _, errno := syscall.RawSyscall6(unix.SYS_SPLICE, fd, 0, uintptr(p.w), 0, uintptr(p.want), unix.SPLICE_F_NONBLOCK)
		switch {
		case errno == unix.EINTR:
			continue
		case errno == unix.EAGAIN && p.wait:
			if !readable(fd) {
				return false
			}
			if inVain++; inVain < 3 { // it may have come just now
				continue
			}
			errno = unix.EOPNOTSUPP
		}
		if p.errno = errno; errno == 0 {
			p.n = int(n)
		}
		return true
	}
}

// readable says that a socket has something to be read.
func readable(fd uintptr) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(p, 0)
	return err == nil && n > 0
}

// pack puts the n bytes in the pipe, less than a page, side by side. A pipe has
// room for so many pieces, however small they are.
func (p *pipe) pack(n int) error {
	b := p.page[:n]
	if err := p.get(b); err != nil {
		return err
	}
	return p.put(b)
}

// get fills b from the pipe, which has that much.
func (p *pipe) get(b []byte) error {
	for len(b) > 0 {
		m, err := unix.Read(p.r, b)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return os.NewSyscallError("read", err)
		}
		b = b[m:]
	}
	return nil
}
