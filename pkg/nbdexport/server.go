package nbdexport

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/crowd"
)

// Options of a Server. The zero value works.
type Options struct {
	// TLS, if not nil, is mandatory for every client. It has to hold the
	// server's certificate, and whatever is to be asked of the client's.
	TLS *tls.Config
	// Log takes what goes wrong and who comes and goes; nil for silence.
	Log *slog.Logger
	// StallError ends a request that has waited so long for data with EIO;
	// 0 lets it wait.
	StallError time.Duration
	// OnWait is told of a request that has waited for data for 5, 30 and 60 s,
	// and of one that is given up because of StallError. It may be called
	// several times at once, must not block, and not call back into the Server;
	// nil: a line in the log.
	OnWait func(Wait)
	// MemoryBudget is the bytes that the requests under way of all clients may
	// hold, and again as much those that wait for data, and half as much what a
	// request costs that waits, also without data; 0 means 256 MiB.
	MemoryBudget int64
	// MaxConnections limits the connections, and as many again may be in their
	// handshake, of which the oldest make room for others; 0 means 1024.
	MaxConnections int
	// Expected are the names of exports that are to come: a client that wants one
	// before AddExport waits for it. ExpectAny is for one whose name is not known:
	// whatever name a client wants, it waits until there is an export.
	Expected  []string
	ExpectAny bool
	// OnConnect is called when a client has attached to an export. It must not
	// block.
	OnConnect func(export string)
	// OnDisconnect is called when a client has left an export and none of its
	// requests runs any more; left is how many clients the export still has. It
	// is also called for one that left while its handshake ended, of which
	// OnConnect was not told. It must not block, and not call back into the Server.
	OnDisconnect func(export string, left int)

	pipeStuck time.Duration // a payload that takes longer to write goes through no pipe; 0 means defaultPipeStuck
}

// Errors that end a connection or a Serve.
var (
	// ErrServerClosed is what Serve returns after Shutdown or Close.
	ErrServerClosed = errors.New("nbdexport: server closed")

	errClosed  = errors.New("server closed")
	errRemoved = errors.New("export removed")
	errFull    = errors.New("export has as many clients as it may have")
	errHungUp  = errors.New("client has gone")
	errCrowded = errors.New("too many clients wait for exports")
)

// Server serves exports to NBD clients. All methods may be called at any time
// from any goroutine.
type Server struct {
	o       Options
	log     *slog.Logger
	budget  budget // of requests that run, and replies not sent yet
	waiting budget // of requests that wait for data
	waits   budget // what those cost beside their data, waitCost each

	requests sync.Pool    // of *request
	crowd    *crowd.Crowd // connections in the handshake

	done chan struct{} // closed by Shutdown and Close: nothing new begins
	wg   sync.WaitGroup

	mu sync.Mutex // before export.mu, before conn.mu
	// Guarded by mu:
	exports   []*export     // by name
	added     chan struct{} // closed and made anew by AddExport
	held      []*held       // clients that wait for an export
	listeners map[net.Listener]struct{}
	shaking   map[net.Conn]*crowd.Place // in the handshake
	count     int                       // connections, the ones in the handshake too
	closing   bool
}

// NewServer is a server without exports.
func NewServer(o Options) *Server {
	s := &Server{
		o: o, log: o.Log, done: make(chan struct{}), added: make(chan struct{}),
		listeners: make(map[net.Listener]struct{}), shaking: make(map[net.Conn]*crowd.Place),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.budget.limit = max(cmp.Or(o.MemoryBudget, defaultMemoryBudget), maxPayload)
	s.waiting.limit = s.budget.limit
	s.waits.limit = s.budget.limit / 2
	s.o.pipeStuck = cmp.Or(o.pipeStuck, defaultPipeStuck)
	s.o.MaxConnections = cmp.Or(o.MaxConnections, defaultMaxConnections)
	s.crowd = crowd.New(s.o.MaxConnections)
	return s
}

// AddExport serves e from now on. Its name must not be served already.
func (s *Server) AddExport(e Export) error {
	x, err := newExport(e)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return ErrServerClosed
	}
	i, found := slices.BinarySearchFunc(s.exports, e.Name, byName)
	if found {
		return fmt.Errorf("nbdexport: export %q is served already", e.Name)
	}
	s.exports = slices.Insert(s.exports, i, x)
	close(s.added)
	s.added = make(chan struct{})
	return nil
}

