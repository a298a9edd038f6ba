package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

// reins are a Pacer and a Handoffer that remember what was asked of them.
type reins struct {
	mu      sync.Mutex
	rate    int64
	paused  bool
	aborted int
	drained int
	begun   chan struct{} // a handoff has begun
	result  chan error    // of the handoff
	full    error         // of NoRoom
	to      string        // of the last handoff
}

func newReins() *reins { return &reins{begun: make(chan struct{}, 8), result: make(chan error)} }

func (r *reins) locked(do func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	do()
}
func (r *reins) SetRate(n int64)     { r.locked(func() { r.rate = n }) }
func (r *reins) Rate() (n int64)     { r.locked(func() { n = r.rate }); return n }
func (r *reins) Pause()              { r.locked(func() { r.paused = true }) }
func (r *reins) Resume()             { r.locked(func() { r.paused = false }) }
func (r *reins) Paused() (is bool)   { r.locked(func() { is = r.paused }); return is }
func (r *reins) AbortHandoff() error { r.locked(func() { r.aborted++ }); return nil }
func (r *reins) NoRoom() (err error) { r.locked(func() { err = r.full }); return err }
func (r *reins) drain()              { r.locked(func() { r.drained++ }) }
func (r *reins) drains() (n int)     { r.locked(func() { n = r.drained }); return n }
func (r *reins) disks() (s []Sample) {
	return []Sample{{DiskStatus: migrate.DiskStatus{Name: "vm", Size: 1 << 20}}}
}
func (r *reins) source() Options {
	return Options{Role: RoleSource, Version: "1", Disks: r.disks, Pace: r, Drain: r.drain}
}
func (r *reins) dest() Options { return Options{Role: RoleDest, Version: "1", Disks: r.disks} }
func (r *reins) HandoffTo(ctx context.Context, to string) error {
	r.locked(func() { r.to = to })
	r.begun <- struct{}{}
	select {
	case err := <-r.result:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// serve starts a server of opts and returns its socket's path.
func serve(t *testing.T, opts Options) (path string, s *Server) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "control")
	ln, err := Listen(t.Context(), path)
	require.NoError(t, err)
	s = Start(ln, NewMonitor(opts), slog.New(slog.DiscardHandler))
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return path, s
}

func client(t *testing.T, path string) *Client {
	t.Helper()
	c, err := NewClient(path)
	require.NoError(t, err)
	return c
}

func TestClientAndServerAgree(t *testing.T) {
	r := newReins()
	path, _ := serve(t, r.source())
	c := client(t, path)
	st, err := c.Status(t.Context())
	require.NoError(t, err)
	require.Equal(t, os.Getpid(), st.PID)
	require.Equal(t, &Background{}, st.Background)
	require.Equal(t, "vm", st.Disks[0].Name)
	require.Equal(t, StateWaitingForDest, st.Disks[0].State)
	b, err := c.SetRate(t.Context(), 5<<20)
	require.NoError(t, err)
	require.Equal(t, Background{RateLimit: 5 << 20}, b)
	b, err = c.Pause(t.Context())
	require.NoError(t, err)
	require.Equal(t, Background{RateLimit: 5 << 20, Paused: true}, b)
	b, err = c.Resume(t.Context())
	require.NoError(t, err)
	require.False(t, b.Paused)
	_, err = c.SetRate(t.Context(), 0)
	require.NoError(t, err)
	require.Zero(t, r.Rate())
	require.NoError(t, c.Drain(t.Context()))
	require.NoError(t, c.Drain(t.Context()))
	require.Equal(t, 1, r.drains(), "a second time changes nothing")
	st, err = c.Status(t.Context())
	require.NoError(t, err)
	require.True(t, st.Draining)
}

