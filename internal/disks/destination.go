package disks

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// Disk is a disk of the destination that is open and locked.
type Disk struct {
	*sources.File
	Name      string // what it is called from here on; never empty
	KnownZero bool   // it was made just now, so all of it reads as zeroes
}

// Destination is the disks that may receive what the source sends.
type Destination struct {
	specs     []Spec
	dir       string // where disks are made by the source's names, if not empty
	overwrite bool

	mu     sync.Mutex
	opened map[string]*sources.File // by path: existed before, locked, not asked for yet; guarded by mu
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
	for _, s := range specs {
		f, err := d.openExisting(s.Path)
		if err != nil {
			return nil, errors.Join(err, d.Close())
		}
		if f != nil {
			d.opened[s.Path] = f
		}
	}
	return d, nil
}

// openExisting opens a disk that exists; nil if it does not.
func (d *Destination) openExisting(path string) (*sources.File, error) {
	switch info, err := os.Stat(path); {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Stat(filepath.Dir(path)); err != nil {
			return nil, err
		}
		return nil, nil
	case err != nil:
		return nil, err
	case d.overwrite && info.Mode().IsRegular() && info.Size() == 0:
		return nil, nil // no disk yet: nothing to lock and nothing to lose
	}
	f, err := sources.OpenFile(path, sources.FileOptions{}) // says what is in use, a directory, or not writable
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

// Open opens the disk that takes what the source calls name, of size bytes. A
// file that does not exist is made, sparse; one that does is set to size; a
// block device has to be large enough. The name comes from the other side.
func (d *Destination) Open(name string, size int64) (*Disk, error) {
	spec, err := d.find(name)
	if err != nil {
		return nil, err
	}
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
		if f, err = resize(f, size); err != nil {
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
	if info, err := os.Stat(path); err == nil && d.overwrite && info.Mode().IsRegular() && info.Size() == 0 {
		if err := os.Truncate(path, size); err != nil {
			return nil, err
		}
	}
	f, err := sources.OpenFile(path, sources.FileOptions{Create: true, Size: size})
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

// resize gives a regular file the size of the source's disk. What a block
// device lacks is found by who lays the disk on it.
func resize(f *sources.File, size int64) (*sources.File, error) {
	if f.IsBlockDevice() || f.Room() == uint64(size) {
		return f, nil
	}
	// While f is open it holds the lock, so this is nobody else's file.
	if err := errors.Join(os.Truncate(f.Path(), size), f.Close()); err != nil {
		return nil, err
	}
	return sources.OpenFile(f.Path(), sources.FileOptions{})
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
	return errors.Join(errs...)
}
