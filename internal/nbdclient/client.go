// Package nbdclient is a small NBD client: fixed newstyle handshake, simple
// replies, any number of requests at once on one connection. The demo, verify
// and the benchmarks look at exports with it, as an ordinary client would.
package nbdclient

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"sync"
	"syscall"
	"time"
)

const (
	requestMagic = 0x25609513 // NBD_REQUEST_MAGIC
	replyMagic   = 0x67446698 // NBD_SIMPLE_REPLY_MAGIC

	cmdRead        = 0 // NBD_CMD_READ
	cmdWrite       = 1 // NBD_CMD_WRITE
	cmdDisc        = 2 // NBD_CMD_DISC
	cmdFlush       = 3 // NBD_CMD_FLUSH
	cmdTrim        = 4 // NBD_CMD_TRIM
	cmdWriteZeroes = 6 // NBD_CMD_WRITE_ZEROES

	flagFUA = 1 << 0 // NBD_CMD_FLAG_FUA

	// maxPayload is the largest READ or WRITE that every server takes, in
	// bytes; larger ones are sent as several.
	maxPayload = 32 << 20
	// maxRange is the largest TRIM or WRITE_ZEROES that is sent, in bytes: a
	// multiple of every block size that fits the field.
	maxRange = 1 << 30

	handshakeTimeout = 10 * time.Second
)

// ErrClosed is what a request gets when the client was closed.
var ErrClosed = errors.New("nbd: the client is closed")

var errNoCertificates = errors.New("the URI wants TLS: certificates are needed for that (--tls DIR)")

// ErrUnsupported says that the server does not offer the command.
var ErrUnsupported = errors.New("nbd: the server does not offer this command")

// Error is a request that the server answered with an error. It wraps the
// errno, so errors.Is(err, syscall.ENOSPC) works.
type Error struct {
	Op       string // "read", "write", …
	Off, Len int64  // the range asked for, in bytes
	Errno    syscall.Errno
}

func (e *Error) Error() string {
	return fmt.Sprintf("nbd: %s of %d bytes at %d: %v", e.Op, e.Len, e.Off, e.Errno)
}

// Unwrap gives the errno.
func (e *Error) Unwrap() error { return e.Errno }

// Client is a connection to one export. Its methods may be called from any
// number of goroutines at once; the requests then run at once too.
type Client struct {
	conn   net.Conn
	export export
	wg     sync.WaitGroup // the reader

	sendMu sync.Mutex // one request on the wire at a time
	head   [28]byte   // guarded by sendMu

	done chan struct{} // closed by readLoop after err is set
	err  error         // why the connection ended; read only after done

	mu sync.Mutex // never held over I/O
	// Guarded by mu:
	closing bool
	unsent  error // why a request could not be sent, for which the connection was closed
	cookie  uint64
	pending map[uint64]*call
}

// call is a request that waits for its reply.
type call struct {
	p     []byte        // where the data of a READ goes, nil otherwise
	errno syscall.Errno // set before done is closed
	done  chan struct{}
}

// Secure makes a connection to host one of TLS; host is empty for a unix
// socket. When it fails it has closed the connection.
type Secure func(ctx context.Context, conn net.Conn, host string) (net.Conn, error)

// Dial connects to the export that an NBD URI without TLS names. The context
// bounds the connecting and the handshake only, which also end after 10 s by
// themselves.
func Dial(ctx context.Context, uri string) (*Client, error) { return DialTLS(ctx, uri, nil) }

// DialTLS is Dial for URIs with TLS too, which are refused if secure is nil.
func DialTLS(ctx context.Context, uri string, secure Secure) (*Client, error) {
	t, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	if t.TLS && secure == nil {
		return nil, fmt.Errorf("nbd: %w", errNoCertificates)
	}
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, t.Network, t.Address)
	if err != nil {
		return nil, fmt.Errorf("nbd: %w", err)
	}
	if !t.TLS {
		return New(ctx, conn, t.Export)
	}
	return enter(ctx, conn, t.Export, func() (net.Conn, error) {
		if err := startTLS(conn); err != nil {
			return nil, err
		}
		return secure(ctx, conn, t.Host)
	})
}

// New enters an export over a connection that is there already. It owns the
// connection from then on, also when it fails.
func New(ctx context.Context, conn net.Conn, exportName string) (*Client, error) {
	return enter(ctx, conn, exportName, nil)
}