// What cannot be done here is said in one line that says where it can.
func TestWhatCannotBeDoneIsRefusedClearly(t *testing.T) {
	r := newReins()
	path, _ := serve(t, r.source())
	c := client(t, path)
	require.EqualError(t, c.Handoff(t.Context()), "nobody uses this disk here, so it was handed over when the destination connected")
	require.EqualError(t, c.Abort(t.Context()), "nobody uses this disk here, so it was handed over when the destination connected")
	_, err := c.SetRate(t.Context(), -1)
	require.ErrorContains(t, err, "below 0")

	path, _ = serve(t, r.dest())
	c = client(t, path)
	require.ErrorContains(t, c.Handoff(t.Context()), "ask the source")
	_, err = c.SetRate(t.Context(), 1)
	require.ErrorContains(t, err, "ask the source")
	_, err = c.Pause(t.Context())
	require.ErrorContains(t, err, "ask the source")
	_, err = c.Resume(t.Context())
	require.ErrorContains(t, err, "ask the source")
	require.ErrorContains(t, c.Drain(t.Context()), "SIGTERM")
	st, err := c.Status(t.Context())
	require.NoError(t, err)
	require.Nil(t, st.Background)
	require.False(t, st.Draining)
}

func TestHandoffWaitsForItsEndAndTellsIt(t *testing.T) {
	r := newReins()
	opts := r.source()
	opts.Hand = r
	path, s := serve(t, opts)
	c := client(t, path)
	call := func(ctx context.Context) chan error {
		result := make(chan error, 1)
		go func() { result <- c.Handoff(ctx) }()
		<-r.begun
		return result
	}
	ended := call(t.Context())
	_, err := c.Status(t.Context())
	require.NoError(t, err, "others are answered meanwhile")
	require.NoError(t, c.Abort(t.Context()))
	r.result <- nil
	require.NoError(t, <-ended)
	r.locked(func() { require.Empty(t, r.to) })
	go func() { ended <- c.HandoffWith(t.Context(), HandoffArguments{To: "0123abcd"}) }()
	<-r.begun
	r.result <- nil
	require.NoError(t, <-ended)
	r.locked(func() { require.Equal(t, "0123abcd", r.to) })
	ended = call(t.Context())
	r.result <- errors.New("the destination has gone")
	require.EqualError(t, <-ended, "the destination has gone")

	ctx, cancel := context.WithCancelCause(t.Context())
	ended = call(ctx)
	leave := errors.New("no patience")
	cancel(leave)
	require.ErrorIs(t, <-ended, leave)

	ended = call(t.Context())
	begin := time.Now()
	require.NoError(t, s.Close())
	require.Less(t, time.Since(begin), 5*time.Second, "a handoff that waits does not hold up the end")
	require.Error(t, <-ended)
	_, err = c.Status(t.Context())
	require.ErrorIs(t, err, ErrGone)
}

// A handoff may take longer than any other request.
func TestHandoffIsNotCutOffByTheTimeouts(t *testing.T) {
	r := newReins()
	opts := r.source()
	opts.Hand = r
	path := filepath.Join(t.TempDir(), "control")
	ln, err := Listen(t.Context(), path)
	require.NoError(t, err)
	s := Start(&quick{Listener: ln}, NewMonitor(opts), slog.New(slog.DiscardHandler))
	defer s.Close()
	ended := make(chan error, 1)
	go func() { ended <- client(t, path).Handoff(t.Context()) }()
	<-r.begun
	select {
	case err := <-ended:
		t.Fatalf("cut off: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	r.result <- nil
	require.NoError(t, <-ended)
}

// quick makes connections whose deadlines come soon.
type quick struct{ net.Listener }

func (q *quick) Accept() (net.Conn, error) {
	c, err := q.Listener.Accept()
	return &quickConn{c}, err
}

type quickConn struct{ net.Conn }

func soon(t time.Time) time.Time {
	if time.Until(t) > time.Second {
		return time.Now().Add(100 * time.Millisecond)
	}
	return t
}
func (c *quickConn) SetReadDeadline(t time.Time) error  { return c.Conn.SetReadDeadline(soon(t)) }
func (c *quickConn) SetWriteDeadline(t time.Time) error { return c.Conn.SetWriteDeadline(soon(t)) }
func (c *quickConn) SetDeadline(t time.Time) error      { return c.Conn.SetDeadline(soon(t)) }

// exchange sends text as it is, and returns the first answer's code and error.
func exchange(t *testing.T, path, text string) (code int, failed string) {
	t.Helper()
	c, err := net.Dial("unix", path)
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, c.SetDeadline(time.Now().Add(20*time.Second)))
	_, _ = io.WriteString(c, text) // it may hang up before all is sent
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	require.NoError(t, err)
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body) // ends with a reset if not all that we sent was read
	var f failure
	_ = json.Unmarshal(b, &f) // net/http's own refusals are plain text
	require.NotContains(t, f.Error, "\n")
	return resp.StatusCode, f.Error
}

