package disks

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// OpenSource opens disks to send, to be read only or written to as well, all of
// them or none. A disk of which dest has received only a part is none to send.
func OpenSource(specs []Spec, write bool) (files []*sources.File, err error) {
	return openSource(specs, sources.FileOptions{ReadOnly: !write})
}

// OpenShared is OpenSource for disks to be read that others may use meanwhile:
// what speaks against it is in the warnings of the files.
func OpenShared(specs []Spec) (files []*sources.File, err error) {
	return openSource(specs, sources.FileOptions{ReadOnly: true, Shared: true})
}

func openSource(specs []Spec, o sources.FileOptions) (files []*sources.File, err error) {
	defer func() {
		if err == nil {
			return
		}
		for _, f := range files {
			err = errors.Join(err, f.Close())
		}
		files = nil
	}()
	for _, s := range specs {
		f, err := sources.OpenFile(s.Path, o)
		if err != nil {
			return files, err
		}
		files = append(files, f)
		if err := whole(f); err != nil {
			return files, err
		}
	}
	return files, nil
}

// whole says why a disk cannot be sent on: itself, or a map beside any of its names,
// says that a part of it is missing. The map of a block device lies elsewhere.
func whole(f *sources.File) error {
	m, err := readMark(f)
	if err != nil {
		return err
	}
	maps := []string{MapBeside(f.Path()), beside(f.Path())}
	if m != nil && m.Map != "" {
		maps = append(maps, m.Map)
	}
	known := m == nil || m.Complete
	for _, at := range maps {
		i, err := lazy.InspectHeader(at)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return fmt.Errorf("nobody can say whether %s is whole: %w; if it is, and only then, move its map away", f.Path(), err)
		case i.State != lazy.MapComplete:
			return notWhole(f, at)
		case m != nil && !m.Complete && i.Binding.Bears(m.value()):
			known = true // it had no time to say so itself
		}
	}
	if !known {
		return notWhole(f, m.Map)
	}
	return nil
}

func notWhole(f *sources.File, at string) error {
	return fmt.Errorf("%s is not whole: dest has received a part of it, as its map %s says; run dest with it again to get the rest", f.Path(), at)
}
