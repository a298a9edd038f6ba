package quick

import (
	"cmp"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// WaitInPlace has whoever reads or writes the connection wait for it in a system
// call of his own from now on, and not with the runtime's poller, if there may be one
// more of such connections: one less than the scheduler has processors. Nothing must
// be read or written meanwhile.
func (c *Conn) WaitInPlace() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.at.Load() != nil || !takePlace() {
		return
	}
	if err := c.replace(); err != nil {
		places.Add(-1)
	}
}

// replace has a place take the socket over. After an error all is as it was.
func (c *Conn) replace() (err error) {
	fd := -1
	if e := c.raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) }); e != nil || err != nil {
		return cmp.Or(e, err)
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		unix.Close(fd) // the socket has another one
		return err
	}
	p := newPlace(fd, wake)
	for s, t := range map[*side]time.Time{&p.in: c.readBy, &p.out: c.writeBy} {
		if !t.IsZero() {
			_ = p.setDeadline(s, t) // it is not closed yet
		}
	}
	c.at.Store(p)
	_ = c.socket.Close() // its descriptor; the connection has another one
	return nil
}

// Close implements net.Conn.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.at.Load(); p != nil {
		return p.close()
	}
	return c.socket.Close()
}

// SetDeadline implements net.Conn.
func (c *Conn) SetDeadline(t time.Time) error {
	return cmp.Or(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.readBy = t
	if p := c.at.Load(); p != nil {
		return p.setDeadline(&p.in, t)
	}
	return c.socket.SetReadDeadline(t)
}

// SetWriteDeadline implements net.Conn.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.writeBy = t
	if p := c.at.Load(); p != nil {
		return p.setDeadline(&p.out, t)
	}
	return c.socket.SetWriteDeadline(t)
}

// CloseWrite ends what is sent, as that of a socket of the standard library does.
func (c *Conn) CloseWrite() (err error) {
	p := c.at.Load()
	if p == nil {
		return c.socket.CloseWrite()
	}
	closed := p.Control(func(fd uintptr) { err = unix.Shutdown(int(fd), unix.SHUT_WR) })
	return cmp.Or(closed, os.NewSyscallError("shutdown", err))
}

// SyscallConn implements syscall.Conn.
func (c *Conn) SyscallConn() (syscall.RawConn, error) { return rawConn{c}, nil }

// rawConn is the socket, wherever it is waited for.
type rawConn struct{ c *Conn }

func (r rawConn) Read(f func(fd uintptr) bool) error  { return r.c.waits().Read(f) }
func (r rawConn) Write(f func(fd uintptr) bool) error { return r.c.waits().Write(f) }

// Control may be called while the socket is replaced.
func (r rawConn) Control(f func(fd uintptr)) error {
	err := r.c.waits().Control(f)
	if p := r.c.at.Load(); err != nil && p != nil {
		return p.Control(f)
	}
	return err
}

// waits is what waits for the socket.
func (c *Conn) waits() syscall.RawConn {
	if p := c.at.Load(); p != nil {
		return p
	}
	return c.raw
}