func byName(e *export, name string) int { return cmp.Compare(e.Name, name) }

// RemoveExport ends an export: its clients get what runs, ESHUTDOWN for what
// waits, and are disconnected; then it is flushed. The backend stays open.
func (s *Server) RemoveExport(name string) error {
	s.mu.Lock()
	i, found := slices.BinarySearchFunc(s.exports, name, byName)
	if !found {
		s.mu.Unlock()
		return fmt.Errorf("nbdexport: export %q is not served", name)
	}
	e := s.exports[i]
	s.exports = slices.Delete(s.exports, i, i+1)
	s.mu.Unlock()
	conns := e.remove()
	for _, c := range conns {
		c.stop()
	}
	for _, c := range conns {
		<-c.drained
	}
	return e.sync(context.Background())
}

// lookup finds the export that a client means: by its name, and the empty name
// means the only export too. It returns nil for one that is not there.
func (s *Server) lookup(name string) *export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lookupLocked(name)
}

func (s *Server) lookupLocked(name string) *export {
	if i, found := slices.BinarySearchFunc(s.exports, name, byName); found {
		return s.exports[i]
	}
	if name == "" && len(s.exports) == 1 {
		return s.exports[0]
	}
	return nil
}

func (s *Server) list() []*export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.exports)
}

// Connections is how many clients are attached to exports.
func (s *Server) Connections() int {
	n := 0
	for _, e := range s.list() {
		n += len(e.clients())
	}
	return n
}

// Wait is a request that waits for data.
type Wait struct {
	Export, Command string
	Off, Length     uint64 // in bytes
	Waited          time.Duration
	GivenUp         bool // it ends with EIO now
}

// Waits are the requests that wait for data, and clients that wait for an export.
type Waits struct {
	Count  int           // how many
	Oldest time.Duration // how long the oldest has been waiting
	Export string        // its export
	Off    int64         // and where it begins, in bytes
}

// Waits tells what waits now.
func (s *Server) Waits() Waits {
	var all Waits
	s.mu.Lock()
	for _, w := range s.held {
		all.Count++
		if waited := time.Since(w.since); waited >= all.Oldest {
			all.Oldest, all.Export = waited, w.name
		}
	}
	s.mu.Unlock()
	for _, e := range s.list() {
		for _, c := range e.clients() {
			n, since, off := c.waits()
			all.Count += n
			if n > 0 && time.Since(since) >= all.Oldest {
				all.Oldest, all.Export, all.Off = time.Since(since), e.Name, off
			}
		}
	}
	return all
}

// Serve takes connections from ln until Shutdown or Close, which close it, and
// returns ErrServerClosed then. An error of ln that may pass is logged and
// tried again; any other is returned.
func (s *Server) Serve(ln net.Listener) error {
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return errors.Join(ErrServerClosed, ln.Close())
	}
	s.listeners[ln] = struct{}{}
	s.wg.Add(1)
	s.mu.Unlock()
	defer s.wg.Done()
	defer func() {
		s.mu.Lock()
		delete(s.listeners, ln)
		s.mu.Unlock()
	}()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s.wg.Go(func() {
		select {
		case <-s.done:
			cancel()
		case <-ctx.Done():
		}
	})
	var trouble acceptTrouble
	for {
		nc, err := ln.Accept()
		if err != nil {
			if s.closed() {
				return ErrServerClosed
			}
			if !passes(err) {
				return fmt.Errorf("nbdexport: accept: %w", err)
			}
			trouble.wait(ctx, s.log, err)
			continue
		}
		trouble.next = 0
		s.accept(ctx, nc)
	}
}