// enter is New, after secure, if there is one, has made another connection of
// conn, in the time of the handshake.
func enter(ctx context.Context, conn net.Conn, exportName string, secure func() (net.Conn, error)) (*Client, error) {
	nc, e, err := shake(ctx, conn, exportName, secure)
	if err != nil {
		return nil, err
	}
	c := &Client{conn: nc, export: e, done: make(chan struct{}), pending: make(map[uint64]*call)}
	c.wg.Go(c.readLoop)
	return c, nil
}

// shake is the handshake, in its time; not a byte behind it is read. When it
// fails it has closed the connection.
func shake(ctx context.Context, conn net.Conn, exportName string, secure func() (net.Conn, error)) (net.Conn, export, error) {
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(handshakeTimeout)
	}
	conn.SetDeadline(deadline) // a connection without deadlines has none to wait for
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	nc, e, err := negotiate(conn, exportName, secure)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err == nil && e.size > math.MaxInt64 {
		err = fmt.Errorf("export %q has %d bytes, more than can be addressed here", exportName, e.size)
	}
	if err != nil {
		conn.Close() // its error would hide the one that counts
		return nil, export{}, fmt.Errorf("nbd: %w", err)
	}
	conn.SetDeadline(time.Time{})
	return nc, e, nil
}

// Size is the size of the export in bytes.
func (c *Client) Size() int64 { return int64(c.export.size) }

// ReadOnly says whether the server refuses writes.
func (c *Client) ReadOnly() bool { return c.export.flags&transReadOnly != 0 }

// ReadAt fills p from off, with the contract of io.ReaderAt.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > c.Size() {
		return 0, &Error{Op: "read", Off: off, Len: int64(len(p)), Errno: syscall.EINVAL}
	}
	var end error
	if int64(len(p)) > c.Size()-off {
		p, end = p[:c.Size()-off], io.EOF
	}
	n := 0
	for n < len(p) {
		part := p[n:min(len(p), n+c.payload())]
		if err := c.request("read", cmdRead, 0, off+int64(n), int64(len(part)), nil, part); err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, end
}

// WriteAt writes p at off. What does not lie inside the export is refused by
// the server, not here.
func (c *Client) WriteAt(p []byte, off int64) (int, error) { return c.write(0, p, off) }

// WriteThroughAt is WriteAt, and what it has written is on stable storage when
// it returns (FUA).
func (c *Client) WriteThroughAt(p []byte, off int64) (int, error) {
	if c.export.flags&transSendFUA == 0 {
		return 0, fmt.Errorf("write through: %w", ErrUnsupported)
	}
	return c.write(flagFUA, p, off)
}

func (c *Client) write(flags uint16, p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) {
		part := p[n:min(len(p), n+c.payload())]
		if err := c.request("write", cmdWrite, flags, off+int64(n), int64(len(part)), part, nil); err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, nil
}

// Flush returns when everything that was answered before is on stable storage.
func (c *Client) Flush() error {
	if c.export.flags&transSendFlush == 0 {
		return fmt.Errorf("flush: %w", ErrUnsupported)
	}
	return c.request("flush", cmdFlush, 0, 0, 0, nil, nil)
}

// ZeroAt makes a range read as zeroes without sending them.
func (c *Client) ZeroAt(off, length int64) error {
	if c.export.flags&transSendWriteZeroes == 0 {
		return fmt.Errorf("write zeroes: %w", ErrUnsupported)
	}
	return c.rangeRequest("write zeroes", cmdWriteZeroes, off, length)
}

// TrimAt tells the server that a range is not needed any more.
func (c *Client) TrimAt(off, length int64) error {
	if c.export.flags&transSendTrim == 0 {
		return fmt.Errorf("trim: %w", ErrUnsupported)
	}
	return c.rangeRequest("trim", cmdTrim, off, length)
}

func (c *Client) rangeRequest(op string, cmd uint16, off, length int64) error {
	for length > 0 {
		n := min(length, maxRange)
		if err := c.request(op, cmd, 0, off, n, nil, nil); err != nil {
			return err
		}
		off, length = off+n, length-n
	}
	return nil
}

