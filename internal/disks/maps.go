package disks

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unicode/utf8"

	"github.com/silo-nbd/silo-nbd/internal/identity"
	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/protocol"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// MapSuffix is what the name of a map adds to its disk's.
const MapSuffix = ".silo-nbd"

// MapBeside is where the map of a disk lies if nobody says where: beside the file that
// the path leads to.
func MapBeside(path string) string {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	return beside(path)
}

// beside adds the suffix to a path. A name that would be too long is shortened.
func beside(path string) string {
	dir, base := filepath.Split(path)
	if len(base)+len(MapSuffix) <= maxFileName {
		return path + MapSuffix
	}
	sum := sha256.Sum256([]byte(base))
	tail := "-" + hex.EncodeToString(sum[:16]) + MapSuffix
	base = base[:maxFileName-len(tail)]
	for !utf8.ValidString(base) && len(base) > 0 && !utf8.RuneStart(base[len(base)-1]) {
		base = base[:len(base)-1]
	}
	return dir + base + tail
}

// FindMap is where the map of a disk lies that was received: beside it, or where the
// disk itself says.
func FindMap(path string) string {
	where := MapBeside(path)
	if exists(where) {
		return where
	}
	if old := beside(path); exists(old) { // beside a link, as it was once
		return old
	}
	if m := peek(path); m != nil && m.Map != "" && exists(m.Map) {
		return m.Map
	}
	return where
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// mapPath is where the map of a disk lies.
func (s Spec) mapPath() string {
	if s.Map != "" {
		return s.Map
	}
	where := MapBeside(s.Path)
	if old := beside(s.Path); !exists(where) && exists(old) {
		return old
	}
	return where
}

// checkMap says before anything is changed why no map could be made for a disk
// that is to be overwritten.
func (s Spec) checkMap() error {
	for i, where := range s.maps() {
		found, err := lazy.Inspect(where)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			if _, err := os.Stat(filepath.Dir(where)); err != nil {
				return err
			}
		case errors.Is(err, lazy.ErrMapDamaged), errors.Is(err, lazy.ErrMapNewer):
			// it is to go
		case err != nil && i > 0: // nobody wants to put a map there
		case err != nil:
			return err
		case found.InUse:
			return fmt.Errorf("%s: %w", where, lazy.ErrMapInUse)
		}
	}
	return nil
}

// maps are the places where a map of the disk may lie: that of its map first.
func (s Spec) maps() []string {
	all := []string{s.mapPath()}
	for _, other := range []string{MapBeside(s.Path), beside(s.Path)} {
		if s.Map != "" && exists(other) && !sameFile(s.Map, other) {
			all = append(all, other)
		}
	}
	return all
}

func sameFile(a, b string) bool {
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}

// candidates are the disks that may be here already: those of the command line,
// or those in the directory that have a map.
func (d *Destination) candidates() ([]Spec, error) {
	if d.dir == "" {
		return d.specs, nil
	}
	if d.overwrite {
		return nil, nil
	}
	found, err := filepath.Glob(filepath.Join(d.dir, "*.raw"))
	if err != nil {
		return nil, err
	}
	maps, err := filepath.Glob(filepath.Join(d.dir, "*.raw"+MapSuffix))
	for _, m := range maps { // also those whose disk is gone
		if path := strings.TrimSuffix(m, MapSuffix); !exists(path) {
			found = append(found, path)
		}
	}
	var all []Spec
	for _, path := range found {
		s := Spec{Name: strings.TrimSuffix(filepath.Base(path), ".raw"), Named: true, Path: path}
		if exists(s.mapPath()) {
			all = append(all, s)
		}
	}
	return all, err
}

// resume opens a disk that has a map, and checks that they belong together; nil if
// there is no map, or one that was made just before a crash, when its disk was not. A
// disk without one is left to others. blank is a disk that the crash has left after
// that: nothing was ever written to it.
func (d *Destination) resume(s Spec) (disk *Disk, blank *sources.File, err error) {
	where := s.mapPath()
	if !exists(where) {
		return nil, nil, nil
	}
	unused, err := neverUsed(where)
	if err != nil {
		return nil, nil, err
	}
	// Others may read a disk that is complete, also while we open it.
	i, err := lazy.InspectHeader(where)
	complete := err == nil && i.State == lazy.MapComplete
	f, err := sources.OpenFile(s.Path, sources.FileOptions{Partial: !complete})
	switch {
	case errors.Is(err, fs.ErrNotExist) && unused:
		return nil, nil, nil
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil, fmt.Errorf("%s is the map of %s, which is gone: bring it back, or remove the map to begin anew", where, s.Path)
	case err != nil:
		return nil, nil, err
	case unused && isBlank(f):
		return nil, f, nil
	case unused:
		return nil, nil, errors.Join(errExists(s.Path), f.Close())
	}
	m, err := lazy.OpenMap(where, lazy.Identity{})
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	disk = &Disk{File: f, Name: s.Name, Map: m}
	if !s.Named && m.Identity().Name != "" {
		disk.Name = m.Identity().Name
	}
	if err := d.admit(s, disk); err != nil {
		return nil, nil, errors.Join(err, disk.Close())
	}
	return disk, nil, nil
}

