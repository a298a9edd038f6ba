package metrics

import (
	"context"
	"net"

	"github.com/silo-nbd/silo-nbd/pkg/crowd"
)

// maxConnections is how many connections there may be at once.
const maxConnections = 64

// crowded is ln with a bounded number of connections, of which the oldest make room
// for others: those that say nothing keep no scraper out.
func crowded(ln net.Listener) net.Listener {
	ctx, cancel := context.WithCancel(context.Background())
	return &crowdedListener{Listener: ln, ctx: ctx, cancel: cancel, places: crowd.New(maxConnections)}
}

type crowdedListener struct {
	net.Listener
	ctx    context.Context // the listener's life
	cancel context.CancelFunc
	places *crowd.Crowd
}

// Accept implements net.Listener.
func (l *crowdedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	place, err := l.places.Enter(l.ctx, crowd.Address(c), func() { c.Close() })
	if err != nil {
		c.Close() // it was told nothing yet
		return nil, net.ErrClosed
	}
	return &placedConn{c, place}, nil
}

// Close implements net.Listener.
func (l *crowdedListener) Close() error {
	l.cancel()
	return l.Listener.Close()
}

// placedConn gives its place back when it is closed.
type placedConn struct {
	net.Conn
	place *crowd.Place
}

// Close implements net.Conn.
func (c *placedConn) Close() error {
	c.place.Leave()
	return c.Conn.Close()
}
