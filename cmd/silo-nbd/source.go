package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/silo-nbd/silo-nbd/internal/connect"
	"github.com/silo-nbd/silo-nbd/internal/control"
	"github.com/silo-nbd/silo-nbd/internal/disks"
	"github.com/silo-nbd/silo-nbd/internal/firstblocks"
	"github.com/silo-nbd/silo-nbd/internal/metrics"
	"github.com/silo-nbd/silo-nbd/internal/units"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

// sourceFlags is the command line of source.
type sourceFlags struct {
	wire      wireFlags
	disks     []string
	states    []string
	shared    bool
	clone     bool
	blockSize units.Size
	rate      units.Size
	live      liveFlags
	moved     bool
	reclaim   bool
	operate   operateFlags
	format    logFormat
}

func newSourceCommand() *cobra.Command {
	f := &sourceFlags{blockSize: migrate.DefaultBlockSize}
	cmd := &cobra.Command{
		Use:   "source --disk [NAME=]PATH ... (--listen ADDR | --connect ADDR) [--nbd ADDR | --clone]",
		Short: "Send disks, also while they are in use",
		Long: `Sends disks to a destination: blocks that it asks for first, then what
the file systems on them (ext2, ext3, ext4) consist of but for the contents of files, then
small files, then the rest in order. The disks must not be written meanwhile; they are
opened for reading only. Ends with 0 when the destination has said of every disk that it
has all of it; from then on the source is not needed any more. A connection that breaks
is made again without limit.

With --nbd the disks are in use: they are served there, read and write, to the virtual
machine of this host, and sent meanwhile, what changes again and again. The handoff stops
them here and makes them usable at the destination at that moment; what has not travelled
by then follows. From then on they are never served here again, also after a restart.

With --clone the disks are a golden image, which goes to any number of destinations at once,
each of which owns its copy. It serves until a signal ends it: with 0 if every copy that
was begun is complete, with 75 if not.`,
		Args: arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			specs, err := f.check()
			if err != nil {
				return err
			}
			c := newConsole(cmd, f.format, false)
			defer c.close()
			run := f.run
			if !f.live.nbd.IsZero() {
				run = f.runLive
			}
			return unlessInterrupted(cmd.Context(), run(cmd.Context(), specs, c))
		},
	}
	cmd.Flags().StringArrayVar(&f.disks, "disk", nil, "a disk to send, as `[NAME=]PATH`; may be given again")
	cmd.Flags().StringArrayVar(&f.states, "state", nil, "what is known of a disk is kept here, as `[NAME=]PATH`; may be given again (default: beside the disk; needed for a block device in /dev)")
	cmd.Flags().BoolVar(&f.shared, "shared", false, "send a disk although others have it mounted or open: for one that is surely not written")
	cmd.Flags().BoolVar(&f.moved, "disk-moved", false, "the disk was moved here from where it was when its state file was written, and is no copy: the destination compares what it has")
	cmd.Flags().BoolVar(&f.reclaim, "force-reclaim", false, "take disks back that were handed off. What was written at the destination is lost here, and the destination must not be used any more")
	cmd.Flags().BoolVar(&f.clone, "clone", false, "serve the disks, which nothing writes, to any number of destinations at once, until a signal; needs --listen")
	cmd.Flags().Var(&f.blockSize, "block-size", "unit of the migration, a power of two")
	cmd.Flags().Var(&f.rate, "rate", "bytes per second for the background stream; blocks that are asked for are exempt (default: no limit)")
	f.live.add(cmd)
	f.wire.add(cmd)
	f.operate.add(cmd)
	f.format.add(cmd)
	return cmd
}

func (f *sourceFlags) check() ([]disks.Spec, error) {
	if len(f.disks) == 0 {
		return nil, usagef("no disk: want --disk [NAME=]PATH")
	}
	specs, err := disks.ParseSpecs(f.disks)
	if err != nil {
		return nil, usagef("--disk: %w", err)
	}
	if err := disks.PlaceStates(specs, f.states); err != nil {
		return nil, usagef("--state: %w", err)
	}
	if b := int64(f.blockSize); b < migrate.MinBlockSize || b > migrate.MaxBlockSize || b&(b-1) != 0 {
		return nil, usagef("--block-size: %s is no block size: want a power of two from %s to %s",
			f.blockSize.String(), units.Format(migrate.MinBlockSize), units.Format(migrate.MaxBlockSize))
	}
	if f.shared && !f.live.nbd.IsZero() {
		return nil, usagef("--shared: with --nbd the disk is written here, and by nobody else")
	}
	if len(f.wire.allow) > 0 && f.wire.listen.IsZero() {
		return nil, usagef("--tls-allow: it is for those who connect to us, and with --connect nobody does")
	}
	if err := f.wire.check(); err != nil {
		return nil, err
	}
	if err := f.checkClone(); err != nil {
		return nil, err
	}
	if err := f.live.check(&f.wire, f.operate.control); err != nil {
		return nil, err
	}
	return specs, f.operate.check(&f.wire)
}

// run sends the disks.
func (f *sourceFlags) run(ctx context.Context, specs []disks.Spec, c *console) (err error) {
	certs, err := f.wire.certificates(false, c.log)
	if err != nil {
		return err
	}
	files, err := f.openFrozen(specs, c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeAll(files)) }()
	ledger, err := f.openLedger(specs, files, nil, c)
	if err != nil || ledger == nil {
		return err
	}
	defer func() { err = errors.Join(err, ledger.Close()) }()
	var moving []migrate.SourceDisk
	for i, file := range files {
		moving = append(moving, migrate.SourceDisk{
			Name: specs[i].Name, Store: file, Identity: ledger.Identity(i), Former: ledger.Former(i),
			Changed: func() error { return ledger.Changed(i) },
		})
	}
	if f.clone {
		return f.runClone(ctx, moving, certs, c)
	}
	past := past{log: c.log, at: f.wire.connect.String(), ledger: ledger}
	source, err := migrate.NewSource(moving, migrate.SourceOptions{
		BlockSize: int64(f.blockSize), Rate: int64(f.rate), Listening: !f.wire.listen.IsZero(), MaxCallers: connect.MaxCallers, Log: c.log,
		First: firstblocks.Find, Known: past.known(), Met: past.met, Ledger: ledger,
	})
	if err != nil {
		return err
	}
	ends, err := f.wire.open(ctx, certs, c.log)
	if err != nil {
		return err
	}
	defer ends.Close() // nothing is under way any more
	op, err := f.operate.start(ctx, control.Options{
		Role: control.RoleSource, Disks: owned(ledger, samples(source.Status)), Pace: source,
		Drain: func() {}, // it ends by itself when all is complete
	}, metrics.Sight{
		Disks: source.Status, Path: source.Path, Pace: source,
	}, certs, c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, op.Close()) }()
	defer c.show(source.Status)()

	op.ready()
	err = source.Run(ctx, ends.Next)
	op.stopping()
	if err == nil {
		past.over()
		complete(ledger, c)
		return nil
	}
	if ctx.Err() == nil {
		return err
	}
	if lack := missing(source.Status()); lack != "" {
		return interruptedf("%s, run the same command again to go on", lack)
	}
	return nil
}
