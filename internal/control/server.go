package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/addr"
)

const (
	// maxRequest is the largest body that is read, and maxHeader the largest
	// head, in bytes. A request is a few words.
	maxRequest = 4 << 10
	maxHeader  = 16 << 10
	// requestTime is how long a request may take to come, and its answer to go.
	requestTime = 10 * time.Second
	// idleTime is how long a connection may be held without a request.
	idleTime = time.Minute
	// maxConnections is how many there may be at once; one more is closed.
	maxConnections = 64
	// closeTime is how long answers under way may hold up Close.
	closeTime = time.Second
)

// Server serves the control socket of a process.
type Server struct {
	monitor *Monitor
	log     *slog.Logger
	http    http.Server
	stop    context.CancelFunc
	loops   sync.WaitGroup
}

// Listen opens the socket at path for this user and root only. One that a dead
// process has left there is replaced, one in use refused.
func Listen(ctx context.Context, path string) (net.Listener, error) {
	a, err := addr.Unix(path)
	if err != nil {
		return nil, err
	}
	return a.ListenPrivate(ctx)
}

// Start serves what m knows, and what can be done about it, on ln until Close.
func Start(ln net.Listener, m *Monitor, log *slog.Logger) *Server {
	ctx, stop := context.WithCancel(context.Background())
	s := &Server{monitor: m, log: log, stop: stop}
	s.http = http.Server{
		Handler:           http.HandlerFunc(s.serve),
		ReadHeaderTimeout: requestTime, ReadTimeout: requestTime, WriteTimeout: requestTime, IdleTimeout: idleTime,
		MaxHeaderBytes: maxHeader,
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		BaseContext:    func(net.Listener) context.Context { return ctx },
	}
	s.loops.Go(func() {
		if err := s.http.Serve(&boundedListener{Listener: ln}); !errors.Is(err, http.ErrServerClosed) {
			log.Error("the control socket cannot be used any more", "error", err)
		}
	})
	return s
}

// Close ends the server, and what waits for a handoff. The socket's file is
// removed.
func (s *Server) Close() error {
	s.stop()
	ctx, cancel := context.WithTimeout(context.Background(), closeTime)
	defer cancel()
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = s.http.Close()
	}
	s.loops.Wait()
	return err
}

// refusal is an answer that is an error.
type refusal struct {
	code int // of HTTP
	text string
}

func (r *refusal) Error() string { return r.text }

func refuse(code int, format string, args ...any) error {
	return &refusal{code, fmt.Sprintf(format, args...)}
}

// route is what can be asked for at a path.
type route struct {
	method string
	answer func(s *Server, w http.ResponseWriter, r *http.Request) (any, error)
}

var routes = map[string]route{
	"/v1/status":  {http.MethodGet, (*Server).status},
	"/v1/handoff": {http.MethodPost, (*Server).handoff},
	"/v1/abort":   {http.MethodPost, (*Server).abort},
	"/v1/rate":    {http.MethodPost, (*Server).rate},
	"/v1/pause":   {http.MethodPost, (*Server).pause},
	"/v1/resume":  {http.MethodPost, (*Server).resume},
	"/v1/drain":   {http.MethodPost, (*Server).drain},
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, maxRequest)
	answer, err := s.route(w, r)
	code := http.StatusOK
	if err != nil {
		code = http.StatusConflict // it cannot be done as things are
		var no *refusal
		if errors.As(err, &no) {
			code = no.code
		}
		answer = failure{Error: err.Error()}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(answer) // whom could we tell?
}

// failure is the answer to what was not done.
type failure struct {
	Error string `json:"error"`
}

func (s *Server) route(w http.ResponseWriter, r *http.Request) (any, error) {
	to, known := routes[r.URL.Path]
	switch {
	case !known:
		return nil, refuse(http.StatusNotFound, "there is no %q here: version 1 has /v1/status, handoff, abort, rate, pause, resume and drain", short(r.URL.Path))
	case r.Method != to.method:
		w.Header().Set("Allow", to.method)
		return nil, refuse(http.StatusMethodNotAllowed, "%s wants %s", r.URL.Path, to.method)
	}
	return to.answer(s, w, r)
}

// short is what of a stranger's text goes into an answer.
func short(s string) string { return s[:min(len(s), 64)] }

// arguments reads the request's body into args. An empty body is an empty object.
func arguments(r *http.Request, args any) error {
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	err := d.Decode(args)
	if errors.Is(err, io.EOF) {
		return nil
	}
	if err == nil {
		switch _, err = d.Token(); {
		case errors.Is(err, io.EOF):
			return nil
		case err == nil:
			err = errors.New("something follows the object")
		}
	}
	var large *http.MaxBytesError
	if errors.As(err, &large) {
		return refuse(http.StatusRequestEntityTooLarge, "the request is larger than %d bytes", maxRequest)
	}
	return refuse(http.StatusBadRequest, "the request cannot be understood: %v", err)
}

// nothing wants no arguments.
func nothing(r *http.Request) error { return arguments(r, &struct{}{}) }