// acceptTrouble is what is known of errors of Accept.
type acceptTrouble struct {
	next   time.Duration // pause before the next try
	told   time.Time
	untold int // errors since
}

// wait waits before the next try, longer each time, and says once in a while why.
func (t *acceptTrouble) wait(ctx context.Context, log *slog.Logger, err error) {
	t.untold++
	if now := time.Now(); now.Sub(t.told) >= acceptTold {
		log.Warn("cannot accept a connection now", "err", err, "times", t.untold)
		t.told, t.untold = now, 0
	}
	t.next = min(max(2*t.next, acceptPause), maxAcceptPause)
	timer := time.NewTimer(t.next)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// accept begins to serve a connection, if there may be one more. Those that have
// not finished their handshake make room for it.
func (s *Server) accept(ctx context.Context, nc net.Conn) {
	place, err := s.crowd.Enter(ctx, crowd.Address(nc), func() { nc.Close() })
	if err != nil {
		nc.Close() // the server ends, and the client was told nothing
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if attached := s.count - len(s.shaking); s.closing || attached >= s.o.MaxConnections {
		if !s.closing {
			s.log.Warn("connection refused: too many", "connections", attached, "from", nc.RemoteAddr())
		}
		nc.Close() // the client was told nothing yet: there is nothing to lose
		place.Leave()
		return
	}
	s.count++
	s.shaking[nc] = place
	h := &handshake{s: s, nc: nc, raw: nc}
	s.wg.Go(h.serve)
}

func (s *Server) closed() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

// shook is the end of nc's handshake.
func (s *Server) shook(nc net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shookLocked(nc)
}

func (s *Server) shookLocked(nc net.Conn) {
	if place := s.shaking[nc]; place != nil {
		place.Leave()
		delete(s.shaking, nc)
	}
}

// left is the end of a connection.
func (s *Server) left(nc net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shookLocked(nc)
	s.count--
}

// begin starts the end and returns the exports; it may be called again.
func (s *Server) begin() []*export {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closing {
		s.closing = true
		close(s.done)
	}
	for ln := range s.listeners {
		ln.Close() // Serve sees it and says why
	}
	for nc := range s.shaking {
		nc.SetReadDeadline(time.Now()) // an option under way is answered, no further one read
	}
	return slices.Clone(s.exports)
}

// Shutdown ends gracefully: nobody new, requests that run are finished, those
// that wait get ESHUTDOWN, then the exports are flushed. When ctx ends before,
// the clients are cut off, and the error of ctx is returned without waiting for
// backends that hang. A client that does not take its replies is cut off after
// 5 seconds. The backends stay open.
func (s *Server) Shutdown(ctx context.Context) error {
	exports := s.begin()
	for _, e := range exports {
		for _, c := range e.remove() {
			c.stop()
		}
	}
	gone := make(chan struct{})
	s.endGo(func() { s.wg.Wait(); close(gone) })
	select {
	case <-gone:
	case <-ctx.Done():
		s.cut(exports)
		return fmt.Errorf("nbdexport: shutdown: %w", context.Cause(ctx))
	}
	var errs []error
	for _, e := range exports {
		errs = append(errs, e.sync(ctx))
	}
	return errors.Join(errs...)
}

// endGo runs f, which ends with the last of the server's goroutines.
func (s *Server) endGo(f func()) {
	var wg sync.WaitGroup
	wg.Go(f)
}

func (s *Server) cut(exports []*export) {
	for _, e := range exports {
		for _, c := range e.remove() {
			c.kill(errClosed)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for nc := range s.shaking {
		nc.Close() // its handshake ends with the error
	}
}

// Close cuts all clients off and returns when the last goroutine has gone;
// requests that run are finished, unanswered. It does not flush: Shutdown does.
func (s *Server) Close() error {
	s.cut(s.begin())
	s.wg.Wait()
	return nil
}

// passes says that an error of Accept may be over soon.
func passes(err error) bool {
	var ne net.Error
	//lint:ignore SA1019 it is what tells EMFILE and ECONNABORTED from the end of the listener
	return errors.As(err, &ne) && ne.Temporary()
}
