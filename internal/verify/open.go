package verify

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
)

// Side is one of the two things that are compared.
type Side interface {
	io.ReaderAt
	io.Closer
	Size() int64 // in bytes
}

// Extenter is a Side that knows where it has holes.
type Extenter interface {
	// ExtentAt describes the run that off lies in: it ends at end, and hole
	// says that all of it is a hole, which reads as zeroes.
	ExtentAt(off int64) (end int64, hole bool, err error)
}

// Open opens what a name on the command line stands for: an NBD URI, a regular
// file or a block device. Nothing is locked, since nothing is written: a disk
// may be looked at while it is served. A URI with TLS needs secure.
func Open(ctx context.Context, name string, secure nbdclient.Secure) (Side, error) {
	if nbdclient.IsURI(name) {
		c, err := nbdclient.DialTLS(ctx, name, secure)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		return c, nil
	}
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a FIFO is no reason to hang
	if err != nil {
		return nil, err
	}
	side, err := newFile(f)
	if err != nil {
		f.Close() // only read from: nothing can be lost
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return side, nil
}

// file is a regular file or a block device, opened for reading.
type file struct {
	*os.File
	size   int64
	sparse bool // SEEK_DATA and SEEK_HOLE mean something
}

func newFile(f *os.File) (*file, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() && (info.Mode()&os.ModeDevice == 0 || info.Mode()&os.ModeCharDevice != 0) {
		return nil, errors.New("neither a regular file nor a block device")
	}
	size, err := f.Seek(0, io.SeekEnd) // also tells the size of a block device
	if err != nil {
		return nil, err
	}
	return &file{File: f, size: size, sparse: info.Mode().IsRegular()}, nil
}

// Size implements Side.
func (f *file) Size() int64 { return f.size }

// ExtentAt implements Extenter. Each call moves the file's position, so it is
// for one goroutine at a time.
func (f *file) ExtentAt(off int64) (end int64, hole bool, err error) {
	if !f.sparse {
		return f.size, false, nil
	}
	data, err := f.Seek(off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // no data from here on
		return f.size, true, nil
	case err != nil: // a file system without holes
		f.sparse = false
		return f.size, false, nil
	case data > off:
		return data, true, nil
	}
	end, err = f.Seek(off, unix.SEEK_HOLE)
	if err != nil {
		return math.MaxInt64, false, nil // data is the safe answer
	}
	return end, false, nil
}