// admit checks that a disk is the one of its map, and binds them.
func (d *Destination) admit(s Spec, disk *Disk) error {
	for _, other := range s.maps()[1:] {
		if i, err := lazy.Inspect(other); err == nil {
			return fmt.Errorf("%s: there is another map of the disk, at %s (%s), and only one can be right: nothing was changed: "+
				"remove the one that is not its own", disk.Map.Path(), other, i.State)
		}
	}
	if err := fits(disk); err != nil {
		return err
	}
	if err := d.whose(s, disk); err != nil {
		return err
	}
	return disk.bind(s, d.moved)
}

// ours refuses a disk that this host has handed off since it was complete. What is noted
// of one that is not whole is of contents before: those could have been handed off, this
// part of a disk could not.
func (d *Disk) ours(s Spec) error {
	if d.Map.State() != lazy.MapComplete {
		return identity.EndNote(d.File, s.State)
	}
	note, err := identity.NoteAt(d.File, s.State)
	if err != nil || note == nil {
		return err
	}
	return fmt.Errorf("%w; nothing was changed: use it there, or, to receive it again, begin anew with --overwrite", note.Err())
}

// neverUsed reports whether a map was made, and nothing after that: neither was a disk
// bound to it, nor is anything of one here.
func neverUsed(where string) (bool, error) {
	i, err := lazy.InspectHeader(where)
	if err != nil || i.State != lazy.MapStandby || len(i.Binding.Stamp) > 0 || !i.Bindable {
		return false, err
	}
	i, err = lazy.Inspect(where)
	return err == nil && i.Missing == i.Blocks && i.Partial == 0, err
}

// isBlank reports whether a file is one hole.
func isBlank(f *sources.File) bool {
	if f.IsBlockDevice() {
		return false
	}
	for off := int64(0); off < int64(f.Size()); {
		end, hole, err := f.ExtentAt(off)
		if err != nil || !hole {
			return false
		}
		off = end
	}
	return true
}

// fits says whether a disk can be the one of its map (trap D7).
func fits(d *Disk) error {
	want := uint64(d.Map.Identity().Size)
	if have := d.Room(); have < want || have > want && !d.IsBlockDevice() {
		return fmt.Errorf("%s has %d bytes, its map %s is of a disk of %d: it was shrunk, grown or replaced; "+
			"nothing was changed: bring the right one back, or remove both to begin anew", d.Path(), have, d.Map.Path(), want)
	}
	return nil
}

// whose refuses the map of another disk, as when the maps of two disks were
// given the wrong way round. Only of one among several disks the name that its
// source uses is known beforehand.
func (d *Destination) whose(s Spec, disk *Disk) error {
	if name := disk.Map.Identity().Name; s.Map != "" && len(d.specs) > 1 && name != s.Name {
		return fmt.Errorf("%s is the map of the disk %q, not of %q: nothing was changed: give the right one", s.Map, name, s.Name)
	}
	return nil
}

// makeMap makes the map of a disk that is to receive what a announces, instead of the
// ones that may be there; nil if it is to have none. The disk need not exist yet.
func makeMap(s Spec, device bool, a migrate.Announcement) (*lazy.Map, error) {
	if device && s.Map == "" || protocol.Unchecked {
		return nil, nil
	}
	for i, where := range s.maps() {
		if err := removeMap(where); err != nil && !(i > 0 && errors.Is(err, lazy.ErrNotMap)) {
			return nil, err
		}
	}
	return lazy.CreateMap(s.mapPath(), lazy.Identity{
		Size: int64(a.Size), BlockSize: int64(a.BlockSize),
		Source: a.Identity.UUID, Generation: a.Identity.Generation, Name: a.Name,
	})
}

// removeMap removes the map of a disk that is to be overwritten, if it is one
// and nobody has it.
func removeMap(path string) error {
	m, err := lazy.OpenMap(path, lazy.Identity{})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, lazy.ErrMapDamaged), errors.Is(err, lazy.ErrMapNewer):
		return os.Remove(path)
	case err != nil:
		return err
	}
	return errors.Join(os.Remove(path), m.Close())
}
