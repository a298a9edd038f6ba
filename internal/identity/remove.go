package identity

import (
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// RemoveDisks removes the files of disks of which the destination has everything,
// and their state files. It removes the very files that are open, and none that
// has their name by now. Block devices are left as they are.
func (l *Ledger) RemoveDisks() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.handedOff {
		return errors.New("the disks are this host's: nothing was removed")
	}
	var errs []error
	for _, e := range l.disks {
		err := l.remove(e)
		if err != nil {
			err = fmt.Errorf("--after remove: %w", err)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (k keeper) remove(e *entry) error {
	if e.disk.IsBlockDevice() {
		return fmt.Errorf("%s is a block device: it was left as it is", e.disk.Path())
	}
	now, err := e.disk.Stamp()
	if err != nil {
		return err
	}
	if err := unlink(e.path, now.Dev, now.Inode); err != nil {
		return err
	}
	if e.lacks == nil {
		err = k.files.Remove(e.where)
	}
	return errors.Join(err, k.files.SyncDir(dirOf(e.where)))
}

// unlink removes path if it is still the file with that inode.
func unlink(path string, dev, inode uint64) error {
	dir, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	defer unix.Close(dir) // a name only
	base := filepath.Base(path)
	var st unix.Stat_t
	err = unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == nil && (uint64(st.Dev) != dev || st.Ino != inode) {
		return fmt.Errorf("%s is another file by now: it was left as it is, and so was the disk, wherever it lies", path)
	}
	if err == nil {
		err = unix.Unlinkat(dir, base, 0)
	}
	if err != nil {
		return fmt.Errorf("%s: remove: %w", path, err)
	}
	return nil
}
