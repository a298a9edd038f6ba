// Silo-nbd moves a disk to another host and serves it there over NBD from the
// first second.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

const (
	exitFailure = 1 // something went wrong
	exitUsage   = 2 // the command line is wrong
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends us at once
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(report(err, os.Stderr))
}

// run is the whole program but for its exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	root := newRootCommand()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	return root.ExecuteContext(ctx)
}

// report says in one line why run failed, and gives the exit code.
func report(err error, stderr io.Writer) int {
	var usage *usageError
	var exit *exitError
	code := exitFailure
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.code
	case errors.As(err, &usage):
		code = exitUsage
	}
	line := strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; ")
	fmt.Fprintf(stderr, "silo-nbd: %s\n", line) // nobody is left to tell if this fails
	return code
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

Exit codes: 0 all is well, 1 something went wrong (one line on standard error says
what), 2 the command line is wrong.`,
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
