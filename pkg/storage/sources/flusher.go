package sources

import (
	"errors"
	"sync/atomic"
)

// flusher runs one fdatasync at a time and shares it: whoever came before it
// began is served by it. One at a time because the kernel reports a lost write
// to one fdatasync only, and no other may answer that all is well meanwhile.
type flusher struct {
	sync  func() error
	turn  chan struct{}         // capacity 1: held by who runs sync
	begun atomic.Uint64         // rounds of sync begun; written by the holder of turn
	err   atomic.Pointer[error] // the first failure, for ever
}

func (s *flusher) init(sync func() error) {
	s.sync = sync
	s.turn = make(chan struct{}, 1)
}

// failed returns the failure of an earlier flush.
func (s *flusher) failed() error {
	if err := s.err.Load(); err != nil {
		return *err
	}
	return nil
}

func (s *flusher) flush() error {
	before := s.begun.Load() // a round after this one covers all that was answered by now
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	if err := s.failed(); err != nil {
		return err
	}
	if s.begun.Load() > before {
		return nil // and it has ended well, as turn is ours
	}
	s.begun.Add(1)
	err := s.sync()
	if err != nil && !errors.Is(err, ErrClosed) {
		s.err.Store(&err)
	}
	return err
}