// Close says goodbye and closes the connection. Requests that still wait get
// ErrClosed.
func (c *Client) Close() error {
	c.mu.Lock()
	first := !c.closing
	c.closing = true
	c.mu.Unlock()
	var err error
	if first {
		c.conn.SetWriteDeadline(time.Now().Add(time.Second)) // a server that does not read must not hold us
		c.send(cmdDisc, 0, 0, 0, 0, nil)                     // a courtesy: the connection closes either way
		// The server may have hung up first, and whoever reads has closed then.
		if err = c.conn.Close(); errors.Is(err, net.ErrClosed) {
			err = nil
		}
	}
	c.wg.Wait()
	return err
}

// payload is the largest READ or WRITE to send, in bytes.
func (c *Client) payload() int {
	if m := int(c.export.maxPayload); m > 0 {
		return min(m, maxPayload)
	}
	return maxPayload
}

// request sends one request and waits for its answer. out is the payload to
// send, in is where the answer's payload goes.
func (c *Client) request(op string, cmd, flags uint16, off, length int64, out, in []byte) error {
	w := &call{p: in, done: make(chan struct{})}
	c.mu.Lock()
	if c.closing {
		c.mu.Unlock()
		return fmt.Errorf("%s of %d bytes at %d: %w", op, length, off, ErrClosed)
	}
	c.cookie++
	cookie := c.cookie
	c.pending[cookie] = w // before sending: the answer can beat send's return
	c.mu.Unlock()

	if err := c.send(cmd, flags, cookie, off, length, out); err != nil {
		c.giveUp(err)
	}
	select {
	case <-w.done:
	case <-c.done:
		select {
		case <-w.done: // it was answered before the end
		default:
			return fmt.Errorf("%s of %d bytes at %d: %w", op, length, off, c.err)
		}
	}
	if w.errno != 0 {
		return &Error{Op: op, Off: off, Len: length, Errno: w.errno}
	}
	return nil
}

// giveUp ends the connection because a request could not be sent: half of it may
// be out. readLoop tells everybody why.
func (c *Client) giveUp(err error) {
	c.mu.Lock()
	if c.unsent == nil {
		c.unsent = err
	}
	c.mu.Unlock()
	c.conn.Close()
}

// send puts one request on the wire.
func (c *Client) send(cmd, flags uint16, cookie uint64, off, length int64, payload []byte) error {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	b := binary.BigEndian.AppendUint32(c.head[:0], requestMagic)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	b = binary.BigEndian.AppendUint32(b, uint32(length))
	bufs := net.Buffers{b}
	if len(payload) > 0 { // the server may have hung up when it had all
		bufs = append(bufs, payload)
	}
	_, err := bufs.WriteTo(c.conn)
	return err
}

// readLoop takes the answers from the connection until it ends, and says why
// to everybody who still waits.
func (c *Client) readLoop() {
	err := c.readReplies()
	c.conn.Close() // ends a sender that is stuck; the cause is in err
	c.mu.Lock()
	switch {
	case c.closing:
		err = ErrClosed
	case c.unsent != nil && (errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrClosedPipe)): // by giveUp
		err = fmt.Errorf("nbd: connection ended: a request could not be sent: %w", c.unsent)
	}
	c.closing = true
	c.mu.Unlock()
	c.err = err
	close(c.done)
}

func (c *Client) readReplies() error {
	var head [16]byte
	for {
		if _, err := io.ReadFull(c.conn, head[:]); err != nil {
			return fmt.Errorf("nbd: connection ended: %w", unexpected(err))
		}
		if magic := binary.BigEndian.Uint32(head[0:]); magic != replyMagic {
			return fmt.Errorf("nbd: connection ended: the server sent a reply with magic %#x", magic)
		}
		cookie := binary.BigEndian.Uint64(head[8:])
		c.mu.Lock()
		w, ok := c.pending[cookie]
		delete(c.pending, cookie)
		c.mu.Unlock()
		if !ok {
			return fmt.Errorf("nbd: connection ended: the server answered request %d, which is not waiting", cookie)
		}
		w.errno = syscall.Errno(binary.BigEndian.Uint32(head[4:]))
		if w.errno == 0 && len(w.p) > 0 {
			if _, err := io.ReadFull(c.conn, w.p); err != nil {
				return fmt.Errorf("nbd: connection ended in the middle of an answer: %w", unexpected(err))
			}
		}
		close(w.done)
	}
}
