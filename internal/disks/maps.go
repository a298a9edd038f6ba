package disks

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/protocol"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// MapSuffix is what the name of a map adds to its disk's.
const MapSuffix = ".silo-nbd"

// mapPath is where the map of a disk lies; empty for a device node of which it
// was not said.
func (s Spec) mapPath(f *sources.File) string {
	switch {
	case s.Map != "":
		return s.Map
	case f.IsBlockDevice():
		return ""
	}
	return s.Path + MapSuffix
}

// checkMap says before anything is changed why no map could be made for a disk
// that is to be overwritten.
func (s Spec) checkMap() error {
	where := s.Map
	if where == "" {
		where = s.Path + MapSuffix
	}
	i, err := lazy.Inspect(where)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		_, err = os.Stat(filepath.Dir(where))
		return err
	case errors.Is(err, lazy.ErrMapDamaged), errors.Is(err, lazy.ErrMapNewer):
		return nil // it is to go
	case err != nil:
		return err
	case i.InUse:
		return fmt.Errorf("%s: %w", where, lazy.ErrMapInUse)
	}
	return nil
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
	maps, err := filepath.Glob(filepath.Join(d.dir, "*.raw"+MapSuffix))
	var all []Spec
	for _, m := range maps {
		path := strings.TrimSuffix(m, MapSuffix)
		all = append(all, Spec{Name: strings.TrimSuffix(filepath.Base(path), ".raw"), Named: true, Path: path})
	}
	return all, err
}

// resume opens a disk that has a map, and checks that they belong together; nil
// if there is no map. A disk without one is left to others.
func resume(s Spec) (*Disk, error) {
	where := s.Map
	if where == "" {
		where = s.Path + MapSuffix
	}
	if _, err := os.Stat(where); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	f, err := sources.OpenFile(s.Path, sources.FileOptions{Partial: true})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s is the map of %s, which is gone: bring it back, or remove the map to begin anew", where, s.Path)
	}
	if err != nil {
		return nil, err
	}
	m, err := lazy.OpenMap(where, lazy.Identity{})
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	disk := &Disk{File: f, Name: s.Name, Map: m}
	if !s.Named && m.Identity().Name != "" {
		disk.Name = m.Identity().Name
	}
	if err := fits(disk); err != nil {
		return nil, errors.Join(err, disk.Close())
	}
	return disk, nil
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

// makeMap makes the map of a disk that is to receive what a announces, instead
// of the one that may be there.
func makeMap(d *Disk, s Spec, a migrate.Announcement) (*lazy.Map, error) {
	where := s.mapPath(d.File)
	if where == "" || protocol.Unchecked {
		return nil, nil
	}
	if err := removeMap(where); err != nil {
		return nil, err
	}
	return lazy.CreateMap(where, lazy.Identity{
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
