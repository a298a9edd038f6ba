package nbdexport

import (
	"errors"
	"syscall"
)

// errno is an error number as the protocol defines them; no other value ever
// goes on the wire.
type errno uint32

const (
	ok           errno = 0
	errPerm      errno = 1       // NBD_EPERM
	errIO        errno = 5       // NBD_EIO
	errInval     errno = 22      // NBD_EINVAL
	errNoSpace   errno = 28      // NBD_ENOSPC
	errOverflow  errno = 75      // NBD_EOVERFLOW
	errNotSup    errno = 95      // NBD_ENOTSUP
	errShutdown  errno = 108     // NBD_ESHUTDOWN
	errNotServed errno = 1 << 31 // internal: the connection has died, nothing is answered
)

// errnoTable is how a backend's error becomes a number. The first that
// errors.Is finds counts; what is not here is EIO.
var errnoTable = []struct {
	is  syscall.Errno
	err errno
}{
	{syscall.ENOSPC, errNoSpace},
	{syscall.EDQUOT, errNoSpace},
	{syscall.EFBIG, errNoSpace},
	{syscall.EPERM, errPerm},
	{syscall.EACCES, errPerm},
	{syscall.EROFS, errPerm},
	{syscall.EINVAL, errInval},
	{syscall.ESHUTDOWN, errShutdown},
}

// errnoOf maps a backend's error by the table.
func errnoOf(err error) errno {
	if err == nil {
		return ok
	}
	for _, e := range errnoTable {
		if errors.Is(err, e.is) {
			return e.err
		}
	}
	return errIO
}

// isUnsupported says that a backend cannot do what was asked, which has a
// number of its own only for NBD_CMD_FLAG_FAST_ZERO.
func isUnsupported(err error) bool {
	return errors.Is(err, syscall.ENOTSUP) || errors.Is(err, errors.ErrUnsupported)
}
