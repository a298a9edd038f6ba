package addr

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/internal/quick"
)

// Dial connects to a. Connections come tuned.
func (a Addr) Dial(ctx context.Context) (net.Conn, error) {
	if a.IsZero() {
		return nil, errors.New("connect: no address")
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, a.network, a.dialTarget())
	if err != nil {
		return nil, fmt.Errorf("connect to %v: %w%s", a, reason(err), dialHint(err))
	}
	if err := Tune(c); err != nil {
		c.Close() // the error to report is the one before
		return nil, fmt.Errorf("connect to %v: %w", a, err)
	}
	return quick.New(c), nil
}

// Listen listens on a. Accepted connections come tuned. The file of a unix
// socket on which nobody listens any more is replaced; one in use, and any
// file that is no socket, is an error. Closing the listener removes the file.
func (a Addr) Listen(ctx context.Context) (net.Listener, error) {
	if a.IsZero() {
		return nil, errors.New("listen: no address")
	}
	if a.network == "unix" {
		return a.listenUnix(ctx, net.ListenConfig{})
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // its getsockname does not tell the zone of a link-local address
	ln, err := lc.Listen(ctx, a.network, a.hostPort())
	if err != nil {
		return nil, fmt.Errorf("listen on %v: %w%s", a, reason(err), listenHint(err))
	}
	return tunedListener{ln}, nil
}

// ListenPrivate is Listen for a unix socket that only this user, and root, may
// connect to: from its first moment on its file has mode 0600.
func (a Addr) ListenPrivate(ctx context.Context) (net.Listener, error) {
	if a.network != "unix" {
		return nil, fmt.Errorf("listen on %v: it is no unix socket, whose file says who may connect", a)
	}
	return a.listenUnix(ctx, net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		// The mode of a socket that is not bound yet becomes its file's.
		if e := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); e != nil {
			return e
		}
		return err
	}})
}

// Adopt makes a listener that was opened by somebody else like one of Listen,
// but for its file, which stays when it is closed.
func Adopt(ln net.Listener) net.Listener {
	return tunedListener{ln}
}

type tunedListener struct{ net.Listener }

func (l tunedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	// A connection that cannot be tuned has already been reset: whoever reads
	// it will hear of that.
	_ = Tune(c)
	return quick.New(c), nil
}

func (a Addr) listenUnix(ctx context.Context, lc net.ListenConfig) (net.Listener, error) {
	// Two processes that both find a stale file must not remove each other's
	// new one, so looking, removing and binding are one step.
	unlock := lockDir(ctx, filepath.Dir(a.path))
	defer unlock()
	if err := a.removeStale(ctx); err != nil {
		return nil, fmt.Errorf("listen on %v: %w", a, err)
	}
	ln, err := lc.Listen(ctx, "unix", a.path)
	if err != nil {
		return nil, fmt.Errorf("listen on %v: %w%s", a, reason(err), listenHint(err))
	}
	ul := ln.(*net.UnixListener) // what "unix" always gives
	ul.SetUnlinkOnClose(false)   // that would also remove a successor's file
	file, err := os.Lstat(a.path)
	if err != nil {
		ul.Close() // the error to report is the one before
		return nil, fmt.Errorf("listen on %v: %w", a, err)
	}
	l := &unixListener{UnixListener: ul, path: a.path, file: file}
	sockets.Store(l, nil)
	return l, nil
}

// sockets are the *unixListener that listen.
var sockets sync.Map

// RemoveSockets removes the files of all unix sockets on which this process
// listens: for a process that is about to end at once.
func RemoveSockets() {
	sockets.Range(func(l, _ any) bool {
		_ = l.(*unixListener).unlink() // another process finds out that nobody listens there
		return true
	})
}

// removeStale removes the file of a socket on which nobody listens.
func (a Addr) removeStale(ctx context.Context) error {
	file, err := os.Lstat(a.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil // or its directory is missing, which bind says
	}
	if err != nil {
		return reason(err)
	}
	if file.Mode().Type() != os.ModeSocket {
		return errors.New("a file that is no socket lies there: remove it or choose another path")
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", a.path)
	switch {
	case err == nil:
		c.Close() // it was opened only to see that somebody listens
		return fmt.Errorf("%w: another process listens there: stop it or choose another path", syscall.EADDRINUSE)
	case errors.Is(err, syscall.ECONNREFUSED):
		if err := os.Remove(a.path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove the stale socket: %w", reason(err))
		}
		return nil
	case errors.Is(err, os.ErrNotExist):
		return nil // its owner has removed it just now
	case errors.Is(err, syscall.EAGAIN):
		return fmt.Errorf("%w: another process listens there: stop it or choose another path", syscall.EADDRINUSE)
	case errors.Is(err, syscall.EPROTOTYPE):
		return fmt.Errorf("%w: another program's socket lies there: choose another path", syscall.EADDRINUSE)
	}
	return reason(err)
}

// Accept implements net.Listener.
func (l *unixListener) Accept() (net.Conn, error) {
	return tunedListener{l.UnixListener}.Accept()
}

// unixListener removes its socket's file when it is closed, if it is still its own.
type unixListener struct {
	*net.UnixListener
	path string
	file os.FileInfo
	once sync.Once
	err  error // of the first Close
}

// Close implements net.Listener.
func (l *unixListener) Close() error {
	l.once.Do(func() {
		// Removed while it still listens: nobody takes it for stale and puts
		// his own in its place meanwhile.
		l.err = errors.Join(l.unlink(), l.UnixListener.Close())
		sockets.Delete(l)
	})
	return l.err
}

// unlink removes the socket's file if it is still its own.
func (l *unixListener) unlink() error {
	if now, err := os.Lstat(l.path); err != nil || !os.SameFile(now, l.file) {
		return nil
	}
	if err := os.Remove(l.path); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// lockDir keeps other processes that listen in dir out until unlock is called.
// A directory that cannot be opened, or that a stranger keeps locked, is left
// alone after a moment: then only the race of two processes that start in the
// same instant is not excluded.
func lockDir(ctx context.Context, dir string) (unlock func()) {
	f, err := os.Open(dir)
	if err != nil {
		return func() {}
	}
	retry := time.NewTicker(10 * time.Millisecond)
	defer retry.Stop()
	for range 100 {
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			break
		}
		select {
		case <-retry.C:
		case <-ctx.Done():
			f.Close() // only read
			return func() {}
		}
	}
	return func() { f.Close() } // which also unlocks; nothing was written
}

// reason is err without the repetition of operation and address that package
// net and os put around it.
func reason(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	var dns *net.DNSError
	if errors.As(err, &dns) {
		return dns
	}
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

func dialHint(err error) string {
	switch {
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, os.ErrNotExist):
		return ": nobody listens there: is the other side running?"
	case errors.Is(err, os.ErrPermission):
		return ": check the permissions of the path or the firewall"
	}
	return ""
}

func listenHint(err error) string {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return ": another process listens there: stop it or choose another address"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return ": this host has no such address"
	case errors.Is(err, os.ErrNotExist):
		return ": create the directory first"
	case errors.Is(err, os.ErrPermission):
		return ": choose a port above 1023 or a directory that you may write to"
	}
	return ""
}
