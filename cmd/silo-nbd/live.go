package main

import (
	"context"
	"errors"
	"time"

	"github.com/spf13/cobra"

	"github.com/silo-nbd/silo-nbd/internal/connect"
	"github.com/silo-nbd/silo-nbd/internal/control"
	"github.com/silo-nbd/silo-nbd/internal/disks"
	"github.com/silo-nbd/silo-nbd/internal/firstblocks"
	"github.com/silo-nbd/silo-nbd/internal/identity"
	"github.com/silo-nbd/silo-nbd/internal/metrics"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/nbdexport"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// liveFlags are those of a source whose disks are in use.
type liveFlags struct {
	nbd         nbdFlag
	memory      memoryFlag
	handoff     string
	maxDowntime time.Duration
	after       string
}

func (l *liveFlags) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.Var(&l.nbd, "nbd", "serve the disks to the local virtual machine here while they move: host:port, unix:///path, or systemd[:NAME]")
	l.memory.add(cmd)
	flags.StringVar(&l.handoff, "handoff", "manual", "with --nbd: when the destination takes over, `manual` (by silo-nbd handoff) or auto (by itself, when little is left)")
	flags.DurationVar(&l.maxDowntime, "max-downtime", migrate.DefaultMaxDowntime, "with --handoff auto: little is what travels in this time")
	flags.StringVar(&l.after, "after", "keep", "with --nbd: what becomes of the disks here when all is complete, `keep` or remove")
}

func (l *liveFlags) check(w *wireFlags, control string) error {
	if l.nbd.IsZero() {
		if l.handoff != "manual" || l.after != "keep" {
			return usagef("--handoff and --after: they are for disks in use, which need --nbd")
		}
		return nil
	}
	switch {
	case l.handoff != "manual" && l.handoff != "auto":
		return usagef("--handoff: %q: want manual or auto", l.handoff)
	case l.handoff == "manual" && control == "":
		return usagef("--handoff manual: want --control PATH, for silo-nbd handoff to reach this process; or --handoff auto")
	case l.maxDowntime <= 0:
		return usagef("--max-downtime: %v: want more than 0, as in 300ms", l.maxDowntime)
	case l.after != "keep" && l.after != "remove":
		return usagef("--after: %q: want keep or remove", l.after)
	}
	if err := l.memory.check(); err != nil {
		return err
	}
	return w.checkListener("--nbd", l.nbd.addrFlag)
}

// liveDisks are the disks of a source that are in use, and who owns them.
type liveDisks struct {
	files   []*sources.File
	moving  []migrate.SourceDisk
	changes *liveChanges
	ledger  *identity.Ledger // nil: nothing is left to do
}

func (l *liveDisks) Close() error {
	var errs []error
	if l.ledger != nil {
		for _, f := range l.files {
			errs = append(errs, f.Flush())
		}
		errs = append(errs, l.ledger.Close())
	}
	if l.changes != nil {
		errs = append(errs, l.changes.Close())
	}
	return errors.Join(append(errs, closeAll(l.files))...)
}

func (f *sourceFlags) openLive(specs []disks.Spec, c *console) (l *liveDisks, err error) {
	l = new(liveDisks)
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	if l.files, err = disks.OpenSource(specs, true); err != nil {
		return l, err
	}
	warnOf(l.files, c)
	warnOfFormat(l.files, c)
	l.changes = newLiveChanges(int64(f.blockSize), c)
	for i, s := range specs {
		l.changes.files[s.Name] = l.files[i]
	}
	l.ledger, err = f.openLedger(specs, l.files, l.changes.keep, c)
	if err != nil || l.ledger == nil {
		return l, err
	}
	for _, name := range l.ledger.Crashed() {
		c.log.Warn("the last source of this disk did not end in order: what was copied before is not trusted, and the copy begins anew", "disk", name)
	}
	for _, name := range l.ledger.Ended() {
		c.log.Info("this disk had a source before: what was copied from it then is not trusted, since changes are remembered only while a source runs; the copy begins anew", "disk", name)
	}
	for i, s := range specs {
		owner, gone := l.ledger.Owner(s.Name)
		var changes *migrate.Changes
		if !gone && l.ledger.Lacks(i) == nil {
			if changes, err = l.changes.begin(s.Name, l.ledger.Identity(i), l.ledger.Where(i)); err != nil {
				return l, err
			}
		}
		tracker, err := migrate.NewTracker(l.files[i], migrate.TrackerOptions{HandedOff: gone, Owner: owner.Device, Changes: changes, Waiting: nbdexport.Waiting})
		if err != nil {
			return l, err
		}
		l.moving = append(l.moving, migrate.SourceDisk{
			Name: s.Name, Live: tracker, Identity: l.ledger.Identity(i), Former: l.ledger.Former(i),
			Changed: func() error { return l.ledger.Changed(i) },
		})
	}
	return l, nil
}

