package identity

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/internal/durable"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// Suffix is what the name of a state file beside its disk adds to the disk's.
const Suffix = ".silo-nbd-source"

const (
	// stateDirVariable names the directory for the notes of devices, and for state
	// files that cannot lie beside their disk.
	stateDirVariable = "SILO_NBD_STATE_DIR"
	defaultStateDir  = "/var/lib/silo-nbd"
)

// Disk is what the package needs of a disk; *sources.File is one.
type Disk interface {
	Path() string
	Size() uint64
	IsBlockDevice() bool
	Stamp() (sources.Stamp, error)
	Xattr(name string) ([]byte, error)
	SetXattr(name string, value []byte) error
	RemoveXattr(name string) error
	SyncXattr() error
}

// Default returns where the state file of a disk lies if the user does not say
// where: beside the file that the path leads to. For a block device it fails
// where a restart of the host would lose the file.
func Default(path string, blockDevice bool) (string, error) {
	if !blockDevice {
		return beside(resolve(path)), nil
	}
	dir := filepath.Dir(path)
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return "", &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	switch int64(fs.Type) {
	case unix.TMPFS_MAGIC, unix.RAMFS_MAGIC: // devtmpfs is one of these
		return "", fmt.Errorf("%s: what is written beside it, in %s, is gone when the host restarts, and a destination would not know the disk again: "+
			"say where its state file is to lie, as in --state %s/%s.state", path, dir, defaultStateDir, filepath.Base(path))
	}
	return beside(path), nil
}

// beside is a name next to a disk. It is shortened where it would be too long.
func beside(path string) string {
	dir, base := filepath.Split(path)
	return dir + durable.FitName(base, Suffix)
}

// resolve returns path without links, as far as it exists.
func resolve(path string) string {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	} else if dir, err := filepath.EvalSymlinks(filepath.Dir(path)); err == nil {
		path = filepath.Join(dir, filepath.Base(path))
	}
	if abs, err := filepath.Abs(path); err == nil {
		return abs
	}
	return path
}

// kinship is how a disk is related to the one that a state file was written for.
type kinship int

const (
	kinSame    kinship = iota // the same file or device
	kinMoved                  // in its place, but perhaps another one: restored, or its file system was mounted anew
	kinCopy                   // it was copied together with its state file
	kinForeign                // another disk
)

// kin holds the state file at where against the disk.
func (s *state) kin(disk, where string, now sources.Stamp) kinship {
	was := s.Disk
	was.Size = now.Size // a disk that was made larger is the same one
	same, known := was.SameDisk(now)
	inPlace := s.Path == disk || s.Path == ""
	sameSize := s.Disk.Size == now.Size
	switch {
	case same:
		return kinSame
	case now.Block:
		if known || !inPlace && !sameSize {
			return kinForeign
		}
		return kinMoved // no name of its own: the host was restarted
	case known && s.Path == "": // an earlier version; the copy of a template perhaps
		if !sameSize {
			return kinForeign
		}
		return kinCopy
	case inPlace:
		return kinMoved
	case s.State == where:
		return kinForeign
	}
	return kinCopy
}

// firstUUID is the UUID of a disk that has no state file. It is made of what is
// known of the disk, so that a process that can keep a state file has the same as
// one before it that could not: then the destination compares, and does not
// refuse for good.
func firstUUID(path string, now sources.Stamp) string {
	host, err := os.ReadFile("/etc/machine-id")
	if err != nil || len(host) < 32 {
		return newUUID()
	}
	parts := []string{"silo-nbd disk", strings.TrimSpace(string(host)), path, fmt.Sprint(now.Size)}
	switch {
	case now.Block:
		parts = append(parts, now.DMUUID, now.WWID, now.PartUUID)
	case !now.Fickle:
		parts = append(parts, fmt.Sprint(now.Inode), fmt.Sprint(now.Birth))
	}
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	sum[6], sum[8] = sum[6]&0x0f|0x80, sum[8]&0x3f|0x80 // version 8, RFC 9562
	return hex.EncodeToString(sum[:16])
}

// deviceNote is where the note of a device lies, by the device's own name and not
// by a path; empty if it has no such name.
func deviceNote(now sources.Stamp) string {
	var id string
	switch {
	case now.DMUUID != "":
		id = "dm " + now.DMUUID
	case now.WWID != "":
		id = "wwid " + now.WWID + " " + now.PartUUID
	case now.DiskSeq != 0 && now.BootID != "": // as long as the host runs
		id = fmt.Sprintf("boot %s %d %d", now.BootID, now.DiskSeq, now.Dev)
	default:
		return ""
	}
	return inStateDir("device-", id, ".note")
}

// loopNote is where the note of a loop device over all of a file would lie: who
// names the file names the same disk.
func loopNote(now sources.Stamp) string {
	if now.Birth == 0 {
		return "" // then no loop device over it has a name of its own
	}
	return inStateDir("device-", fmt.Sprintf("wwid loop-%d-%d-%d-0 ", now.Dev, now.Inode, now.Birth), ".note")
}

// backingFile is the path of the file behind a loop device; empty: it is none, or
// its file has no path here.
func backingFile(now sources.Stamp) string {
	b, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/loop/backing_file", unix.Major(now.Dev), unix.Minor(now.Dev)))
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(b), "\n")
}

// inStateDir is the path of a file in the state directory.
func inStateDir(prefix, id, suffix string) string {
	dir := os.Getenv(stateDirVariable)
	if dir == "" {
		dir = defaultStateDir
	}
	return filepath.Join(dir, prefix+digest(id)+suffix)
}

func digest(id string) string {
	sum := sha256.Sum256([]byte(id))
	return hex.EncodeToString(sum[:16])
}
