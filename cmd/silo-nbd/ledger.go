package main

import (
	"errors"
	"fmt"

	"github.com/silo-nbd/silo-nbd/internal/control"
	"github.com/silo-nbd/silo-nbd/internal/disks"
	"github.com/silo-nbd/silo-nbd/internal/identity"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// openLedger finds out which disks they are and to which destination they
// belong, and says what of it the user should know. It returns nil if nothing is
// left to do: the destination has everything.
func (f *sourceFlags) openLedger(specs []disks.Spec, files []*sources.File, keep func(string, identity.Run) bool, c *console) (*identity.Ledger, error) {
	var named []identity.Spec
	for i, file := range files {
		named = append(named, identity.Spec{Disk: file, Name: specs[i].Name, State: specs[i].State})
	}
	live := !f.live.nbd.IsZero()
	ledger, err := identity.Open(named, identity.Options{
		Live: live, Clone: f.clone, Reclaim: f.reclaim, Moved: f.moved, At: f.wire.connect.String(), Keep: keep,
		Doubt: func(disk string) {
			c.log.Warn("this disk's change time moved while it was sent, and nothing else of it: its owner, mode, names or attributes were changed, or it was written and its modification time put back; samples of it are as they were, so the move goes on",
				"disk", disk)
		},
	})
	if err != nil {
		return nil, err
	}
	if f.clone && (ledger.HandedOff() || ledger.Finished()) {
		return nil, errors.Join(fmt.Errorf("--clone: %s was handed off (%s): it is no image any more of which others may have copies: use the disk where it is, or take it back with --force-reclaim",
			files[0].Path(), ledger.Note(0).Text()), ledger.Close())
	}
	if ledger.Finished() {
		for i, file := range files {
			c.log.Info("nothing is left to do: the destination has all of this disk, and owns it; --force-reclaim takes it back as it was when it was handed off; an image that is to go to several destinations wants --clone from the start",
				"disk", file.Path(), "owner", ledger.Note(i).Text())
		}
		return nil, ledger.Close()
	}
	for i, file := range files {
		if err := ledger.Lacks(i); err != nil {
			c.log.Warn("this disk's identity is kept only as long as this process runs: a source that is started again is taken for another one, and the destination compares what it has; say where to keep it, with --state",
				"disk", file.Path(), "error", err)
		}
	}
	switch {
	case f.reclaim && len(ledger.Reclaimed()) == 0:
		c.log.Info("--force-reclaim: no disk was handed off: it is not needed")
	case f.reclaim && live:
		c.log.Warn("--force-reclaim: the disks are served here again, as they were when they were handed off: the destination must not use them any more")
	case f.reclaim:
		c.log.Warn("--force-reclaim: the disks are this host's again, as they were when they were handed off: the destination must not use them any more")
	case ledger.HandedOff() && live:
		c.log.Warn("the disks were handed off: nothing is served here; what is missing at the destination is sent when it connects")
	}
	return ledger, nil
}

// owned adds to samples of disks to which destination they belong.
func owned(ledger *identity.Ledger, samples func() []control.Sample) func() []control.Sample {
	return func() []control.Sample {
		all := samples()
		for i := range all {
			if n := ledger.Note(i); n != nil {
				all[i].Owner = &control.Owner{Device: fmt.Sprintf("%x", n.Owner), At: n.At, Taken: n.Taken, Complete: n.Complete}
			}
		}
		return all
	}
}

// complete notes that the destination has everything, so that a source that is
// started again has nothing to do.
func complete(ledger *identity.Ledger, c *console) {
	if !ledger.HandedOff() {
		return
	}
	if err := ledger.Complete(); err != nil {
		c.log.Warn("a source that is started again will ask the destination whether it has everything", "error", err)
	}
}

func closeAll(files []*sources.File) error {
	var errs []error
	for _, file := range files {
		errs = append(errs, file.Close())
	}
	return errors.Join(errs...)
}
