package disks

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// markName is the extended attribute of a disk that dest receives or has received.
const markName = "user.silo-nbd.disk"

// maxMarkedPath is how long the path of a map in a mark may be, in bytes: there is not
// always room for more.
const maxMarkedPath = 1024

// mark says at a disk which state of which device it is, so that it is known by any of
// its names, and also where its map is not.
type mark struct {
	Mark     string `json:"mark"`   // 16 bytes, hexadecimal; its map has the same
	Device   string `json:"device"` // of the map
	Complete bool   `json:"complete"`
	Map      string `json:"map,omitempty"` // the path of the map
}

// parseMark reads the attribute's value; nil if there is none.
func parseMark(path string, value []byte) (*mark, error) {
	if value == nil {
		return nil, nil
	}
	m := new(mark)
	if err := json.Unmarshal(value, m); err != nil {
		return nil, fmt.Errorf("%s: its attribute %s is not one of silo-nbd (%w): nothing was changed: "+
			"if the disk is whole, and only then, remove it by setfattr -x %[2]s", path, markName, err)
	}
	return m, nil
}

// readMark returns the mark of a disk; nil if it bears none.
func readMark(f *sources.File) (*mark, error) {
	value, err := f.Xattr(markName)
	if errors.Is(err, errors.ErrUnsupported) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return parseMark(f.Path(), value)
}

// value is the mark as a map has it; zero: none.
func (m *mark) value() (v lazy.Mark) {
	if m == nil {
		return v
	}
	b, err := hex.DecodeString(m.Mark)
	if err != nil || len(b) != len(v) {
		return lazy.Mark{0xff} // no map has that one
	}
	copy(v[:], b)
	return v
}

// backing is a disk as its map sees it.
type backing struct {
	file   *sources.File
	device lazy.UUID
	where  string // of the map
}

var _ lazy.Backing = (*backing)(nil)

// Stamp implements lazy.Backing.
func (b *backing) Stamp(final bool) ([]byte, error) {
	if final {
		if err := b.Sync(); err != nil {
			return nil, err // its times would not be durable
		}
	}
	s, err := b.file.Stamp()
	if err != nil {
		return nil, err
	}
	return json.Marshal(s)
}

// SetMark implements lazy.Backing.
func (b *backing) SetMark(v lazy.Mark, state lazy.MapState) error {
	m := mark{Mark: v.String(), Device: b.device.String(), Complete: state == lazy.MapComplete}
	if where, err := filepath.Abs(b.where); err == nil && len(where) <= maxMarkedPath {
		m.Map = where
	}
	value, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return b.file.SetXattr(markName, value)
}

// Sync implements lazy.Backing.
func (b *backing) Sync() error {
	if err := b.file.SyncXattr(); !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return nil
}