// runLive serves the disks and sends them, until they are complete elsewhere.
func (f *sourceFlags) runLive(ctx context.Context, specs []disks.Spec, c *console) (err error) {
	certs, err := f.wire.certificates(true, c.log)
	if err != nil {
		return err
	}
	l, err := f.openLive(specs, c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	if l.ledger == nil {
		return nil
	}
	source, err := migrate.NewSource(l.moving, migrate.SourceOptions{
		BlockSize: int64(f.blockSize), Rate: int64(f.rate), Listening: !f.wire.listen.IsZero(), MaxCallers: connect.MaxCallers, Log: c.log,
		First:       firstblocks.Find,
		AutoHandoff: f.live.handoff == "auto", MaxDowntime: f.live.maxDowntime, Ledger: l.ledger,
	})
	if err != nil {
		return err
	}
	x, err := f.openExport(ctx, l.moving, certs, c)
	if err != nil {
		return err
	}
	ends, err := f.wire.open(ctx, certs, c.log)
	if err != nil {
		return errors.Join(err, x.listener.Close())
	}
	defer ends.Close() // nothing is under way any more
	op, err := f.operate.start(ctx, control.Options{
		Role: control.RoleSource, Disks: owned(l.ledger, liveSamples(source)), Pace: source, Hand: source, NBD: x.clients, Drain: x.drain,
	}, metrics.Sight{Disks: source.Status, Path: source.Path, Pace: source, NBD: x.clients}, certs, c)
	if err != nil {
		return errors.Join(err, x.listener.Close())
	}
	defer func() { err = errors.Join(err, op.Close()) }()
	defer c.show(source.Status)()

	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	x.serve(fail, source.HandedOff())
	op.ready()
	err = f.moveLive(ctx, source, ends.Next, c)
	op.stopping()
	if down := x.end(); down != nil && !source.HandedOff() { // then its exports refuse the last flush
		err = errors.Join(err, down)
	}
	if err != nil || !source.HandedOff() || missing(source.Status()) != "" {
		return err
	}
	complete(l.ledger, c)
	if f.live.after == "remove" {
		return l.ledger.RemoveDisks()
	}
	return nil
}

// moveLive moves the disks. What ends the migration does not end the service:
// somebody uses the disks.
func (f *sourceFlags) moveLive(ctx context.Context, source *migrate.Source, connect migrate.Connector, c *console) error {
	err := source.Run(ctx, connect)
	if err == nil {
		return nil
	}
	if ctx.Err() == nil && !source.HandedOff() {
		c.log.Error("the migration has ended; the disks are served on: end this process, and start it again to try again", "error", err)
		<-ctx.Done()
		return errors.Join(err, endOf(ctx))
	}
	if ctx.Err() == nil {
		return err
	}
	if broken := endOf(ctx); broken != nil {
		return broken
	}
	if !source.HandedOff() {
		for _, d := range source.Status() {
			if d.BytesSent > 0 {
				c.log.Info("ended before the handoff: the disk is here, with all that was written; a source that is started again goes on with what was copied, unless another program writes the disk",
					"disk", d.Name, "copied_bytes", d.BytesSent)
			}
		}
		return interruptedf("the disks were not handed off: they are here, with all that was written; run the same command again to serve and move them")
	}
	if lack := missing(source.Status()); lack != "" {
		return interruptedf("the disks belong to the destination, but %s: run the same command again to go on", lack)
	}
	return nil
}

// liveSamples is samples for disks that are in use here.
func liveSamples(source *migrate.Source) func() []control.Sample {
	return func() []control.Sample {
		var out []control.Sample
		gone := source.HandedOff()
		for _, d := range source.Status() {
			out = append(out, control.Sample{DiskStatus: d, Live: &control.Live{
				Pass: d.Pass, WriteRate: int64(d.WriteRate), LinkRate: int64(d.LinkRate), HandedOff: gone,
			}})
		}
		return out
	}
}
