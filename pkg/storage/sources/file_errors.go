package sources

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// advice is an error in words that a user can act on, with its cause behind it.
type advice struct {
	text  string
	cause error
}

func (a *advice) Error() string { return a.text }
func (a *advice) Unwrap() error { return a.cause }

var (
	errDirectory      = errors.New("is a directory: want a file or a block device")
	errNoDirectory    = &advice{"its directory does not exist: create it first", os.ErrNotExist}
	errEmpty          = errors.New("is empty: want a disk with at least one byte")
	errShrunk         = errors.New("the file has become shorter than it was when it was opened")
	errReadOnlyDevice = &advice{"is a read-only device: make it writable (blockdev --setrw) or choose another", syscall.EROFS}
	errReadOnly       = &advice{"it was opened for reading only", syscall.EPERM}
)

// notADisk says what something is that is neither a file nor a block device.
func notADisk(info os.FileInfo) error {
	what := "something else"
	switch mode := info.Mode(); {
	case mode.IsDir():
		return errDirectory
	case mode&os.ModeNamedPipe != 0:
		what = "a FIFO"
	case mode&os.ModeSocket != 0:
		what = "a socket"
	case mode&os.ModeCharDevice != 0:
		what = "a character device"
	}
	return fmt.Errorf("is %s: want a regular file or a block device", what)
}

var adviceOf = map[syscall.Errno]string{
	syscall.EBUSY:     "in use: it is mounted, or another process has it: unmount it or stop that one first",
	syscall.ENOENT:    "does not exist: check the path",
	syscall.ENOTDIR:   "a part of the path is no directory: check the path",
	syscall.EROFS:     "lies on a read-only file system: remount it or choose another place",
	syscall.EACCES:    "permission denied: check owner and mode, and whether the device is read-only",
	syscall.EPERM:     "not permitted: check owner and mode, and whether it is immutable",
	syscall.ENXIO:     "the device is not there",
	syscall.ENOMEDIUM: "the device has no medium",
	syscall.EFBIG:     "the file system takes no file of this size: choose another place",
	syscall.ENOSPC:    "no space left: make room or choose another place",
	syscall.ELOOP:     "too many symbolic links: check the path",
}

// explain turns an error of opening into what a user can act on.
func explain(err error) error {
	cause := errno(err)
	if number, ok := cause.(syscall.Errno); ok {
		if text, ok := adviceOf[number]; ok {
			return &advice{text, number}
		}
	}
	return cause
}

// errno takes off the operation and path that package os puts around an error
// number: ours are around it. Only the outermost, else context is lost.
func errno(err error) error {
	if path, ok := err.(*os.PathError); ok {
		return path.Err
	}
	return err
}