func (s *Server) status(_ http.ResponseWriter, r *http.Request) (any, error) {
	if err := nothing(r); err != nil {
		return nil, err
	}
	return s.monitor.Status(), nil
}

// HandoffArguments are those of /v1/handoff.
type HandoffArguments struct {
	To    string `json:"to,omitempty"`    // the destination; empty: the only one there was
	Force bool   `json:"force,omitempty"` // also to a destination that is known to have no room
}

func (s *Server) handoff(w http.ResponseWriter, r *http.Request) (any, error) {
	var args HandoffArguments
	if err := arguments(r, &args); err != nil {
		return nil, err
	}
	h, err := s.hand()
	if err != nil {
		return nil, err
	}
	if full := h.NoRoom(); full != nil && !args.Force {
		return nil, fmt.Errorf("%w: what is written there after the handoff would fail: make room, or force it", full)
	}
	// It takes as long as it takes.
	c := http.NewResponseController(w)
	if err := errors.Join(c.SetReadDeadline(time.Time{}), c.SetWriteDeadline(time.Time{})); err != nil {
		return nil, err
	}
	s.log.Info("handoff, as was asked for at the control socket")
	err = h.HandoffTo(r.Context(), args.To)
	return struct{}{}, errors.Join(err, c.SetWriteDeadline(time.Now().Add(requestTime)))
}

func (s *Server) abort(_ http.ResponseWriter, r *http.Request) (any, error) {
	if err := nothing(r); err != nil {
		return nil, err
	}
	h, err := s.hand()
	if err != nil {
		return nil, err
	}
	s.log.Info("the handoff is to be aborted, as was asked for at the control socket")
	return struct{}{}, h.AbortHandoff()
}

func (s *Server) hand() (Handoffer, error) {
	switch h := s.monitor.opts.Hand; {
	case h != nil:
		return h, nil
	case s.monitor.opts.Role == RoleSource:
		return nil, refuse(http.StatusNotImplemented, "nobody uses this disk here, so it was handed over when the destination connected")
	}
	return nil, refuse(http.StatusNotImplemented, "a dest cannot hand over: ask the source, at its own control socket")
}

// rateArguments are those of /v1/rate.
type rateArguments struct {
	BytesPerSecond *int64 `json:"bytes_per_second"` // 0: no bound
}

func (s *Server) rate(_ http.ResponseWriter, r *http.Request) (any, error) {
	var args rateArguments
	if err := arguments(r, &args); err != nil {
		return nil, err
	}
	if args.BytesPerSecond == nil || *args.BytesPerSecond < 0 {
		return nil, refuse(http.StatusBadRequest, "bytes_per_second is missing or below 0: want a number, 0 for no bound")
	}
	p, err := s.pacer()
	if err != nil {
		return nil, err
	}
	p.SetRate(*args.BytesPerSecond)
	s.log.Info("another rate, as was asked for at the control socket", "bytes_per_second", *args.BytesPerSecond)
	return background(p), nil
}

func (s *Server) pause(_ http.ResponseWriter, r *http.Request) (any, error) {
	return s.pace(r, "paused, as was asked for at the control socket; what is asked for is sent all the same", Pacer.Pause)
}

func (s *Server) resume(_ http.ResponseWriter, r *http.Request) (any, error) {
	return s.pace(r, "resumed, as was asked for at the control socket", Pacer.Resume)
}

func (s *Server) pace(r *http.Request, told string, do func(Pacer)) (any, error) {
	if err := nothing(r); err != nil {
		return nil, err
	}
	p, err := s.pacer()
	if err != nil {
		return nil, err
	}
	do(p)
	s.log.Info(told)
	return background(p), nil
}

func (s *Server) pacer() (Pacer, error) {
	if p := s.monitor.opts.Pace; p != nil {
		return p, nil
	}
	return nil, refuse(http.StatusNotImplemented, "a dest sends nothing: ask the source, at its own control socket")
}

func background(p Pacer) Background { return Background{RateLimit: p.Rate(), Paused: p.Paused()} }

func (s *Server) drain(_ http.ResponseWriter, r *http.Request) (any, error) {
	if err := nothing(r); err != nil {
		return nil, err
	}
	if s.monitor.opts.Drain == nil {
		return nil, refuse(http.StatusNotImplemented, "this process cannot be drained: end it by SIGTERM")
	}
	if s.monitor.drain() {
		s.log.Info("draining, as was asked for at the control socket: no new NBD clients; ends when all is complete and the last has gone")
		s.monitor.opts.Drain()
	}
	return struct{}{}, nil
}

// boundedListener closes what is more than maxConnections at once.
type boundedListener struct {
	net.Listener
	open atomic.Int64
}

// Accept implements net.Listener.
func (l *boundedListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.open.Add(1) <= maxConnections {
			return &countedConn{Conn: c, open: &l.open}, nil
		}
		l.open.Add(-1)
		c.Close() // it was told nothing yet
	}
}

type countedConn struct {
	net.Conn
	open *atomic.Int64
	once sync.Once
}

// Close implements net.Conn.
func (c *countedConn) Close() error {
	c.once.Do(func() { c.open.Add(-1) })
	return c.Conn.Close()
}
