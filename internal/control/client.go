package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"syscall"

	"github.com/silo-nbd/silo-nbd/internal/addr"
)

// maxAnswer is the largest answer that a Client reads, in bytes: some KiB for
// each of the disks, of which there are a few hundred at most.
const maxAnswer = 4 << 20

// ErrCut says that the process has closed the connection without an answer, as one
// that ends does.
var ErrCut = errors.New("it has closed the connection without an answer: its log may say why")

// ErrGone says that nobody serves the control socket.
var ErrGone = errors.New("nobody serves it: is silo-nbd running, with this --control?")

// Client asks a Server.
type Client struct {
	path string
	http http.Client
}

// NewClient returns a Client of the process whose control socket is at path.
func NewClient(path string) (*Client, error) {
	a, err := addr.Unix(path)
	if err != nil {
		return nil, err
	}
	return &Client{path: a.Path(), http: http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DisableKeepAlives:      true,
			MaxResponseHeaderBytes: maxHeader,
			DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return a.Dial(ctx) },
		},
	}}, nil
}

// Status asks how far the process is.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var st Status
	return st, c.soon(ctx, http.MethodGet, "status", nil, &st)
}

// Handoff hands the disks over, and returns when the destination has them. That
// may take long.
func (c *Client) Handoff(ctx context.Context) error {
	return c.HandoffWith(ctx, HandoffArguments{})
}

// HandoffWith is Handoff with arguments.
func (c *Client) HandoffWith(ctx context.Context, args HandoffArguments) error {
	return c.call(ctx, http.MethodPost, "handoff", args, nil)
}

// Abort ends a handoff that has not gone too far.
func (c *Client) Abort(ctx context.Context) error { return c.post(ctx, "abort", nil, nil) }

// SetRate bounds the source's background to n bytes a second; 0 is no bound.
func (c *Client) SetRate(ctx context.Context, n int64) (Background, error) {
	var b Background
	return b, c.post(ctx, "rate", rateArguments{&n}, &b)
}

// Pause holds the source's background.
func (c *Client) Pause(ctx context.Context) (Background, error) {
	var b Background
	return b, c.post(ctx, "pause", nil, &b)
}

// Resume ends a pause.
func (c *Client) Resume(ctx context.Context) (Background, error) {
	var b Background
	return b, c.post(ctx, "resume", nil, &b)
}

// Drain lets the process end once it has finished.
func (c *Client) Drain(ctx context.Context) error { return c.post(ctx, "drain", nil, nil) }

func (c *Client) post(ctx context.Context, what string, args, answer any) error {
	return c.soon(ctx, http.MethodPost, what, args, answer)
}

// soon is call for what is answered at once.
func (c *Client) soon(ctx context.Context, method, what string, args, answer any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTime,
		fmt.Errorf("%s: no answer for %v: the process may be stopped or very busy", c.path, requestTime))
	defer cancel()
	return c.call(ctx, method, what, args, answer)
}

func (c *Client) call(ctx context.Context, method, what string, args, answer any) error {
	var body io.Reader
	if args != nil {
		b, err := json.Marshal(args)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://silo-nbd/v1/"+what, body)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s: %w", c.path, ErrGone)
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return fmt.Errorf("%s: %w", c.path, bare(err))
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return fmt.Errorf("%s: %w", c.path, bare(err))
	}
	if resp.StatusCode == http.StatusOK {
		if answer == nil {
			return nil
		}
		if err := json.Unmarshal(b, answer); err != nil {
			return fmt.Errorf("%s: the answer cannot be understood: is it silo-nbd that listens there? %w", c.path, err)
		}
		return nil
	}
	var no failure
	if json.Unmarshal(b, &no) != nil || no.Error == "" {
		return fmt.Errorf("%s: %s, without a word why: is it silo-nbd that listens there?", c.path, resp.Status)
	}
	return errors.New(no.Error)
}

// bare is err without the URL, which says nothing here, and with words for a
// process that ends before it has answered.
func bare(err error) error {
	var netErr *net.OpError
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return ErrCut
	case errors.As(err, &netErr):
		return netErr.Err
	case errors.Unwrap(err) != nil:
		err = errors.Unwrap(err)
	}
	return fmt.Errorf("it does not answer: %w", err)
}
