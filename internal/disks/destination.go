package disks

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/silo-nbd/silo-nbd/internal/identity"
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
	moved     bool

	mu sync.Mutex
	// Guarded by mu:
	opened  map[string]*sources.File // by path: existed before, locked, not asked for yet
	blank   map[string]*sources.File // the same: made just before a crash, and never written
	resumed []*Disk                  // existed before with its map, not asked for yet
}

// Options say what becomes of disks that exist.
type Options struct {
	Dir       string // make a disk here for each name that the source sends
	Overwrite bool   // replace what disks hold
	Moved     bool   // a disk is the one of its map although its name or times say otherwise
}

// OpenDestination prepares the disks of the command line, or the directory in
// which a disk is made for each name that the source sends. Disks that exist
// are opened and locked now, so that one which is in use or would be
// overwritten is refused before anything is sent; nothing is changed yet, but that
// disks which go on are bound to their maps.
func OpenDestination(specs []Spec, o Options) (*Destination, error) {
	d := &Destination{
		specs: specs, dir: o.Dir, overwrite: o.Overwrite, moved: o.Moved,
		opened: make(map[string]*sources.File), blank: make(map[string]*sources.File),
	}
	if o.Dir != "" {
		info, err := os.Stat(o.Dir)
		if err != nil {
			return nil, err
		}
		if !info.IsDir() {
			return nil, fmt.Errorf("%s is not a directory", o.Dir)
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
		disk, blank, err := d.resume(s)
		if err != nil {
			return err
		}
		if disk != nil {
			d.resumed = append(d.resumed, disk)
			return nil
		}
		if blank != nil {
			d.blank[s.Path] = blank
			return nil
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
		return nil, errors.Join(errExists(path), f.Close())
	}
	return f, nil
}

// errExists refuses to overwrite a disk. If the disk says that it has a map, that one
// is to be given.
func errExists(path string) error {
	if m := peek(path); m != nil && !m.Complete {
		return fmt.Errorf("%s exists, and dest has received a part of it, as its map %s knows: give that by --map to go on, "+
			"--overwrite to begin anew, or another path", path, m.Map)
	}
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
	disk, err := d.existing(spec, int64(a.Size))
	if err != nil {
		return nil, err
	}
	if disk == nil {
		return d.makeDisk(spec, a)
	}
	if disk.Map, err = makeMap(spec, disk.IsBlockDevice(), a); err != nil {
		return nil, errors.Join(err, disk.File.Close())
	}
	if err := disk.begin(spec); err != nil {
		return nil, errors.Join(err, disk.Close())
	}
	return disk, nil
}

// makeDisk makes a disk that does not exist. Its map comes first: after a crash between
// the two the same command begins anew, where a disk without a map would be taken for
// somebody's.
func (d *Destination) makeDisk(spec Spec, a migrate.Announcement) (_ *Disk, err error) {
	disk := &Disk{Name: spec.Name}
	if disk.Map, err = makeMap(spec, false, a); err != nil {
		return nil, err
	}
	defer func() {
		if err == nil {
			return
		}
		if disk.File != nil {
			if disk.KnownZero {
				err = errors.Join(err, os.Remove(disk.Path()))
			}
			err = errors.Join(err, disk.File.Close())
		}
		if disk.Map != nil {
			err = errors.Join(err, os.Remove(disk.Map.Path()), disk.Map.Close())
		}
	}()
	if disk.File, err = d.create(spec.Path, int64(a.Size)); err != nil {
		return nil, err
	}
	disk.KnownZero = disk.Created()
	return disk, disk.begin(spec)
}

// begin ties a disk to the map that was just made for it. What was noted of the contents
// that it had ends with them, once the disk says that it is not whole.
func (d *Disk) begin(s Spec) error {
	if d.Map != nil {
		err := d.Map.Bind(&backing{file: d.File, device: d.Map.Identity().Device, where: d.Map.Path()}, lazy.Mark{})
		if err != nil {
			return err
		}
	}
	return identity.EndNote(d.File, s.State)
}

// existing is the disk at spec that is to take size bytes, if there is one.
func (d *Destination) existing(spec Spec, size int64) (*Disk, error) {
	var err error
	d.mu.Lock()
	from, zero := d.opened, false
	if d.blank[spec.Path] != nil {
		from, zero = d.blank, true
	}
	f := from[spec.Path]
	delete(from, spec.Path)
	d.mu.Unlock()
	if f == nil && d.dir != "" {
		if f, err = d.openExisting(spec.Path); err != nil {
			return nil, err
		}
	}
	if f == nil {
		return nil, nil
	}
	if err := checkSize(f, size); err != nil {
		d.mu.Lock()
		from[spec.Path] = f // for a source that fits
		d.mu.Unlock()
		return nil, err
	}
	return &Disk{File: f, Name: spec.Name, KnownZero: zero}, nil
}

// create makes a disk that does not exist, or fills an empty file.
func (d *Destination) create(path string, size int64) (*sources.File, error) {
	f, err := sources.OpenFile(path, sources.FileOptions{Create: true, Fill: d.overwrite, Size: size, Partial: true})
	if err != nil {
		return nil, err
	}
	if !f.Created() && !d.overwrite { // somebody made it meanwhile
		return nil, errors.Join(errExists(path), f.Close())
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
	for _, f := range d.blank {
		errs = append(errs, f.Close())
	}
	clear(d.opened)
	clear(d.blank)
	for _, disk := range d.resumed {
		errs = append(errs, disk.Close())
	}
	d.resumed = nil
	return errors.Join(errs...)
}
