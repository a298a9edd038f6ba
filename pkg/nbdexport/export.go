package nbdexport

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/pojntfx/go-nbd/pkg/backend"
)

// Export is what a client can attach to.
type Export struct {
	Name        string // at most 4096 bytes of UTF-8; empty for the default export
	Description string // for people; at most 4096 bytes
	// Backend holds the data. It may implement the optional interfaces of this
	// package. Its size is asked once and stays.
	Backend  backend.Backend
	ReadOnly bool // writes are refused with EPERM
	// MaxConnections limits the clients attached at once; 0 is no limit.
	MaxConnections int
}

// export is an Export being served.
type export struct {
	Export
	store *store

	mu sync.Mutex
	// Guarded by mu:
	conns   map[*conn]struct{} // attached, until the last of their requests has ended
	removed bool
}

func newExport(e Export) (*export, error) {
	for what, s := range map[string]string{"name": e.Name, "description": e.Description} {
		if len(s) > maxName || !utf8.ValidString(s) || strings.ContainsRune(s, 0) {
			return nil, fmt.Errorf("nbdexport: export %.64q: %s: want at most %d bytes of UTF-8 without NUL", e.Name, what, maxName)
		}
	}
	if e.Backend == nil {
		return nil, fmt.Errorf("nbdexport: export %q has no backend", e.Name)
	}
	s, err := newStore(e.Backend)
	if err != nil {
		return nil, fmt.Errorf("nbdexport: export %q: %w", e.Name, err)
	}
	return &export{Export: e, store: s, conns: make(map[*conn]struct{})}, nil
}

// fullLocked says that no further client may attach.
func (e *export) fullLocked() bool {
	if e.MaxConnections == 0 {
		return false
	}
	n := 0
	for c := range e.conns {
		if !c.gone() {
			n++
		}
	}
	return n >= e.MaxConnections
}

// attach makes c a client of the export. First it waits for the clients that
// have gone: what they were writing must not land after what c will write.
func (e *export) attach(c *conn, done <-chan struct{}) error {
	for {
		e.mu.Lock()
		if e.removed {
			e.mu.Unlock()
			return errRemoved
		}
		var gone *conn
		for other := range e.conns {
			if other.gone() {
				gone = other
				break
			}
		}
		if gone == nil {
			defer e.mu.Unlock()
			if e.fullLocked() {
				return errFull
			}
			e.conns[c] = struct{}{}
			return nil
		}
		e.mu.Unlock()
		gone.kill(errHungUp)
		select {
		case <-gone.drained:
		case <-done:
			return errClosed
		}
	}
}

// detach is the end of c: none of its requests runs any more.
func (e *export) detach(c *conn) (left int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.conns, c)
	return len(e.conns)
}

// remove lets nobody attach any more and returns who is attached.
func (e *export) remove() []*conn {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.removed = true
	return e.connsLocked()
}

func (e *export) clients() []*conn {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.connsLocked()
}

func (e *export) connsLocked() []*conn {
	var cs []*conn
	for c := range e.conns {
		cs = append(cs, c)
	}
	return cs
}

// sync makes all writes durable.
func (e *export) sync(ctx context.Context) error {
	if e.ReadOnly {
		return nil
	}
	if err := e.store.flush(ctx); err != nil {
		return fmt.Errorf("nbdexport: export %q: flush: %w", e.Name, err)
	}
	return nil
}
