package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/addr"
)

// sameSignal is how long a further signal counts as the first: timeout(1) and
// shells send one to the process and one to its group.
const sameSignal = 2 * time.Second

// untilSignal returns a context that the first SIGINT, SIGTERM or SIGHUP ends.
// SIGHUP is left alone if it is ignored from the start, as nohup has it. More of
// them change nothing, but for Ctrl-C: pressed again after sameSignal it ends the
// process at once. Call stop when no signal is to be taken any more.
func untilSignal(parent context.Context) (ctx context.Context, stop func()) {
	ctx, cancel := context.WithCancel(parent)
	end := []os.Signal{syscall.SIGINT, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) {
		end = append(end, syscall.SIGHUP)
	}
	came := make(chan os.Signal, 8)
	signal.Notify(came, end...)
	stopped := make(chan struct{})
	go func() {
		var first time.Time
		for {
			select {
			case s := <-came:
				if first.IsZero() {
					first = time.Now()
					cancel()
				} else if s == syscall.SIGINT && time.Since(first) > sameSignal {
					addr.RemoveSockets()
					signal.Reset(syscall.SIGINT)
					_ = syscall.Kill(os.Getpid(), syscall.SIGINT) // us, who are there
				}
			case <-stopped:
				return
			}
		}
	}()
	return ctx, func() {
		close(stopped) // signals are caught on: the exit code is on its way
		cancel()
	}
}

// surviveReaders keeps a reader of standard output or standard error that has
// gone from ending the process: Go kills it at the first write otherwise. Writes
// fail with EPIPE from then on. Children are not affected.
func surviveReaders() { signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) }
