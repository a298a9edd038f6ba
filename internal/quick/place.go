package quick

import (
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// place is a socket that the runtime's poller does not have: whoever reads or
// writes it waits for it in place, in a system call. The poller is told of all that
// arrives, also while nobody waits for it, and each time a processor that was idle
// looks for something to do; of a client that sends while its requests run, that
// was a fifth of the time of small writes.
//
// It implements syscall.RawConn.
type place struct {
	fd, wake int // the socket, and an eventfd: a deadline has changed
	in, out  side
	told     atomic.Bool // wake is readable, and remains so

	mu sync.Mutex
	// Guarded by mu:
	users  int // calls under way
	closed bool
}

// side is one of the directions of a place.
type side struct {
	mu     sync.Mutex   // held by the call under way
	until  atomic.Int64 // its deadline in nanoseconds since began; 0 for none
	events int16

	yielded time.Duration // since began; guarded by mu
}

// look is how often a deadline is looked at once one has been changed, which is at
// the end of a connection's life.
const look = 10 * time.Millisecond

// yieldAfter is how long who waits again and again keeps a processor to himself.
const yieldAfter = time.Millisecond

// never is a deadline so far away that none is further.
const never = 100 * 365 * 24 * time.Hour

// began is what times are counted from: the clock on the wall may be set back.
var began = time.Now()

// newPlace takes over both descriptors. The socket never blocks.
func newPlace(fd, wake int) *place {
	return &place{fd: fd, wake: wake, in: side{events: unix.POLLIN}, out: side{events: unix.POLLOUT}}
}

// Read calls f until it says that it is done, and waits in between until there is
// something to be read.
func (p *place) Read(f func(fd uintptr) bool) error { return p.do(&p.in, f) }

// Write is Read the other way.
func (p *place) Write(f func(fd uintptr) bool) error { return p.do(&p.out, f) }

// Control calls f with the socket, which stays open until it returns.
func (p *place) Control(f func(fd uintptr)) error {
	if !p.enter() {
		return net.ErrClosed
	}
	defer p.leave()
	f(uintptr(p.fd))
	return nil
}

func (p *place) do(s *side, f func(fd uintptr) bool) error {
	if !p.enter() {
		return net.ErrClosed
	}
	defer p.leave()
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case p.isClosed():
			return net.ErrClosed
		case s.late():
			return os.ErrDeadlineExceeded
		case f(uintptr(p.fd)):
			return nil
		}
		s.yield()
		if err := p.wait(s); err != nil {
			return os.NewSyscallError("poll", err)
		}
	}
}

// yield lets others run now and then. The scheduler does not see that a processor
// whose owner is in a system call most of the time, but never for long, has others
// waiting for it.
func (s *side) yield() {
	if now := time.Since(began); now-s.yielded > yieldAfter {
		s.yielded = now
		runtime.Gosched()
	}
}

// wait waits until the socket is ready, or is worth another look.
func (p *place) wait(s *side) error {
	fds := [2]unix.PollFd{{Fd: int32(p.fd), Events: s.events}, {Fd: int32(p.wake), Events: unix.POLLIN}}
	n, timeout := 2, -1
	if p.told.Load() {
		n, timeout = 1, int(look.Milliseconds())
	}
	if _, err := unix.Poll(fds[:n], timeout); err != nil && err != unix.EINTR {
		return err
	}
	return nil
}

func (s *side) late() bool {
	t := s.until.Load()
	return t != 0 && int64(time.Since(began)) >= t
}

// setDeadline sets s's; the zero time is none.
func (p *place) setDeadline(s *side, t time.Time) error {
	at := int64(0)
	if !t.IsZero() {
		at = max(1, int64(time.Since(began)+min(time.Until(t), never)))
	}
	if !p.enter() {
		return net.ErrClosed
	}
	defer p.leave()
	s.until.Store(at)
	p.tell()
	return nil
}

// tell has those that wait look again, within look.
func (p *place) tell() {
	if p.told.CompareAndSwap(false, true) {
		_, _ = unix.Write(p.wake, []byte{7: 1}) // never fails: it is the only one
	}
}

func (p *place) enter() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed {
		p.users++
	}
	return !p.closed
}

func (p *place) leave() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.users--
	p.endLocked()
}

func (p *place) isClosed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.closed
}

func (p *place) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return net.ErrClosed
	}
	p.closed = true
	p.tell() // those that wait leave then
	p.endLocked()
	return nil
}

// endLocked closes the descriptors once nobody uses them any more.
func (p *place) endLocked() {
	if p.closed && p.users == 0 && p.fd >= 0 {
		unix.Close(p.fd) // nobody is left to care for an error
		unix.Close(p.wake)
		p.fd = -1
		places.Add(-1)
	}
}

// places is how many there are. Each may keep a processor of the scheduler for some
// milliseconds while it waits for something to be read, so one is left for all else,
// unless peers do not take what is written either.
var places atomic.Int32

func takePlace() bool {
	if int(places.Add(1)) < runtime.GOMAXPROCS(0) {
		return true
	}
	places.Add(-1)
	return false
}
