package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/silo-nbd/silo-nbd/internal/addr"
	"github.com/silo-nbd/silo-nbd/internal/progress"
	"github.com/silo-nbd/silo-nbd/internal/streams"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

// console is what source and dest show: the log and the progress on standard
// error, results on standard output.
type console struct {
	log     *slog.Logger
	display *progress.Display
	// What is written goes through queues, so that a terminal that is stopped, or
	// a pipe that is not read, holds up no disk.
	lines, results *streams.Queue
}

// newConsole makes a console; plain is for one that shares its terminal with
// another program.
func newConsole(cmd *cobra.Command, format logFormat, plain bool) *console {
	surviveReaders()
	stdout, stderr := cmd.OutOrStdout(), cmd.ErrOrStderr()
	bars := format == "" && !plain && progress.IsTerminal(stderr)
	c := &console{display: progress.New(stderr, bars)}
	logTo := func(w io.Writer) *slog.Logger {
		options := &slog.HandlerOptions{ReplaceAttr: streams.CutAttr}
		if format == "json" {
			return slog.New(streams.NewCalm(slog.NewJSONHandler(w, options)))
		}
		return slog.New(streams.NewCalm(slog.NewTextHandler(w, options)))
	}
	c.lines = streams.NewQueue(c.display, func(w io.Writer, lines int) {
		logTo(w).Warn("log lines were lost, since standard error was not read", "lines", lines)
	})
	c.log = logTo(c.lines)
	c.results = c.lines // or the bars would be drawn over the line
	if !bars || !progress.IsTerminal(stdout) {
		c.results = streams.NewQueue(stdout, nil)
	}
	return c
}

// close writes what is still to be written, for as long as it is read.
func (c *console) close() {
	c.lines.Close(lastWords)
	c.results.Close(lastWords)
}

// result prints a line for the caller of the program. That it is not read, or
// its reader has gone, is not an error.
func (c *console) result(format string, args ...any) {
	fmt.Fprintf(c.results, format+"\n", args...)
}

// ready says that a disk can be attached. Its name may come from the other side
// and hold anything, so it is written as one word, as it stands in the URI.
func (c *console) ready(name, uri string) { c.result("ready %s %s", addr.Escape(name), uri) }

// exportAt returns the URI of the export called name of a server at a.
func exportAt(a addr.Addr, secure bool, name string) string {
	if secure {
		return addr.NBDSURI(a, name)
	}
	return addr.NBDURI(a, name)
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
		ended := make(chan struct{})
		go func() { wg.Wait(); close(ended) }()
		select {
		case <-ended:
		case <-time.After(lastWords): // the terminal is stopped
		}
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
