// Package identity tells whether a disk is still the one that it was: a UUID
// that a disk is given once, and a generation that goes up whenever the disk is
// found changed. Both lie in a small file, beside the disk or where one is told, so that a migration
// which was interrupted goes on only with the same bytes.
package identity

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

// Suffix is what the name of a state file beside its disk adds to the disk's.
const Suffix = ".silo-nbd-source"

const (
	version     = 1
	versionLive = 2 // the disk is live, or was: an earlier program must not take it for frozen
	// A disk's contents are known by this many pieces of so many bytes, spread
	// over it, the first and the last among them.
	samples    = 64
	sampleSize = 4096
)

// Disk is what the package needs to look at a disk.
type Disk interface {
	ReadAt(p []byte, off int64) (int, error)
	Size() uint64
	Path() string
}

// state is the file's content.
type state struct {
	Version     int         `json:"version"`
	UUID        string      `json:"uuid"` // 32 hexadecimal digits
	Generation  uint64      `json:"generation"`
	Fingerprint fingerprint `json:"fingerprint"`
	Met         string      `json:"met,omitempty"` // address of a destination that has begun to take this generation, and has not all of it
	// Of version 2 only:
	Open    bool     `json:"open,omitempty"`    // it is served, or its process has crashed
	Handoff *handoff `json:"handoff,omitempty"` // it was handed off
}

// fingerprint is what is compared to find a disk changed. A change that keeps
// all of it is not found: one of a block device that no sample lies in.
type fingerprint struct {
	Size    uint64 `json:"size"`              // bytes
	Inode   uint64 `json:"inode,omitempty"`   // of a regular file
	ModTime int64  `json:"modtime,omitempty"` // of a regular file, nanoseconds since 1970
	Samples string `json:"samples"`           // SHA-256
}

// Default is where the state file of a disk lies if nobody says where: beside it.
// Of a block device it is refused where a restart of the host would lose it.
func Default(path string, blockDevice bool) (string, error) {
	if !blockDevice {
		return path + Suffix, nil
	}
	dir := filepath.Dir(path)
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return "", &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	switch int64(fs.Type) {
	case unix.TMPFS_MAGIC, unix.RAMFS_MAGIC: // devtmpfs is one of these
		return "", fmt.Errorf("%s: what is written beside it, in %s, is gone when the host restarts, and a destination would not know the disk again: "+
			"say where its state file is to lie, as in --state /var/lib/silo-nbd/%s.state", path, dir, filepath.Base(path))
	}
	return path + Suffix, nil
}

// Of returns the disk's identity as the state file at path has it, which is made
// if there is none yet. If the disk has changed since it gets a new generation.
// The disk must not be written meanwhile.
func Of(d Disk, path string) (migrate.Identity, error) {
	print, err := take(d)
	if err != nil {
		return migrate.Identity{}, err
	}
	s, err := load(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		s = state{Version: version, UUID: newUUID(), Generation: 1, Fingerprint: print}
	case err != nil:
		return migrate.Identity{}, err
	case s.Handoff != nil:
		return migrate.Identity{}, fmt.Errorf("%s: %w", d.Path(), ErrHandedOff)
	case s.Version == versionLive: // what was copied of this generation has changed since
		s.Version, s.Open = version, false
		s.change(print)
	case s.Fingerprint == print:
		return s.identity()
	default:
		s.change(print)
	}
	if err := save(path, s); err != nil {
		return migrate.Identity{}, fmt.Errorf("keep the disk's identity: %w", err)
	}
	return s.identity()
}

// change makes it another generation, which nobody has a part of.
func (s *state) change(print fingerprint) {
	s.Generation++
	s.Fingerprint, s.Met = print, ""
}

// Met returns the address of the destination that had a part of the disk with the
// state file at path when its source ended, so that it may come back; "" if none
// had.
func Met(path string) (address string, err error) {
	s, err := load(path)
	return s.Met, err
}

// SetMet keeps in the state file at path, which Of has made, what Met says.
func SetMet(path, address string) error {
	s, err := load(path)
	if err != nil || s.Met == address {
		return err
	}
	s.Met = address
	return save(path, s)
}

func (s state) identity() (id migrate.Identity, err error) {
	raw, err := hex.DecodeString(s.UUID)
	if err != nil || len(raw) != len(id.UUID) {
		return id, fmt.Errorf("uuid %q: want 32 hexadecimal digits", s.UUID)
	}
	copy(id.UUID[:], raw)
	id.Generation = s.Generation
	return id, nil
}

func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:])                      // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80 // version 4, RFC 9562
	return hex.EncodeToString(b[:])
}

// take looks at the disk as it is now.
func take(d Disk) (fingerprint, error) {
	f := fingerprint{Size: d.Size()}
	info, err := os.Stat(d.Path())
	if err != nil {
		return f, err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && info.Mode().IsRegular() {
		f.Inode, f.ModTime = st.Ino, info.ModTime().UnixNano()
	}
	sum := sha256.New()
	buf := make([]byte, sampleSize)
	last := int64(max(f.Size, sampleSize)) - sampleSize
	for i := range int64(samples) {
		n := min(int64(f.Size), sampleSize)
		if _, err := d.ReadAt(buf[:n], last*i/(samples-1)); err != nil {
			return f, fmt.Errorf("%s: %w", d.Path(), err)
		}
		sum.Write(buf[:n])
	}
	f.Samples = hex.EncodeToString(sum.Sum(nil))
	return f, nil
}

func load(path string) (s state, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return s, err
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil {
		return s, fmt.Errorf("%s is no state file of a source: %w; remove it if the disk is to begin anew", path, err)
	}
	if s.Version != version && s.Version != versionLive {
		return s, fmt.Errorf("%s has version %d, this program knows %d: use a later one, or remove it to begin anew", path, s.Version, versionLive)
	}
	if _, err := s.identity(); err != nil {
		return s, fmt.Errorf("%s: %w; remove it if the disk is to begin anew", path, err)
	}
	return s, nil
}

// save replaces the file at path, whole or not at all.
func save(path string, s state) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // it has another name if all went well
	_, err = tmp.Write(append(b, '\n'))
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
