package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/silo-nbd/silo-nbd/internal/connect"
	"github.com/silo-nbd/silo-nbd/internal/control"
	"github.com/silo-nbd/silo-nbd/internal/firstblocks"
	"github.com/silo-nbd/silo-nbd/internal/metrics"
	"github.com/silo-nbd/silo-nbd/internal/tlsdir"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

// checkClone checks the flags beside --clone.
func (f *sourceFlags) checkClone() error {
	switch {
	case !f.clone:
	case f.wire.listen.IsZero():
		return usagef("--clone: destinations connect to it: want --listen ADDR")
	case !f.live.nbd.IsZero():
		return usagef("--clone: it is for an image that nothing writes, and --nbd serves one that is in use")
	}
	return nil
}

// runClone serves the disks to the destinations that connect, until a signal ends it.
func (f *sourceFlags) runClone(ctx context.Context, moving []migrate.SourceDisk, certs *tlsdir.Dir, c *console) (err error) {
	cloner, err := migrate.NewCloner(moving, migrate.SourceOptions{
		BlockSize: int64(f.blockSize), Rate: int64(f.rate), MaxCallers: connect.MaxCallers, Log: c.log, First: firstblocks.Find,
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
		Role: control.RoleSource, Disks: samples(cloner.Status), Pace: cloner,
		Copies: func() control.Copies { return control.Copies(cloner.Copies()) },
	}, metrics.Sight{Disks: cloner.Status, Path: cloner.Path, Pace: cloner}, certs, c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, op.Close()) }()
	defer c.show(cloner.Status)()

	op.ready()
	err = cloner.Run(ctx, ends.Next)
	op.stopping()
	if ctx.Err() == nil {
		return err
	}
	n := cloner.Copies()
	if n.Unfinished > 0 {
		return interruptedf("%s, and %d unfinished; run the same command again for these to go on", copiesComplete(n.Complete), n.Unfinished)
	}
	c.log.Info("ended: " + copiesComplete(n.Complete))
	return nil
}

func copiesComplete(copies int) string {
	if copies == 1 {
		return "1 copy is complete"
	}
	return fmt.Sprintf("%d copies are complete", copies)
}