func post(path, body string) string {
	return "POST " + path + " HTTP/1.1\r\nHost: x\r\nContent-Length: " + itoa(len(body)) + "\r\n\r\n" + body
}

func itoa(n int) string { b, _ := json.Marshal(n); return string(b) }

// TestBadRequestsAreRefusedAndChangeNothing: whatever somebody says who may
// connect.
func TestBadRequestsAreRefusedAndChangeNothing(t *testing.T) {
	r := newReins()
	r.SetRate(7)
	opts := r.source()
	opts.Hand = r
	path, _ := serve(t, opts)
	for text, want := range map[string]int{
		"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n":                                          200,
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n":                                                   404,
		"GET /v2/status HTTP/1.1\r\nHost: x\r\n\r\n":                                          404,
		"GET /v1/status/ HTTP/1.1\r\nHost: x\r\n\r\n":                                         404,
		"GET /v1/../v1/drain HTTP/1.1\r\nHost: x\r\n\r\n":                                     404,
		"GET /" + strings.Repeat("x", 8000) + " HTTP/1.1\r\nHost: x\r\n\r\n":                  404,
		"GET /v1/drain HTTP/1.1\r\nHost: x\r\n\r\n":                                           405,
		"GET /v1/handoff HTTP/1.1\r\nHost: x\r\n\r\n":                                         405,
		"PUT /v1/rate HTTP/1.1\r\nHost: x\r\n\r\n":                                            405,
		post("/v1/status", ""):                                                                405,
		post("/v1/rate", ""):                                                                  400,
		post("/v1/rate", "{}"):                                                                400,
		post("/v1/rate", "null"):                                                              400,
		post("/v1/rate", "[]"):                                                                400,
		post("/v1/rate", `"1"`):                                                               400,
		post("/v1/rate", `{"bytes_per_second":-1}`):                                           400,
		post("/v1/rate", `{"bytes_per_second":1e99}`):                                         400,
		post("/v1/rate", `{"bytes_per_second":1.5}`):                                          400,
		post("/v1/rate", `{"bytes_per_second":"1"}`):                                          400,
		post("/v1/rate", `{"bytes_per_second":null}`):                                         400,
		post("/v1/rate", `{"bytes_per_second":1}{"bytes_per_second":2}`):                      400,
		post("/v1/rate", `{"bytes_per_second":1,"more":2}`):                                   400,
		post("/v1/rate", `{"bytes_per_second":1`):                                             400,
		post("/v1/rate", strings.Repeat("[", 4000)):                                           400,
		post("/v1/rate", strings.Repeat(" ", maxRequest)+"{}"):                                413,
		post("/v1/rate", `{"bytes_per_second":1}`+strings.Repeat(" ", maxRequest)):            413,
		post("/v1/pause", `{"x":1}`):                                                          400,
		post("/v1/drain", `x`):                                                                400,
		post("/v1/handoff", `{"forced":true}`):                                                400,
		post("/v1/abort", `1`):                                                                400,
		"GET /v1/status HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 1<<20) + "\r\n\r\n": 431,
		"nonsense\r\n\r\n":                                                                    400,
		"\x00\x01\x02\r\n\r\n":                                                                400,
	} {
		code, failed := exchange(t, path, text)
		require.Equal(t, want, code, "%.80q: %s", text, failed)
		require.LessOrEqual(t, len(failed), 400, "%.80q", text)
	}
	require.EqualValues(t, 7, r.Rate())
	require.False(t, r.Paused())
	require.Zero(t, r.drains())
	require.Empty(t, r.begun)
}

