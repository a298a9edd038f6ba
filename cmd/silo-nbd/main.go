// Silo-nbd moves a disk to another host and serves it there over NBD from the
// first second.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/silo-nbd/silo-nbd/internal/streams"
)

const (
	exitFailure     = 1  // something went wrong
	exitUsage       = 2  // the command line is wrong
	exitInterrupted = 75 // a signal ended it before the end: EX_TEMPFAIL, as sysexits.h has it
)

// lastWords is how long standard error may take to accept what is left to say.
const lastWords = time.Second

func main() {
	ctx, stop := untilSignal(context.Background())
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	surviveReaders() // the exit code is to be ours
	stderr := streams.NewQueue(os.Stderr, nil)
	code := report(err, stderr)
	stderr.Close(lastWords)
	os.Exit(code)
}

// run is the whole program but for its exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	root := newRootCommand()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	return root.ExecuteContext(ctx)
}

// report says in one line why run failed, and returns the exit code.
func report(err error, stderr io.Writer) int {
	code, said := exitCode(err)
	if said != nil {
		line := strings.ReplaceAll(strings.TrimSpace(said.Error()), "\n", "; ")
		fmt.Fprintf(stderr, "silo-nbd: %s\n", streams.Cut(line)) // nothing is left to do if this fails
	}
	return code
}

// exitCode returns the exit code that err stands for, and what is to be said of
// it. An interruption or a code of its own counts only if nothing else went wrong.
func exitCode(err error) (code int, said error) {
	var others, interruptions []error
	code = 0
	for _, e := range leaves(err) {
		var exit *exitError
		var interrupted *interruptedError
		switch {
		case errors.As(e, &exit):
			code = cmp.Or(code, exit.code)
		case errors.As(e, &interrupted):
			interruptions = append(interruptions, e)
		default:
			others = append(others, e)
		}
	}
	said = errors.Join(append(interruptions, others...)...)
	var usage *usageError
	switch {
	case errors.As(err, &usage):
		return exitUsage, said
	case len(others) > 0:
		return exitFailure, said
	case len(interruptions) > 0:
		return exitInterrupted, said
	}
	return code, said
}

// leaves returns the errors that errors.Join has put together.
func leaves(err error) []error {
	joined, is := err.(interface{ Unwrap() []error })
	if _, formatted := err.(fmt.Formatter); !is || formatted {
		if err == nil {
			return nil
		}
		return []error{err}
	}
	var all []error
	for _, e := range joined.Unwrap() {
		all = append(all, leaves(e)...)
	}
	return all
}

// interruptedError reports that a signal ended the process before its work was
// done, and that the same command goes on.
type interruptedError struct{ text string }

func (e *interruptedError) Error() string { return "interrupted: " + e.text }

func interruptedf(format string, args ...any) error {
	return &interruptedError{fmt.Sprintf(format, args...)}
}

// unlessInterrupted makes an interruption of an err that says only that ctx,
// which a signal ends, has ended.
func unlessInterrupted(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, context.Canceled) && exitIsFailure(err) {
		return interruptedf("nothing has been done yet; run the same command again to go on")
	}
	return err
}

func exitIsFailure(err error) bool {
	code, _ := exitCode(err)
	return code == exitFailure
}

// usageError says that the command line is wrong.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...)}
}

// exitError is an exit code for which there is nothing left to say.
type exitError struct{ code int }

func (e *exitError) Error() string { return fmt.Sprintf("exit code %d", e.code) }

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "silo-nbd",
		Short: "Move a disk to another host and use it there, over NBD, from the first second",
		Long: `silo-nbd moves a disk from one host to another. The destination serves it as an
ordinary NBD export from the first second: a read of a block that has not arrived
asks the source for it at once, a write never waits for the network, and the rest
streams in the background.

  on the old host   silo-nbd source --disk vm.raw --listen 10.0.0.1:7000 --insecure
  on the new host   silo-nbd dest --disk vm.raw --connect 10.0.0.1:7000 --nbd unix:///run/vm.sock

Exit codes: 0 all is well (of source: everything is at the destination), 1 something
went wrong (one line on standard error says what), 2 the command line is wrong, 75 a
signal ended it before the end, and the same command goes on.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("no command: want source, dest, attach, detach, status, handoff, rate, pause, resume, drain, inspect, verify, demo or version (silo-nbd --help says more)")
			}
			if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
				return usagef("%q is no command: did you mean %s?", args[0], strings.Join(near, " or "))
			}
			return usagef("%q is no command: want source, dest, attach, detach, status, handoff, rate, pause, resume, drain, inspect, verify, demo or version", args[0])
		},
	}
	root.SuggestionsMinimumDistance = 2
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{flagError(err)} })
	root.AddCommand(newSourceCommand(), newDestCommand(), newAttachCommand(), newDetachCommand(), newVerifyCommand(), newInspectCommand(), newDemoCommand(), newVersionCommand())
	root.AddCommand(newStatusCommand(), newHandoffCommand(), newRateCommand(), newPauseCommand(), newResumeCommand(), newDrainCommand())
	return root
}

// flagError says what is wrong with a flag as this program says things.
func flagError(err error) error {
	var invalid *pflag.InvalidValueError
	if errors.As(err, &invalid) {
		return fmt.Errorf("--%s: %w", invalid.GetFlag().Name, invalid.Unwrap())
	}
	return err
}

// arguments wants exactly those that are named, and no others.
func arguments(names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			return usagef("%s is missing: want %s", names[len(args)], strings.Join(names, " "))
		case len(args) > len(names):
			return usagef("%q is one argument too many", args[len(names)])
		}
		return nil
	}
}
