package nbdexport

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// hungUp says that the peer has closed the connection, even if what it sent
// before has not been read yet.
func hungUp(nc net.Conn) bool {
	sc, is := nc.(syscall.Conn)
	if !is {
		return false
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return true
	}
	gone := false
	err = rc.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(p, 0)
		gone = err == nil && n > 0 && p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
	})
	return gone || err != nil
}
