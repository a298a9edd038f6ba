package sources

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// FileOptions say how OpenFile opens.
type FileOptions struct {
	ReadOnly bool
	// Partial says that what is there is not a disk yet: others must not read it
	// either, until SetAccess(AccessLive).
	Partial bool
	// Shared opens, for reading only, also what others may write: what speaks
	// against it is a warning.
	Shared bool
	// Create makes the file, sparse, if it does not exist.
	Create bool
	// Fill makes an empty file Size bytes large, sparse.
	Fill bool
	// Size is how many bytes are wanted: a new file gets them, an existing one
	// must have them, and if it has more, only the first Size bytes are the
	// storage. 0 takes what there is, and nothing can be created.
	Size int64
}

// File is a regular file or a block device as storage. Every call that may wait
// for a device or for another call, and that is each of them, is one that the Go
// scheduler is told of: a read that takes only what is cached (RWF_NOWAIT) waits
// for the device's queue all the same, and a write for the inode's lock.
type File struct {
	path    string
	file    *os.File
	raw     syscall.RawConn // of file
	size    int64           // of the storage
	room    int64           // of the file or device, when it was opened
	block   *blockDevice    // nil: a regular file
	created bool
	rdonly  bool

	fastZero bool     // found out when it was opened
	warnings []string // of OpenFile

	locking sync.Mutex
	// Guarded by locking:
	access  Access
	noBytes bool // there are no locks of bytes here

	flusher flusher

	closed    atomic.Bool
	closeOnce sync.Once
	closeErr  error // of the first Close

	// What the file system or device has said that it cannot do is not asked again.
	noPunch, noZero, noZeroRange, noDiscard, noSplice atomic.Bool
	punched                                           atomic.Bool // a block device has given back a range
}

var (
	_ storage.StorageProvider = (*File)(nil)
	_ storage.Zeroer          = (*File)(nil)
	_ storage.FastZeroer      = (*File)(nil)
	_ storage.Trimmer         = (*File)(nil)
	_ storage.Extenter        = (*File)(nil)
)

// Path is the path that the file was opened with.
func (f *File) Path() string { return f.path }

// Created says that OpenFile made the file, so that all of it reads as zeroes.
func (f *File) Created() bool { return f.created }

// Room is how many bytes the file or device has; Size may be less.
func (f *File) Room() uint64 { return uint64(f.room) }

// IsBlockDevice says that it is no regular file.
func (f *File) IsBlockDevice() bool { return f.block != nil }

// Warnings returns what OpenFile has found that is not an error, a sentence each.
func (f *File) Warnings() []string { return f.warnings }

// Size implements storage.StorageProvider.
func (f *File) Size() uint64 { return uint64(f.size) }

// ReadAt implements storage.StorageProvider.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if f.closed.Load() {
		return 0, f.opError("read", off, int64(len(p)), ErrClosed)
	}
	want, end := readable(len(p), off, f.size)
	if want == 0 {
		return 0, end
	}
	n, err := f.file.ReadAt(p[:want], off)
	switch {
	case n == want:
		return n, end
	case errors.Is(err, io.EOF):
		return n, f.opError("read", off, int64(len(p)), errShrunk)
	}
	return n, f.opError("read", off, int64(len(p)), err)
}

// WriteAt implements storage.StorageProvider. After a failed Flush every write
// fails, too.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	if err := f.mayWrite("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	n, err := f.file.WriteAt(p, off)
	if err != nil {
		return n, f.opError("write", off, int64(len(p)), err)
	}
	return n, nil
}

// Flush implements storage.StorageProvider by fdatasync. Once it has failed it
// fails for ever: the kernel reports a lost write only once.
func (f *File) Flush() error {
	if f.closed.Load() {
		return fmt.Errorf("%s: flush: %w", f.path, ErrClosed)
	}
	return f.flusher.flush()
}

// Close implements storage.StorageProvider; it also unlocks. It does not flush.
// Operations that are under way finish; those after it fail with ErrClosed.
func (f *File) Close() error {
	f.closeOnce.Do(func() {
		f.closed.Store(true)
		if err := f.file.Close(); err != nil {
			f.closeErr = fmt.Errorf("%s: close: %w", f.path, errno(err))
		}
	})
	return f.closeErr
}

// mayWrite checks what every operation that changes bytes has in common.
func (f *File) mayWrite(op string, off, length int64) error {
	switch {
	case f.closed.Load():
		return f.opError(op, off, length, ErrClosed)
	case f.rdonly:
		return f.opError(op, off, length, errReadOnly)
	}
	if err := storage.CheckRange(off, length, uint64(f.size)); err != nil {
		return f.opError(op, off, length, err)
	}
	if err := f.flusher.failed(); err != nil {
		return f.opError(op, off, length, fmt.Errorf("an earlier flush has failed: %w", err))
	}
	return nil
}

// opError says which operation on which range of which file failed.
func (f *File) opError(op string, off, length int64, err error) error {
	if errors.Is(err, os.ErrClosed) {
		err = ErrClosed
	}
	return fmt.Errorf("%s: %w", f.path, opError(op, off, length, errno(err)))
}

// control calls do with the descriptor, again if a signal came between.
func control(raw syscall.RawConn, do func(fd int) error) error {
	var err error
	controlErr := raw.Control(func(fd uintptr) {
		for err = syscall.EINTR; err == syscall.EINTR; {
			err = do(int(fd))
		}
	})
	if controlErr != nil {
		return ErrClosed // the only reason for which it refuses
	}
	return err
}
