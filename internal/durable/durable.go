// Package durable replaces small files so that a power cut leaves either the old
// content or the new one, and holds a lock on them meanwhile.
package durable

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// ErrInUse reports that another process holds the file's lock.
var ErrInUse = errors.New("another process has it in use")

const (
	// maxName is the longest name of a file in bytes (NAME_MAX).
	maxName = 255
	// tempDigits is the number of hexadecimal digits at the end of a temporary name.
	tempDigits = 8
)

// FS is the part of a file system that a replaced file needs. OS is the real
// one; tests use one that fails or loses power.
type FS interface {
	// Open reads and locks the file at path. The error wraps fs.ErrNotExist if
	// there is none, and ErrInUse if another process has locked it.
	Open(path string) (File, error)
	// Read reads the file at path without its lock.
	Read(path string) ([]byte, error)
	// Create makes a file that does not exist yet. It is locked, and its content
	// is on stable storage; its name is not before SyncDir.
	Create(path string, content []byte) (File, error)
	// Rename gives a file another name, and replaces the file that has it.
	Rename(from, to string) error
	// Claim is Rename to a name that no file has; the error wraps fs.ErrExist
	// if one has it.
	Claim(from, to string) error
	// Remove removes a file if it exists.
	Remove(path string) error
	// SyncDir makes durable which names a directory holds.
	SyncDir(dir string) error
	// Names lists the names in a directory.
	Names(dir string) ([]string, error)
}

// File is a file that is locked as long as it is open.
type File interface {
	// Content is what the file held when it was opened or created.
	Content() []byte
	// Changed is when the file was last written or given a name, in nanoseconds
	// since 1970.
	Changed() int64
	// Close unlocks the file.
	Close() error
}

// NewTemp returns a name for a file in the same directory that is to take the
// place of path. It is never longer than a file system allows.
func NewTemp(path string) string {
	var b [tempDigits / 2]byte
	_, _ = rand.Read(b[:]) // never fails
	dir, prefix := tempPrefix(path)
	return filepath.Join(dir, prefix+hex.EncodeToString(b[:]))
}

// tempPrefix is what all temporary names of path begin with.
func tempPrefix(path string) (dir, prefix string) {
	dir, base := filepath.Split(path)
	if len(base)+2+tempDigits > maxName {
		sum := sha256.Sum256([]byte(base))
		base = hex.EncodeToString(sum[:16])
	}
	return dir, "." + base + "."
}

// FitName returns name+suffix as the name of a file, or, where that is too
// long for one, a shorter name that no other name of this kind has.
func FitName(name, suffix string) string {
	if len(name)+len(suffix) <= maxName {
		return name + suffix
	}
	sum := sha256.Sum256([]byte(name))
	mark := "-" + hex.EncodeToString(sum[:16])
	return strings.ToValidUTF8(name[:maxName-len(mark)-len(suffix)], "") + mark + suffix
}

// Clean removes temporary files of path that a crash has left. The caller must
// hold the lock of path.
func Clean(f FS, path string) error {
	dir, prefix := tempPrefix(path)
	names, err := f.Names(dirOf(dir))
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		digits, ours := strings.CutPrefix(name, prefix)
		if _, err := hex.DecodeString(digits); ours && err == nil && len(digits) == tempDigits {
			errs = append(errs, f.Remove(filepath.Join(dir, name)))
		}
	}
	return errors.Join(errs...)
}

// dirOf is the directory of a path that filepath.Split has split.
func dirOf(dir string) string {
	if dir == "" {
		return "."
	}
	return dir
}

// Replace gives the file at path new content and returns it locked. With claim
// no file may be there yet. An error leaves the old content or the new one; if
// it is the new one, which is not durable then, the file is returned as well.
func Replace(f FS, path string, content []byte, claim bool) (File, error) {
	temp := NewTemp(path)
	file, err := f.Create(temp, content)
	if err != nil {
		return nil, err
	}
	if claim {
		err = f.Claim(temp, path)
	} else {
		err = f.Rename(temp, path)
	}
	if err != nil {
		return nil, errors.Join(err, file.Close(), f.Remove(temp))
	}
	return file, f.SyncDir(filepath.Dir(path))
}

// SyncDir makes durable which names a directory holds, as far as its file system
// can: some know no sync of a directory.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close() // only read
	if err := d.Sync(); !noDirSync(err) {
		return err
	}
	return nil
}

// noDirSync reports whether a file system cannot sync a directory.
func noDirSync(err error) bool {
	return errors.Is(err, syscall.EINVAL) || errors.Is(err, errors.ErrUnsupported)
}

// NoSpace reports whether err is a lack of space, inodes or quota.
func NoSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// ReadOnly reports whether err says that a place may not be written by us at all.
func ReadOnly(err error) bool {
	return errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS)
}
