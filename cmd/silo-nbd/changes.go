package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/durable"
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
	saved     map[string]string // by disk: the file of what outlives the boot
}

// changesSuffix is what the name of that file has more than that of the state file.
const changesSuffix = "-changes"

func newLiveChanges(blockSize int64, c *console) *liveChanges {
	return &liveChanges{
		console: c, blockSize: blockSize,
		files: make(map[string]*sources.File), byName: make(map[string]*migrate.Changes), saved: make(map[string]string),
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
	saved := last.State + changesSuffix
	if b, err := os.ReadFile(saved); err == nil && last.Ended && !changes.Kept() {
		if err := changes.Restore(b); err != nil {
			l.console.log.Debug("what the last source of this disk has left is of no use", "disk", disk, "error", err)
		}
	}
	// A device does not tell when it was written last, and counts its writes. A file may
	// have been put back together with its state, to an end before the last one.
	proved := last.Ended
	if !last.Disk.Block {
		proved = last.Disk.ChangeTime != 0 && l.files[disk].OwnTimes() && changes.WrittenLast(time.Unix(0, last.Disk.ChangeTime))
	}
	if changes.Kept() && proved {
		err := removeSaved(saved) // before the disk is written: else it would be older than the disk
		if err == nil {
			l.byName[disk] = changes
			return true
		}
		l.console.log.Warn("what the last source of this disk has left cannot be used, since it cannot be removed: the copy begins anew", "disk", disk, "error", err)
	}
	if err := changes.Forget(); err != nil {
		l.console.log.Warn("what the last source of this disk has left could not be removed", "disk", disk, "error", err)
	}
	return false
}

// removeSaved removes a file, durably, if it is there.
func removeSaved(path string) error {
	err := os.Remove(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(path))
}

// begin returns what the tracker of a disk is to keep its changes in; nil: nothing
// outlives the process.
func (l *liveChanges) begin(disk string, id migrate.Identity, state string) (*migrate.Changes, error) {
	l.saved[disk] = state + changesSuffix
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

// Close leaves it to the next process, of this boot or of another. The disks must no
// longer be written.
func (l *liveChanges) Close() error {
	var errs []error
	for disk, c := range l.byName {
		if err := l.save(disk, c); err != nil {
			l.console.log.Warn("what has changed since it was sent could not be saved: if the host is started anew, the copy begins anew", "disk", disk, "error", err)
		}
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

func (l *liveChanges) save(disk string, c *migrate.Changes) error {
	b := c.Saved()
	if b == nil || l.saved[disk] == "" {
		return nil
	}
	file, err := durable.Replace(durable.OS, l.saved[disk], b, false)
	if file != nil {
		err = errors.Join(err, file.Close())
	}
	return err
}
