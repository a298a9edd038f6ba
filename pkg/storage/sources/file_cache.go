package sources

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

var _ storage.CacheDropper = (*File)(nil)

// DropCache implements storage.CacheDropper. A write that failed leaves its pages in
// the cache, marked clean; only so is it seen that they are not on the device.
func (f *File) DropCache() error {
	if f.closed.Load() {
		return ErrClosed
	}
	err := control(f.raw, func(fd int) error { return unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED) })
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil // there is no cache that could be dropped
	}
	if err != nil {
		return fmt.Errorf("%s: drop the cache: %w", f.path, err)
	}
	return nil
}
