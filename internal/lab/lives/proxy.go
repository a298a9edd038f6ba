package lives

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
)

// port is where destinations reach a source: a proxy in this process, which
// keeps connections waiting while there is no source.
type port struct {
	path string // of the socket to connect to
	ln   net.Listener
	wg   sync.WaitGroup

	mu sync.Mutex
	// Guarded by mu:
	target  string // the source's socket; empty: there is no source
	changed chan struct{}
	stalled bool
	closed  bool
	came    int
	conns   map[net.Conn]int // and in which order they came
}

func newPort(path string) (*port, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	p := &port{path: path, ln: ln, changed: make(chan struct{}), conns: map[net.Conn]int{}}
	p.wg.Go(p.acceptLoop)
	return p, nil
}

func (p *port) acceptLoop() {
	for {
		c, err := p.ln.Accept()
		if err != nil {
			return
		}
		if !p.add(c) {
			c.Close() // its peer sees that
			continue
		}
		p.wg.Go(func() {
			defer p.remove(c)
			p.serve(c)
		})
	}
}

func (p *port) add(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	p.came++
	p.conns[c] = p.came
	return true
}

func (p *port) remove(c net.Conn) {
	c.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
}

// serve waits for the source and carries one connection.
func (p *port) serve(c net.Conn) {
	for {
		p.mu.Lock()
		target, changed, stalled, closed := p.target, p.changed, p.stalled, p.closed
		_, there := p.conns[c]
		p.mu.Unlock()
		switch {
		case closed || !there:
			return
		case target == "" || stalled:
			<-changed
			continue
		}
		t, err := net.Dial("unix", target)
		if err != nil || !p.add(t) {
			return
		}
		defer p.remove(t)
		var wg sync.WaitGroup
		pipe := func(to, from net.Conn) {
			_, _ = io.Copy(to, &gated{from, p}) // the end of a connection is no failure here
			to.Close()
			from.Close()
		}
		wg.Go(func() { pipe(t, c) })
		pipe(c, t)
		wg.Wait()
		return
	}
}

// gated reads from a connection while the port is not stalled.
type gated struct {
	net.Conn
	port *port
}

// WriteTo is hidden, so that Read is used.
func (g *gated) Read(b []byte) (int, error) {
	n, err := g.Conn.Read(b)
	for {
		g.port.mu.Lock()
		stalled, changed := g.port.stalled && !g.port.closed, g.port.changed
		_, there := g.port.conns[g.Conn]
		g.port.mu.Unlock()
		if !stalled || !there {
			return n, err
		}
		<-changed
	}
}

func (p *port) change(do func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	do()
	close(p.changed)
	p.changed = make(chan struct{})
}

// lead says where the source is; empty: it has gone.
func (p *port) lead(target string) { p.change(func() { p.target = target }) }

// stall stops all bytes until it is called with false.
func (p *port) stall(on bool) { p.change(func() { p.stalled = on }) }

// cut ends all connections.
func (p *port) cut() {
	p.change(func() {
		for c := range p.conns {
			c.Close() // both ends see that
			delete(p.conns, c)
		}
	})
}

// swap ends the oldest connection.
func (p *port) swap() {
	p.change(func() {
		var oldest net.Conn
		for c, n := range p.conns {
			if oldest == nil || n < p.conns[oldest] {
				oldest = c
			}
		}
		if oldest != nil {
			oldest.Close() // both ends see that
			delete(p.conns, oldest)
		}
	})
}

// close ends the port.
func (p *port) close() {
	p.ln.Close() // the second error of a listener that is closed says nothing
	p.change(func() { p.closed = true })
	p.cut()
	p.wg.Wait()
}
