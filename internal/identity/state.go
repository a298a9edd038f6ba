// Package identity keeps which disk a source's disk is, which contents it has,
// and to which destination it was handed off. It lies in a small state file,
// beside the disk or where the caller says, and what must not be lost also at
// the disk itself: as an extended attribute of a file, in a state directory for
// a device.
package identity

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"

	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// version of the state file. Versions 1 and 2 are read, see old.go.
const version = 3

// maxEnded bounds how many handoffs of the past a state file remembers.
const maxEnded = 32

// state is what the state file holds.
type state struct {
	Version    int           `json:"version"`
	UUID       string        `json:"uuid"` // 32 hexadecimal digits
	Generation number        `json:"generation"`
	Disk       sources.Stamp `json:"disk"`         // with which the generation is proved; zero: it is not
	Path       string        `json:"path"`         // of the disk, without links
	State      string        `json:"state_path"`   // of this file, without links
	FS         string        `json:"fs,omitempty"` // the disk's file system, see fileSystem
	Met        string        `json:"met,omitempty"`
	Peer       *peer         `json:"peer,omitempty"`

	Cloned bool   `json:"cloned,omitempty"`  // destinations may have copies of it, which are not noted
	Live   bool   `json:"live,omitempty"`    // the generation is that of a disk in use
	Open   bool   `json:"open,omitempty"`    // it is served, or its process was killed
	BootID string `json:"boot_id,omitempty"` // in which it was opened

	Staged  string   `json:"staged,omitempty"` // a handoff that has not been published, as far as this disk goes
	Handoff *handoff `json:"handoff,omitempty"`
	Written string   `json:"written,omitempty"` // what has shown that the disk was written since it was handed off; empty: nothing
	Samples string   `json:"samples,omitempty"` // of the contents, see sample
	Ended   []ended  `json:"ended,omitempty"`   // handoffs that count no more, the last one last
}

// peer is a destination's device.
type peer struct {
	Device string `json:"device"` // 32 hexadecimal digits
	Epoch  number `json:"epoch"`
	Steps  uint32 `json:"steps,omitempty"`
}

// handoff is to which destination a disk was handed off. It counts if all disks
// of it say so: the destination was told only after that.
type handoff struct {
	ID       string   `json:"id"`
	Disks    []member `json:"disks"` // all disks of it
	Owner    string   `json:"owner"` // the destination's device, 32 hexadecimal digits
	Epoch    number   `json:"epoch"` // of it, as last confirmed; 0: none was
	Steps    uint32   `json:"steps,omitempty"`
	At       string   `json:"at,omitempty"` // the destination's address, if the source connected to it
	Frozen   bool     `json:"frozen,omitempty"`
	Marked   bool     `json:"marked,omitempty"`   // the file bears the attribute
	Taken    bool     `json:"taken,omitempty"`    // the destination has said that it is live
	Complete bool     `json:"complete,omitempty"` // the destination has everything
}

// member is a disk of a handoff.
type member struct {
	UUID string `json:"uuid"`
	Name string `json:"name,omitempty"`
	Path string `json:"path,omitempty"`
}

// ended is a handoff that counts no more.
type ended struct {
	ID    string `json:"id"`
	How   string `json:"how"`
	Owner string `json:"owner,omitempty"` // the device that it went to, if that is known
}

// How a handoff has ended.
const (
	endAborted   = "aborted"   // it was never published
	endReclaimed = "reclaimed" // by --force-reclaim
	endReturned  = "returned"  // the disk has come back, or was replaced
)

// number is 64 bits as 16 hexadecimal digits: other readers of JSON keep 53.
type number uint64

// MarshalText implements encoding.TextMarshaler.
func (n number) MarshalText() ([]byte, error) { return fmt.Appendf(nil, "%016x", uint64(n)), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (n *number) UnmarshalText(b []byte) error {
	u, err := strconv.ParseUint(string(b), 16, 64)
	if err != nil {
		return fmt.Errorf("%.40q: want 16 hexadecimal digits", b)
	}
	*n = number(u)
	return nil
}

// draw returns 64 random bits that are not zero. A counter would go on from the
// same value in a disk that was rolled back or cloned with its state file.
func draw() number {
	var b [8]byte
	for {
		_, _ = rand.Read(b[:]) // never fails
		if n := binary.LittleEndian.Uint64(b[:]); n != 0 {
			return number(n)
		}
	}
}

func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:])                      // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80 // version 4, RFC 9562
	return hex.EncodeToString(b[:])
}

