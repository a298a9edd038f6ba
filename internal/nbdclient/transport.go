package nbdclient

import (
	"context"
	"fmt"
	"net"
	"os"
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
