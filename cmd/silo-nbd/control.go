package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/silo-nbd/silo-nbd/internal/control"
	"github.com/silo-nbd/silo-nbd/internal/progress"
	"github.com/silo-nbd/silo-nbd/internal/units"
)

// watchInterval is how often status --watch looks again.
const watchInterval = time.Second

// controlCommand makes a command that talks to a running source or dest.
func controlCommand(cmd *cobra.Command, run func(ctx context.Context, c *control.Client, out io.Writer, args []string) error) *cobra.Command {
	var path string
	cmd.Flags().StringVar(&path, "control", "", "the `PATH` that source or dest was given as --control")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if path == "" {
			return usagef("no --control: want the path that source or dest was given as --control")
		}
		c, err := control.NewClient(path)
		if err != nil {
			return usagef("--control: %w", err)
		}
		return run(cmd.Context(), c, cmd.OutOrStdout(), args)
	}
	return cmd
}

func newStatusCommand() *cobra.Command {
	var asJSON, watch bool
	cmd := controlCommand(&cobra.Command{
		Use:   "status --control PATH [--json] [--watch]",
		Short: "Say how far a running source or dest is",
		Long: `Asks a running source or dest how far it is: what each disk does, how much of it is
there, how fast it moves and how long that will take, measured over the last seconds. What
cannot be told is shown as "-". --watch shows it again each second until the process ends,
or until Ctrl-C; with --json that is one line each time.`,
		Args: arguments(),
	}, func(ctx context.Context, c *control.Client, out io.Writer, _ []string) error {
		if !watch {
			return showStatus(ctx, c, out, asJSON, false)
		}
		return watchStatus(ctx, c, out, asJSON)
	})
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&watch, "watch", false, "show it again each second")
	return cmd
}

// showStatus asks once. On a terminal fresh writes over what was there.
func showStatus(ctx context.Context, c *control.Client, out io.Writer, asJSON, fresh bool) error {
	st, err := c.Status(ctx)
	if err != nil {
		return err
	}
	if asJSON {
		return json.NewEncoder(out).Encode(st)
	}
	if fresh {
		if _, err := io.WriteString(out, "\x1b[H\x1b[2J"); err != nil {
			return err
		}
	}
	return control.WriteTable(out, st)
}

// watchStatus asks again and again, until the process has gone or ctx ends.
func watchStatus(ctx context.Context, c *control.Client, out io.Writer, asJSON bool) error {
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for asked := false; ; asked = true {
		err := showStatus(ctx, c, out, asJSON, progress.IsTerminal(out))
		switch {
		case ctx.Err() != nil:
			return nil // Ctrl-C
		case asked && (errors.Is(err, control.ErrGone) || errors.Is(err, control.ErrCut)):
			return nil // it has ended
		case err != nil:
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func newHandoffCommand() *cobra.Command {
	var abort, force bool
	var to string
	cmd := controlCommand(&cobra.Command{
		Use:   "handoff --control PATH [--to DEVICE|ADDR] [--abort | --force]",
		Short: "Hand the disks of a running source over to the destination",
		Long: `Hands the disks that a source serves over to the destination, and returns when they are
the destination's. What has not arrived follows. Ctrl-C takes it back if it has not gone too
far; --abort does so for one that somebody else has asked for. One to a destination that is
known to have no room is refused, since what is written there would fail, unless --force
is given. If several destinations have connected to the source, --to says which one is
meant; it is refused if another one is connected. status shows the device and the address
of the one that is.`,
		Args: arguments(),
	}, func(ctx context.Context, c *control.Client, out io.Writer, _ []string) error {
		err, done := error(nil), "handed over"
		switch {
		case abort && force:
			return usagef("--abort and --force: want only one of them")
		case abort && to != "":
			return usagef("--abort and --to: want only one of them")
		case abort:
			err, done = c.Abort(ctx), "aborted: the disks are served here as before"
		default:
			err = c.HandoffWith(ctx, control.HandoffArguments{To: to, Force: force})
		}
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(out, done)
		return err
	})
	cmd.Flags().BoolVar(&force, "force", false, "hand over also to a destination that has no room")
	cmd.Flags().BoolVar(&abort, "abort", false, "take back a handoff that is under way")
	cmd.Flags().StringVar(&to, "to", "", "hand over to this destination and to no other: the UUID of its `DEVICE`, the first 8 or more digits of it, or its address")
	return cmd
}

func newRateCommand() *cobra.Command {
	return controlCommand(&cobra.Command{
		Use:   "rate --control PATH RATE",
		Short: "Change how fast a running source may send",
		Long: `Bounds the background stream of a running source to RATE bytes a second, such as 100MiB;
0 is no bound. Blocks that are asked for are exempt.`,
		Args: arguments("RATE"),
	}, func(ctx context.Context, c *control.Client, out io.Writer, args []string) error {
		n, err := units.Parse(args[0])
		if err != nil {
			return usagef("RATE: %w", err)
		}
		b, err := c.SetRate(ctx, n)
		return sayBackground(out, b, err)
	})
}

func newPauseCommand() *cobra.Command {
	return controlCommand(&cobra.Command{
		Use:   "pause --control PATH",
		Short: "Hold the background stream of a running source",
		Long:  `Holds the background stream of a running source until resume. Blocks that are asked for are sent all the same.`,
		Args:  arguments(),
	}, func(ctx context.Context, c *control.Client, out io.Writer, _ []string) error {
		b, err := c.Pause(ctx)
		return sayBackground(out, b, err)
	})
}

func newResumeCommand() *cobra.Command {
	return controlCommand(&cobra.Command{
		Use:   "resume --control PATH",
		Short: "Let the background stream of a running source go on",
		Args:  arguments(),
	}, func(ctx context.Context, c *control.Client, out io.Writer, _ []string) error {
		b, err := c.Resume(ctx)
		return sayBackground(out, b, err)
	})
}

// sayBackground says what holds the background back now.
func sayBackground(out io.Writer, b control.Background, err error) error {
	if err != nil {
		return err
	}
	line := "no bound"
	if b.RateLimit > 0 {
		line = fmt.Sprintf("at most %s/s", units.Human(b.RateLimit))
	}
	if b.Paused {
		line += ", paused"
	}
	_, err = fmt.Fprintln(out, line)
	return err
}

func newDrainCommand() *cobra.Command {
	return controlCommand(&cobra.Command{
		Use:   "drain --control PATH",
		Short: "Let a running source or dest end once it has finished",
		Long: `Tells a running source or dest to take no new NBD clients, and to end with 0 when all is
complete, the last client has gone and everything is flushed. It does not end a pause.`,
		Args: arguments(),
	}, func(ctx context.Context, c *control.Client, out io.Writer, _ []string) error {
		if err := c.Drain(ctx); err != nil {
			return err
		}
		_, err := fmt.Fprintln(out, "draining: ends when all is complete and the last client has gone")
		return err
	})
}
