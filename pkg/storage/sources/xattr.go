package sources

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// maxXattr is the most that an extended attribute holds (XATTR_SIZE_MAX), in bytes.
const maxXattr = 64 << 10

// Xattr returns the extended attribute of that full name, as in "user.comment",
// of the file that is open; nil if it has none. Where there are no such
// attributes, as on block devices, the error is errors.ErrUnsupported.
func (f *File) Xattr(name string) ([]byte, error) {
	b, n := make([]byte, maxXattr), 0
	err := f.xattr("read", name, func(fd int) (err error) {
		n, err = unix.Fgetxattr(fd, name, b)
		return err
	})
	switch {
	case errors.Is(err, unix.ENODATA):
		return nil, nil
	case err != nil:
		return nil, err
	}
	return b[:n:n], nil
}

// SetXattr sets an extended attribute, also of a file that was opened for reading
// only. It changes the file's change time: stamps from before it do not count any
// more. It is durable only after a sync of the file.
func (f *File) SetXattr(name string, value []byte) error {
	return f.xattr("set", name, func(fd int) error { return unix.Fsetxattr(fd, name, value, 0) })
}

// RemoveXattr removes an extended attribute, if there is one. Like SetXattr it
// changes the file's change time.
func (f *File) RemoveXattr(name string) error {
	err := f.xattr("remove", name, func(fd int) error { return unix.Fremovexattr(fd, name) })
	if errors.Is(err, unix.ENODATA) {
		return nil
	}
	return err
}

// SyncXattr makes durable what SetXattr and RemoveXattr have changed.
func (f *File) SyncXattr() error {
	return f.xattr("sync", "attributes", unix.Fsync)
}

func (f *File) xattr(op, name string, do func(fd int) error) error {
	err := ErrClosed
	switch {
	case f.closed.Load():
	case f.block != nil:
		err = errors.ErrUnsupported // of a device node, which is not the device
	default:
		err = control(f.raw, do)
	}
	if err != nil {
		return fmt.Errorf("%s: %s %s: %w", f.path, op, name, err)
	}
	return nil
}
