package migrate

import (
	"fmt"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// fit returns the first size bytes of store, which may be larger: a block
// device seldom has just the size of the disk that it takes.
func fit(store storage.StorageProvider, size int64) (storage.StorageProvider, error) {
	have := store.Size()
	if have < uint64(size) {
		return nil, fmt.Errorf("the source's disk has %d bytes, this one only %d: take one at least as large", size, have)
	}
	if have == uint64(size) {
		return store, nil
	}
	part := fitted{store, uint64(size)}
	if r, ok := store.(ranger); ok {
		return fittedRanger{part, r}, nil
	}
	return part, nil
}

// ranger is storage with all that package storage knows beyond reading and
// writing, as files and block devices are.
type ranger interface {
	storage.Zeroer
	storage.Trimmer
	storage.Extenter
}

// fitted is the first size bytes of a larger store.
type fitted struct {
	storage.StorageProvider
	size uint64
}

func (f fitted) Size() uint64 { return f.size }

// DropCache drops the cache of all of the store.
func (f fitted) DropCache() error {
	if c, ok := f.StorageProvider.(storage.CacheDropper); ok {
		return c.DropCache()
	}
	return nil
}

func (f fitted) ReadAt(p []byte, off int64) (int, error) {
	if err := storage.CheckRange(off, int64(len(p)), f.size); err != nil {
		return 0, err
	}
	return f.StorageProvider.ReadAt(p, off)
}

func (f fitted) WriteAt(p []byte, off int64) (int, error) {
	if err := storage.CheckRange(off, int64(len(p)), f.size); err != nil {
		return 0, err
	}
	return f.StorageProvider.WriteAt(p, off)
}

// fittedRanger is fitted for a store that is a ranger.
type fittedRanger struct {
	fitted
	ranger ranger
}

func (f fittedRanger) ZeroAt(off, length int64, punch bool) error {
	if err := storage.CheckRange(off, length, f.size); err != nil {
		return err
	}
	return f.ranger.ZeroAt(off, length, punch)
}

func (f fittedRanger) TrimAt(off, length int64) error {
	if err := storage.CheckRange(off, length, f.size); err != nil {
		return err
	}
	return f.ranger.TrimAt(off, length)
}

func (f fittedRanger) ExtentAt(off int64) (end int64, hole bool, err error) {
	end, hole, err = f.ranger.ExtentAt(off)
	return min(end, int64(f.size)), hole, err
}
