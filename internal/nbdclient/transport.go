package nbdclient

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

// Transport is a connection that has entered transmission and on which nothing
// has been sent since, for one who does the rest, such as the kernel.
type Transport struct {
	Conn     net.Conn
	Size     uint64 // of the export, in bytes
	Flags    uint16 // the transmission flags of the specification
	MinBlock uint32 // what offsets and lengths have to be multiples of, in bytes; 0 if the server did not say
}

// Transmission flags of a Transport.
const (
	FlagReadOnly  = transReadOnly
	FlagMultiConn = 1 << 8 // NBD_FLAG_CAN_MULTI_CONN
)

// DialTransport connects to the target, without TLS, and shakes hands. The
// context bounds that, which also ends after 10 s by itself.
func DialTransport(ctx context.Context, t Target) (*Transport, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, t.Network, t.Address)
	if err != nil {
		return nil, fmt.Errorf("nbd: %w", err)
	}
	_, e, err := shake(ctx, conn, t.Export, nil)
	if err != nil {
		return nil, err
	}
	return &Transport{Conn: conn, Size: e.size, Flags: e.flags, MinBlock: e.minBlock}, nil
}

// File is the connection's socket. Closing it leaves the connection open, and
// the other way round.
func (t *Transport) File() (*os.File, error) {
	c, ok := t.Conn.(interface{ File() (*os.File, error) })
	if !ok {
		return nil, fmt.Errorf("nbd: a %T has no socket", t.Conn)
	}
	return c.File()
}

// ReadAt reads len(p) bytes at off, before the connection is given away. After an
// error, which the context's end is too, it must be closed.
func (t *Transport) ReadAt(ctx context.Context, p []byte, off int64) error {
	stop := context.AfterFunc(ctx, func() {
		_ = t.Conn.SetDeadline(time.Unix(1, 0)) // if it is closed, the read has ended
	})
	defer stop()
	err := t.readAt(p, off)
	if !stop() && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

func (t *Transport) readAt(p []byte, off int64) error {
	b := binary.BigEndian.AppendUint32(nil, requestMagic)
	b = binary.BigEndian.AppendUint32(b, cmdRead)
	b = binary.BigEndian.AppendUint64(b, 0) // the cookie: nothing else is asked for
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	b = binary.BigEndian.AppendUint32(b, uint32(len(p)))
	if _, err := t.Conn.Write(b); err != nil {
		return fmt.Errorf("nbd: %w", err)
	}
	reply := make([]byte, 16)
	if _, err := io.ReadFull(t.Conn, reply); err != nil {
		return fmt.Errorf("nbd: %w", err)
	}
	if magic := binary.BigEndian.Uint32(reply); magic != replyMagic || binary.BigEndian.Uint64(reply[8:]) != 0 {
		return fmt.Errorf("nbd: the server answers a read with %x", reply)
	}
	if e := binary.BigEndian.Uint32(reply[4:]); e != 0 {
		return &Error{"read", off, int64(len(p)), syscall.Errno(e)}
	}
	if _, err := io.ReadFull(t.Conn, p); err != nil {
		return fmt.Errorf("nbd: %w", err)
	}
	return nil
}
