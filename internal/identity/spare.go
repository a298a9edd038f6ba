package identity

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/internal/durable"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// Where no state file can be written beside a disk, it lies in the state directory, by the
// file's own number, so that all names of the file lead there. In a snapshot of a file
// system the same file has the same number: what is noted of the one is nothing to the
// other. So the file system is in the name as well, and where it has no name, the place
// and the boot must tell.

// spareState is where the state file of a file lies that cannot have one beside it. Empty:
// a block device, whose state file the user places.
func spareState(path, fileSystem string, now sources.Stamp) string {
	switch {
	case now.Block:
		return ""
	case now.Fickle || now.Birth == 0:
		return inStateDir("file-", fmt.Sprintf("path %s", path), ".state")
	}
	return inStateDir("file-", fmt.Sprintf("inode %d %d", now.Inode, now.Birth), "-"+digest(fileSystem)+".state")
}

// fileSystem names the file system that a file lies on, over restarts of the host and
// otherwise than a snapshot of it: by the device under it, or by its own id where it has no
// device. Empty: it has no such name.
func fileSystem(path string, now sources.Stamp) string {
	if now.Block {
		return ""
	}
	dir, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(now.Dev), unix.Minor(now.Dev)))
	if err != nil {
		var st unix.Statfs_t
		if unix.Statfs(path, &st) != nil || st.Fsid.Val == [2]int32{} {
			return ""
		}
		return fmt.Sprintf("id %08x%08x", uint32(st.Fsid.Val[0]), uint32(st.Fsid.Val[1]))
	}
	part := text(dir, "partition")
	if part != "" {
		dir = filepath.Dir(dir)
	}
	for _, name := range []string{"dm/uuid", "loop/backing_file", "wwid", "device/wwid", "serial", "device/serial", "device/cid", "md/uuid"} {
		if id := text(dir, name); id != "" {
			return strings.TrimSpace(fmt.Sprintf("%s %s %s", name, id, part))
		}
	}
	return ""
}

// text is the content of a file in a directory of sysfs, empty if there is none.
func text(dir, name string) string {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// spares are the state files in the state directory that may be of this file.
func (at *found) spares(files durable.FS) (paths []string, err error) {
	if at.spare == "" {
		return nil, nil
	}
	dir, base := filepath.Split(at.spare)
	names, err := files.Names(filepath.Clean(dir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("look for the state file of %s: %w", at.path, err)
	}
	prefix, _, ofInode := strings.Cut(strings.TrimPrefix(base, "file-"), "-")
	for _, name := range names {
		if name == base || ofInode && strings.HasPrefix(name, "file-"+prefix+"-") && strings.HasSuffix(name, ".state") {
			paths = append(paths, dir+name)
		}
	}
	return paths, nil
}

// choose takes the state file in the state directory if there is one of this file: it was
// made when none could be written beside the disk.
func (at *found) choose(files durable.FS) error {
	paths, err := at.spares(files)
	if err != nil || len(paths) == 0 {
		return err
	}
	beside, kin, err := at.peek(files, at.where)
	if err != nil {
		return err
	}
	for _, path := range paths {
		spare, _, err := at.peek(files, path)
		if err != nil {
			return err
		}
		if ours, err := at.isOurs(path, spare, beside); err != nil || !ours {
			if err != nil {
				return err
			}
			continue
		}
		switch {
		case beside == nil || beside.UUID != spare.UUID && (kin == kinCopy || kin == kinForeign):
		case beside.UUID != spare.UUID:
			return fmt.Errorf("%s has two state files, %s and %s: move the wrong one away", at.path, at.where, path)
		case beside.Handoff != nil && spare.Handoff == nil && spare.knows(beside.Handoff.ID) == "":
			return fmt.Errorf("%s %w: %s says so, and %s does not know of it: move the wrong one of the two state files away",
				at.path, ErrHandedOff, at.where, path)
		}
		at.where = path
		return nil
	}
	return nil
}

// peek reads a state file without taking it; nil if there is none.
func (at *found) peek(files durable.FS, path string) (*state, kinship, error) {
	b, err := files.Read(path)
	look := *at
	look.where, look.state = path, nil
	err = look.read(b, err)
	return look.state, look.kin, err
}

// isOurs reports whether a state file in the state directory is of this file, and not of the
// file with its number in a snapshot of the file system.
func (at *found) isOurs(path string, spare, beside *state) (bool, error) {
	if spare == nil {
		return false, nil // it was removed just now
	}
	boot := spare.Disk.BootID
	if boot == "" {
		boot = spare.BootID
	}
	switch {
	case at.now.Fickle || at.now.Birth == 0:
		return true, nil // by its path
	case spare.FS != "" && at.fs != "":
		return spare.FS == at.fs, nil
	case boot != "" && boot == at.now.BootID:
		return spare.Disk.Dev == at.now.Dev, nil
	case spare.Path == at.path:
		return true, nil
	case beside != nil:
		return spare.UUID == beside.UUID, nil
	case spare.Handoff == nil || len(at.marks) > 0:
		return false, nil
	}
	return false, fmt.Errorf("%s: %s says that %s was handed off, which may be this file, or the same file in a snapshot of its file system: "+
		"nothing was changed: name the state file of this one with --state, or move that one away", at.path, path, spare.Path)
}
