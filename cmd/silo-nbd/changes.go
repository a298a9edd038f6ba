package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/identity"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// liveChanges is what is known of changes to disks in use, beyond the process: which
// blocks the destination may have in an older version.
type liveChanges struct {
	console   *console
	blockSize int64
	files     map[string]*sources.File
	byName    map[string]*migrate.Changes
}

func newLiveChanges(blockSize int64, c *console) *liveChanges {
	return &liveChanges{
		console: c, blockSize: blockSize,
		files: make(map[string]*sources.File), byName: make(map[string]*migrate.Changes),
	}
}

func (l *liveChanges) openChanges(disk string, id migrate.Identity) *migrate.Changes {
	size := l.files[disk].Size()
	changes, err := migrate.OpenChanges(migrate.ChangesOptions{
		RunDir: runDir(), Disk: id, Size: int64(size), BlockSize: l.blockSize,
	})
	if err != nil {
		l.console.log.Warn("there is no place that lives as long as the boot: if this source is started again, the copy begins anew", "disk", disk, "error", err)
		return nil
	}
	return changes
}

// keep reports whether all changes of a disk since its last run began are known, so
// that what was copied of it stays of use: the run has left them, and no other program
// has written the disk since.
func (l *liveChanges) keep(disk string, last identity.Run) bool {
	changes := l.openChanges(disk, last.Identity)
	if changes == nil {
		return false
	}
	// A device does not tell when it was written last, and counts its writes. A file may
	// have been put back together with its state, to an end before the last one.
	proved := last.Ended
	if !last.Disk.Block {
		proved = last.Disk.ChangeTime != 0 && changes.WrittenLast(time.Unix(0, last.Disk.ChangeTime))
	}
	if changes.Kept() && proved {
		l.byName[disk] = changes
		return true
	}
	if err := changes.Forget(); err != nil {
		l.console.log.Warn("what the last source of this disk has left could not be removed", "disk", disk, "error", err)
	}
	return false
}

// begin returns what the tracker of a disk is to keep its changes in; nil: nothing
// outlives the process.
func (l *liveChanges) begin(disk string, id migrate.Identity) (*migrate.Changes, error) {
	changes := l.byName[disk]
	if changes == nil {
		if changes = l.openChanges(disk, id); changes == nil {
			return nil, nil
		}
		l.byName[disk] = changes
	}
	stamp, err := l.files[disk].Stamp()
	if err != nil {
		return nil, fmt.Errorf("find out when %s was written: %w", l.files[disk].Path(), err)
	}
	changes.SetWritten(time.Unix(0, stamp.ChangeTime))
	if changes.Kept() {
		l.console.log.Info("the last source of this disk has left what was written since: what the destination has stays of use", "disk", disk)
	}
	return changes, nil
}

// Close leaves it to the next process. Nobody writes the disks any more.
func (l *liveChanges) Close() error {
	var errs []error
	for _, c := range l.byName {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}
