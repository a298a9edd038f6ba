package migrate

import (
	"context"
	"sync"
)

// turn is taken by whom does what cannot be interrupted, such as a sync of a disk that
// hangs: the next one waits for its end, and those who want the result only as long as
// they like.
type turn chan struct{}

func newTurn() turn { return make(turn, 1) }

// take waits for the turn.
func (t turn) take() { t <- struct{}{} }

func (t turn) leave() { <-t }

// turns are the things under way in turns.
type turns struct{ wg sync.WaitGroup }

// wait waits for all of them. None may begin meanwhile.
func (s *turns) wait() { s.wg.Wait() }

// do does something in its turn, and returns the outcome, or the cause of ctx if that
// ends before. Then it may still be under way, or never have begun.
func (s *turns) do(ctx context.Context, t turn, what func() error) error {
	select {
	case t <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	done := make(chan error, 1)
	s.wg.Go(func() {
		defer t.leave()
		done <- what()
	})
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
