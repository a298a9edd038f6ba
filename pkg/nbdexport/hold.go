package nbdexport

import (
	"errors"
	"slices"
	"time"
)

// expectsLocked reports whether an export is to come that a client may mean by name.
func (s *Server) expectsLocked(name string) bool {
	if s.o.ExpectAny && len(s.exports) == 0 {
		return true
	}
	missing := func(expected string) bool {
		_, found := slices.BinarySearchFunc(s.exports, expected, byName)
		return !found
	}
	if name == "" && len(s.o.Expected) == 1 {
		return missing(s.o.Expected[0])
	}
	return slices.Contains(s.o.Expected, name) && missing(name)
}

// expected are the names of the exports that are to come.
func (s *Server) expected() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for _, name := range s.o.Expected {
		if _, found := slices.BinarySearchFunc(s.exports, name, byName); !found {
			names = append(names, name)
		}
	}
	return names
}

// held is a client that waits for an export.
type held struct {
	name  string
	since time.Time
}

// find finds the export that a client means. One that is expected it waits for: a
// client that comes before the source waits for it, as its reads do. It returns nil
// for one that is not to come, and an error when the client has gone, when the
// server ends, or when too many wait already.
func (h *handshake) find(name string) (*export, error) {
	if e := h.s.lookup(name); e != nil {
		return e, nil
	}
	wait := &held{name, time.Now()}
	if expected, err := h.s.hold(wait); !expected {
		return nil, err
	}
	defer h.s.release(wait)
	h.s.shook(h.raw) // it has said what it wants: none takes its place
	if err := h.raw.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	e, err := h.await(wait)
	switch err {
	case nil:
		return e, h.deadline()
	case errClosed: // is answered, and no further option is read
		return nil, errors.Join(h.raw.SetWriteDeadline(time.Now().Add(byeTime)), h.raw.SetReadDeadline(time.Now()), err)
	}
	return nil, err
}

// await waits for the export that w is held for.
func (h *handshake) await(w *held) (*export, error) {
	look := time.NewTicker(lookForClient)
	defer look.Stop()
	for logged := 0; ; {
		e, added := h.s.heldFind(w.name)
		if added == nil {
			return e, nil
		}
		select {
		case <-added:
		case <-h.s.done:
			return nil, errClosed
		case <-look.C:
			if hungUp(h.raw) {
				return nil, errHungUp
			}
			if waited := time.Since(w.since); logged < len(stallLog) && waited >= stallLog[logged] {
				logged++
				h.s.log.Warn("a client waits for an export that has not come yet", "export", w.name,
					"from", h.raw.RemoteAddr(), "waited", waited.Round(time.Second))
			}
		}
	}
}

// hold notes a client that begins to wait, if what it waits for is to come.
func (s *Server) hold(w *held) (expected bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closing:
		return false, errClosed
	case s.lookupLocked(w.name) != nil: // since we looked
	case !s.expectsLocked(w.name):
		return false, nil
	case len(s.held) >= maxHeld:
		return false, errCrowded
	}
	s.held = append(s.held, w)
	return true, nil
}

func (s *Server) release(w *held) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held = slices.DeleteFunc(s.held, func(other *held) bool { return other == w })
}

// heldFind looks for an export that a client waits for. While it is still to come,
// added is closed when one has come.
func (s *Server) heldFind(name string) (e *export, added <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e = s.lookupLocked(name); e == nil && s.expectsLocked(name) {
		return nil, s.added
	}
	return e, nil
}
