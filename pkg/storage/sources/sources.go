// Package sources holds the places where a disk's bytes can lie: memory, a
// regular file, a block device.
package sources

import (
	"fmt"
	"os"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// ErrClosed is what every operation on a closed store fails with.
var ErrClosed = fmt.Errorf("storage is closed: %w", os.ErrClosed)

// opError says which operation on which range failed.
func opError(op string, off, length int64, err error) error {
	return fmt.Errorf("%s of %d bytes at %d: %w", op, length, off, err)
}

func checkRange(op string, off, length, size int64) error {
	if err := storage.CheckRange(off, length, uint64(size)); err != nil {
		return fmt.Errorf("%s of %d bytes at %d, of %d: %w", op, length, off, size, err)
	}
	return nil
}