// uuid reads 32 hexadecimal digits.
func uuid(what, digits string) (id [16]byte, err error) {
	raw, err := hex.DecodeString(digits)
	if err != nil || len(raw) != len(id) {
		return id, fmt.Errorf("%s %.40q: want 32 hexadecimal digits", what, digits)
	}
	return [16]byte(raw), nil
}

// identity is what destinations are told. The state has been checked.
func (s *state) identity() migrate.Identity {
	id, _ := uuid("uuid", s.UUID) // checked when it was read
	return migrate.Identity{UUID: id, Generation: uint64(s.Generation)}
}

// change makes it another generation, of which no destination has a part.
func (s *state) change(now sources.Stamp) {
	s.Generation = draw()
	s.Disk, s.Met, s.Peer = now, "", nil
	s.Written, s.Samples = "", ""
}

// knows returns what became of a handoff, as far as the state file can tell:
// endAborted if it has never been published, empty if the file does not know it.
func (s *state) knows(id string) string {
	if s.Staged == id && id != "" {
		return endAborted
	}
	if i := slices.IndexFunc(s.Ended, func(e ended) bool { return e.ID == id }); i >= 0 {
		return s.Ended[i].How
	}
	return ""
}

// end notes that a handoff counts no more.
func (s *state) end(id, how string) {
	if id == "" || s.knows(id) == how && s.Staged != id {
		return
	}
	owner := ""
	if s.Handoff != nil && s.Handoff.ID == id {
		owner = s.Handoff.Owner
	}
	s.Ended = append(slices.Clone(s.Ended), ended{id, how, owner})
	if len(s.Ended) > maxEnded { // those that were never published go first
		i := max(0, slices.IndexFunc(s.Ended, func(e ended) bool { return e.How == endAborted }))
		s.Ended = slices.Delete(s.Ended, i, i+1)
	}
	if s.Staged == id {
		s.Staged = ""
	}
	if s.Handoff != nil && s.Handoff.ID == id {
		s.Handoff = nil
	}
}

// owner is the destination's device of a handoff. The handoff has been checked.
func (h *handoff) owner() migrate.Device {
	device, _ := uuid("owner", h.Owner) // checked when it was read
	return device
}

// encode returns the content of the state file.
func (s *state) encode() ([]byte, error) {
	s.Version = version
	b, err := json.MarshalIndent(s, "", "  ")
	return append(b, '\n'), err
}

// decode reads the content of the state file at path.
func decode(path string, b []byte) (*state, error) {
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return nil, fmt.Errorf("%s is not a state file of a source, or it is damaged: %w; bring the right one back, or move it away if the disk is to begin anew", path, err)
	}
	s, err := new(state), error(nil)
	switch head.Version {
	case 1, 2:
		s, err = decodeOld(b)
	case version:
		err = strictly(b, s)
	default:
		return nil, fmt.Errorf("%s has version %d, this program knows %d: use a later one, or move it away to begin anew", path, head.Version, version)
	}
	if err == nil {
		err = s.check()
	}
	if err != nil {
		return nil, fmt.Errorf("%s is damaged: %w; bring the right one back, or move it away if the disk is to begin anew", path, err)
	}
	return s, nil
}

func strictly(b []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	return dec.Decode(v)
}

// check says what of a state cannot be.
func (s *state) check() error {
	if _, err := uuid("uuid", s.UUID); err != nil {
		return err
	}
	if s.Peer != nil {
		if _, err := uuid("device", s.Peer.Device); err != nil {
			return err
		}
	}
	if s.Handoff != nil {
		return s.Handoff.check()
	}
	return nil
}

func (h *handoff) check() error {
	if _, err := uuid("owner", h.Owner); err != nil {
		return err
	}
	if h.ID == "" || len(h.Disks) == 0 {
		return fmt.Errorf("a handoff without id or disks")
	}
	for _, d := range h.Disks {
		if _, err := uuid("uuid of a disk", d.UUID); err != nil {
			return err
		}
	}
	return nil
}