// Connections that say nothing are bounded, and let go at the end.
func TestHeldConnectionsAreBounded(t *testing.T) {
	path, s := serve(t, newReins().source())
	before := runtime.NumGoroutine()
	var held []net.Conn
	for range maxConnections {
		c, err := net.Dial("unix", path)
		require.NoError(t, err)
		held = append(held, c)
	}
	c := client(t, path)
	require.Eventually(t, func() bool { _, err := c.Status(t.Context()); return err != nil }, 5*time.Second, 10*time.Millisecond)
	require.LessOrEqual(t, runtime.NumGoroutine(), before+2*maxConnections+8)
	_, err := c.Status(t.Context())
	require.ErrorContains(t, err, "answer")
	require.NoError(t, held[0].Close())
	require.Eventually(t, func() bool { _, err := c.Status(t.Context()); return err == nil }, 5*time.Second, 10*time.Millisecond)
	begin := time.Now()
	require.NoError(t, s.Close())
	require.Less(t, time.Since(begin), 10*time.Second)
	for _, c := range held {
		c.Close() // its other end has gone
	}
}

func TestSocketInUseIsRefusedAndAStaleOneReplaced(t *testing.T) {
	path, _ := serve(t, newReins().source())
	_, err := Listen(t.Context(), path)
	require.ErrorIs(t, err, syscall.EADDRINUSE)
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())

	stale := filepath.Join(t.TempDir(), "stale")
	dead, err := net.Listen("unix", stale)
	require.NoError(t, err)
	dead.(*net.UnixListener).SetUnlinkOnClose(false)
	require.NoError(t, dead.Close())
	_, err = client(t, stale).Status(t.Context())
	require.ErrorIs(t, err, ErrGone)
	ln, err := Listen(t.Context(), stale)
	require.NoError(t, err)
	require.NoError(t, ln.Close())
	_, err = client(t, stale).Status(t.Context())
	require.ErrorIs(t, err, ErrGone)
}

// A Client believes nothing that is not an answer of ours.
func TestClientIsNotFooled(t *testing.T) {
	for answer, want := range map[string]string{
		"":            "without an answer",
		"SSH-2.0-x\n": "malformed",
		"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi":                    "is it silo-nbd",
		"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}":                    "without an answer",
		"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\n{}":                    "500 Oh",
		"HTTP/1.1 301 Go\r\nLocation: http://silo-nbd/v1/status\r\n\r\n":    "without a word",
		"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 64<<10) + "\r\n\r\n": "exceeded",
	} {
		path := filepath.Join(t.TempDir(), "s")
		ln, err := net.Listen("unix", path)
		require.NoError(t, err)
		var wg sync.WaitGroup
		wg.Go(func() {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = http.ReadRequest(bufio.NewReader(c))
			_, _ = io.WriteString(c, answer)
			c.Close()
		})
		_, err = client(t, path).Status(t.Context())
		require.ErrorContains(t, err, want, "%.60q", answer)
		ln.Close()
		wg.Wait()
	}
}

// A handoff to a destination that is known to have no room is refused, with the way
// out, unless it is forced (fault H4).
func TestHandoffToAFullDestinationIsRefusedUnlessForced(t *testing.T) {
	r := newReins()
	opts := r.source()
	opts.Hand = r
	path, _ := serve(t, opts)
	r.locked(func() { r.full = migrate.ErrFull })
	require.ErrorContains(t, client(t, path).Handoff(t.Context()), "no room for more")
	require.ErrorContains(t, client(t, path).Handoff(t.Context()), "make room, or force it")
	require.Empty(t, r.begun)
	ended := make(chan error)
	go func() { ended <- client(t, path).HandoffWith(t.Context(), HandoffArguments{Force: true}) }()
	<-r.begun
	r.result <- nil
	require.NoError(t, <-ended)
}
