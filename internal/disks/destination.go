package disks

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// Disk is a disk of the destination that is open and locked.
type Disk struct {
	*sources.File
	Name      string    // what it is called from here on; never empty
	KnownZero bool      // it was made just now, so all of it reads as zeroes
	Map       *lazy.Map // knows which blocks are here; nil if nothing is to remember that
}

// Close closes the disk and its map.
func (d *Disk) Close() error {
	if d.Map == nil {
		return d.File.Close()
	}
	return errors.Join(d.Map.Close(), d.File.Close())
}

// Destination is the disks that may receive what the source sends.
type Destination struct {
	specs     []Spec
	dir       string // where disks are made by the source's names, if not empty
	overwrite bool

	mu sync.Mutex
	// Guarded by mu:
	opened  map[string]*sources.File // by path: existed before, locked, not asked for yet
	resumed []*Disk                  // existed before with its map, not asked for yet
}

// OpenDestination prepares the disks of the command line, or the directory in
// which a disk is made for each name that the source sends. Disks that exist
// are opened and locked now, so that one which is in use or would be
// overwritten is refused before anything is sent; nothing is changed yet.
func OpenDestination(specs []Spec, dir string, overwrite bool) (*Destination, error) {
	d := &Destination{specs: specs, dir: dir, overwrite: overwrite, opened: make(map[string]*sources.File)}
	if dir != "" {
		info, err := os.Stat(dir)
		if err != nil {
			return nil, err
		}
		if !info.IsDir() {
			return nil, fmt.Errorf("%s is not a directory", dir)
		}
	}
	all, err := d.candidates()
	for _, s := range all {
		if err == nil {
			err = d.prepare(s)
		}
	}
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// prepare opens and locks what is at s already, the disk with its map or, to
// be overwritten, the disk alone.
func (d *Destination) prepare(s Spec) error {
	if !d.overwrite {
		disk, err := resume(s)
		if err != nil {
			return err
		}
		if disk != nil {
			d.resumed = append(d.resumed, disk)
			return d.whose(s, disk)
		}
	}
	if err := s.checkMap(); err != nil {
		return err
	}
	f, err := d.openExisting(s.Path)
	if err == nil && f != nil {
		d.opened[s.Path] = f
	}
	return err
}

// Resumed returns the disks of which a part is here, as their maps know. They
// are the caller's to close.
func (d *Destination) Resumed() []*Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	disks := d.resumed
	d.resumed = nil
	return disks
}

// openExisting opens a disk that exists; nil if it does not.
func (d *Destination) openExisting(path string) (*sources.File, error) {
	switch info, err := os.Stat(path); {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Stat(filepath.Dir(path)); err != nil {
			return nil, err
		}
		return nil, sources.CheckPath(path)
	case err != nil:
		return nil, err
	case d.overwrite && info.Mode().IsRegular() && info.Size() == 0:
		return nil, nil // no disk yet: nothing to lock and nothing to lose
	}
	f, err := sources.OpenFile(path, sources.FileOptions{Partial: true}) // says what is in use, a directory, or not writable
	if err != nil {
		return nil, err
	}
	if !d.overwrite {
		return nil, errors.Join(exists(path), f.Close())
	}
	return f, nil
}

func exists(path string) error {
	return fmt.Errorf("%s exists: give --overwrite to replace what it holds, or another path", path)
}

// Expected is how many disks the source has to send; 0 is any number.
func (d *Destination) Expected() int { return len(d.specs) }

// Open opens the disk that takes what the source announces, and makes its map.
// A file that does not exist is made, sparse; one that does has to be of the
// size; a block device has to be large enough, and has a map only if --map says
// where.
func (d *Destination) Open(a migrate.Announcement) (*Disk, error) {
	spec, err := d.find(a.Name)
	if err != nil {
		return nil, err
	}
	if err := spec.checkMap(); err != nil {
		return nil, err
	}
	disk, err := d.open(spec, int64(a.Size))
	if err != nil {
		return nil, err
	}
	if disk.Map, err = makeMap(disk, spec, a); err != nil {
		return nil, errors.Join(err, disk.File.Close())
	}
	return disk, nil
}

func (d *Destination) open(spec Spec, size int64) (*Disk, error) {
	var err error
	d.mu.Lock()
	f := d.opened[spec.Path]
	delete(d.opened, spec.Path)
	d.mu.Unlock()
	if f == nil && d.dir != "" {
		if f, err = d.openExisting(spec.Path); err != nil {
			return nil, err
		}
	}
	if f != nil {
		if err := checkSize(f, size); err != nil {
			d.mu.Lock()
			d.opened[spec.Path] = f // for a source that fits
			d.mu.Unlock()
			return nil, err
		}
		return &Disk{File: f, Name: spec.Name}, nil
	}
	if f, err = d.create(spec.Path, size); err != nil {
		return nil, err
	}
	return &Disk{File: f, Name: spec.Name, KnownZero: f.Created()}, nil
}

// create makes a disk that does not exist, or fills an empty file.
func (d *Destination) create(path string, size int64) (*sources.File, error) {
	f, err := sources.OpenFile(path, sources.FileOptions{Create: true, Fill: d.overwrite, Size: size, Partial: true})
	if err != nil {
		return nil, err
	}
	if !f.Created() && !d.overwrite { // somebody made it meanwhile
		return nil, errors.Join(exists(path), f.Close())
	}
	return f, nil
}

// find says which disk takes what the source calls name.
func (d *Destination) find(name string) (Spec, error) {
	if d.dir != "" {
		if err := CheckFileName(name); err != nil {
			return Spec{}, err
		}
		return Spec{Name: name, Path: filepath.Join(d.dir, name+".raw")}, nil
	}
	if err := CheckName(name); err != nil {
		return Spec{}, err
	}
	if len(d.specs) == 1 && !d.specs[0].Named {
		s := d.specs[0]
		if name != "" {
			s.Name = name
		}
		return s, nil
	}
	for _, s := range d.specs {
		if s.Name == name {
			return s, nil
		}
	}
	return Spec{}, fmt.Errorf("no --disk is called %q, as the source's is: want --disk %s=PATH", name, name)
}

// checkSize refuses a regular file of another size than the source's disk: the
// file may have been named by mistake, and to cut it off or to pad it is not to
// replace what it holds. What a block device lacks is found by who lays the disk
// on it.
func checkSize(f *sources.File, size int64) error {
	if f.IsBlockDevice() || f.Room() == uint64(size) {
		return nil
	}
	return fmt.Errorf("%s has %d bytes, the source's disk %d: --overwrite replaces what a file holds, and does not change its size; "+
		"nothing was changed: remove it and it is made anew, or make it as large first, by truncate -s %d %[1]s", f.Path(), f.Room(), size, size)
}

// Close closes the disks that were opened and never asked for.
func (d *Destination) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for _, f := range d.opened {
		errs = append(errs, f.Close())
	}
	clear(d.opened)
	for _, disk := range d.resumed {
		errs = append(errs, disk.Close())
	}
	d.resumed = nil
	return errors.Join(errs...)
}
