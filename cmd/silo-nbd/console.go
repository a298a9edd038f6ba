package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"sync"

	"github.com/spf13/cobra"

	"github.com/silo-nbd/silo-nbd/internal/progress"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

// console is what source and dest show: the log and the progress on standard
// error, results on standard output.
type console struct {
	log     *slog.Logger
	display *progress.Display
	results io.Writer
}

// newConsole makes a console; plain is for one that shares its terminal with
// another program.
func newConsole(cmd *cobra.Command, format logFormat, plain bool) *console {
	stdout, stderr := cmd.OutOrStdout(), cmd.ErrOrStderr()
	bars := format == "" && !plain && progress.IsTerminal(stderr)
	c := &console{display: progress.New(stderr, bars), results: stdout}
	if bars && progress.IsTerminal(stdout) {
		c.results = c.display // or the bars would be drawn over the line
	}
	if format == "json" {
		c.log = slog.New(slog.NewJSONHandler(c.display, nil))
	} else {
		c.log = slog.New(slog.NewTextHandler(c.display, nil))
	}
	return c
}

// result prints a line for the one who called us.
func (c *console) result(format string, args ...any) error {
	_, err := fmt.Fprintf(c.results, format+"\n", args...)
	return err
}

// show shows the progress until the function that it returns is called.
func (c *console) show(status func() []migrate.DiskStatus) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		c.display.Run(ctx, c.log, func() []progress.Row { return rows(status()) })
	})
	return func() {
		cancel()
		wg.Wait()
	}
}

func rows(disks []migrate.DiskStatus) []progress.Row {
	rows := make([]progress.Row, len(disks))
	for i, d := range disks {
		rows[i] = progress.Row{
			Name: d.Name, Size: d.Size, Done: d.BytesDone,
			Connected: d.Connected, Complete: d.State == migrate.StateComplete,
			Waiting: d.Waiting, OldestWait: d.OldestWait,
		}
	}
	return rows
}

// missing says what the disks lack, for an interrupted migration; empty if
// they lack nothing.
func missing(disks []migrate.DiskStatus) (names string) {
	for _, d := range disks {
		if d.State == migrate.StateComplete {
			continue
		}
		if names != "" {
			names += " and "
		}
		if d.Size == d.BytesDone { // not handed off, or the other side has not said so
			names += fmt.Sprintf("nothing is missing on %s, but that was not confirmed yet", d.Name)
			continue
		}
		names += fmt.Sprintf("%d of %d bytes missing on %s", d.Size-d.BytesDone, d.Size, d.Name)
	}
	return names
}
