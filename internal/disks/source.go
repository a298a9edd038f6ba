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
		if err := whole(s.Path); err != nil {
			return files, err
		}
	}
	return files, nil
}

// whole says why a disk is not one that can be sent on: its map says that a part
// of it is missing. That of a block device lies elsewhere.
func whole(path string) error {
	at := path + MapSuffix
	i, err := lazy.Inspect(at)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("nobody can say whether %s is whole: %w; if it is, and only then, move its map away", path, err)
	case i.State != lazy.MapComplete:
		return fmt.Errorf("%s is not whole: dest has received a part of it, as its map %s says; run dest with it again to get the rest", path, at)
	}
	return nil
}
