package disks

import (
	"errors"

	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// OpenSource opens disks to be read only, all of them or none.
func OpenSource(specs []Spec) (files []*sources.File, err error) {
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
		f, err := sources.OpenFile(s.Path, sources.FileOptions{ReadOnly: true})
		if err != nil {
			return files, err
		}
		files = append(files, f)
	}
	return files, nil
}
