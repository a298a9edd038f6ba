package sources

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// FileOptions say how OpenFile opens.
type FileOptions struct {
	ReadOnly bool
	// Create makes the file, sparse, if it does not exist.
	Create bool
	// Size is how many bytes are wanted: a new file gets them, an existing one
	// must have them, and if it has more, only the first Size bytes are the
	// storage. 0 takes what there is, and nothing can be created.
	Size int64
}

// File is a regular file or a block device as storage.
type File struct {
	path    string
	file    *os.File
	raw     syscall.RawConn // of file
	quick   quick
	size    int64        // of the storage
	room    int64        // of the file or device, when it was opened
	block   *blockDevice // nil: a regular file
	created bool
	rdonly  bool

	fastZero bool // found out when it was opened

	flusher flusher

	closed    atomic.Bool
	closeOnce sync.Once
	closeErr  error // of the first Close

	// What the file system or device has said that it cannot do is not asked again.
	noPunch, noZero, noZeroRange, noDiscard atomic.Bool
}

var (
	_ storage.StorageProvider = (*File)(nil)
	_ storage.Zeroer          = (*File)(nil)
	_ storage.FastZeroer      = (*File)(nil)
	_ storage.Trimmer         = (*File)(nil)
	_ storage.Extenter        = (*File)(nil)
)

// OpenFile opens a regular file or block device. It is locked (flock): one
// that writes excludes all others, those that read exclude who writes. A file
// that was created is on stable storage when OpenFile returns, with its
// directory entry. Errors begin with the path and say what to do.
func OpenFile(path string, o FileOptions) (*File, error) {
	f, err := openFile(path, o)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, explain(err))
	}
	return f, nil
}

func openFile(path string, o FileOptions) (*File, error) {
	if o.Size < 0 {
		return nil, fmt.Errorf("a disk of %d bytes is not possible", o.Size)
	}
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) && o.Create {
		f, err := createFile(path, o)
		if !errors.Is(err, os.ErrExist) {
			return f, err
		}
		info, err = os.Stat(path) // somebody else was faster
		if err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, err
	}

	file, err := openExisting(path, info, o.ReadOnly)
	if err != nil {
		return nil, err
	}
	f, err := newFile(path, file, o)
	if err != nil {
		file.Close() // the error to report is the one before
		return nil, err
	}
	return f, nil
}

func openExisting(path string, info os.FileInfo, readOnly bool) (*os.File, error) {
	flags := os.O_RDWR
	if readOnly {
		flags = os.O_RDONLY
	}
	switch {
	case info.IsDir():
		return nil, errDirectory
	case info.Mode().IsRegular():
		flags |= syscall.O_NONBLOCK // if a FIFO takes its place now, we do not hang
	case isBlockDevice(info):
		if !readOnly {
			flags |= os.O_EXCL // refused while it is mounted or part of something
		}
	default:
		return nil, errNoDisk
	}
	file, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, err
	}
	now, err := file.Stat()
	if err == nil && now.Mode().Type() != info.Mode().Type() {
		err = errors.New("it was replaced while it was being opened: try again")
	}
	if err != nil {
		file.Close() // the error to report is the one before
		return nil, err
	}
	return file, nil
}

// newFile locks and measures an open file. The caller closes it on error.
func newFile(path string, file *os.File, o FileOptions) (*File, error) {
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, err
	}
	f := &File{path: path, file: file, raw: raw, rdonly: o.ReadOnly, room: info.Size()}
	f.quick.init(raw, info.Mode().IsRegular())
	f.flusher.init(f.fdatasync)
	if err := lock(raw, !o.ReadOnly, isBlockDevice(info)); err != nil {
		return nil, err
	}
	if isBlockDevice(info) {
		if f.block, err = examineBlockDevice(raw); err != nil {
			return nil, err
		}
		if f.block.readOnly && !o.ReadOnly {
			return nil, errReadOnlyDevice
		}
		f.room = f.block.size
	}
	f.size = f.room
	if o.Size > 0 {
		f.size = o.Size
	}
	switch {
	case f.room == 0:
		return nil, errEmpty
	case f.room < f.size:
		return nil, fmt.Errorf("too small: it has %d bytes and the disk needs %d: make it larger or choose another",
			f.room, f.size)
	}
	f.fastZero = f.probeFastZero()
	return f, nil
}

// createFile makes a sparse file of o.Size bytes. What it could not finish it
// removes again.
func createFile(path string, o FileOptions) (_ *File, err error) {
	if o.Size == 0 {
		return nil, errors.New("does not exist, and its size is not known: create it first")
	}
	if o.ReadOnly {
		return nil, errors.New("does not exist, and a new disk cannot be read-only: create it first")
	}
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrNotExist) {
		return nil, errNoDirectory
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			os.Remove(path) // best effort: the error to report is the one before
			file.Close()
		}
	}()
	if err := file.Truncate(o.Size); err != nil {
		return nil, err
	}
	f, err := newFile(path, file, o)
	if err != nil {
		return nil, err
	}
	if err := file.Sync(); err != nil {
		return nil, err
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return nil, err
	}
	f.created = true
	return f, nil
}

// syncDir makes a new entry of a directory durable.
func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("sync its directory: %w", errno(err))
	}
	defer dir.Close() // only read
	// EINVAL: the file system has no such thing as syncing a directory.
	if err := dir.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) {
		return fmt.Errorf("sync its directory: %w", errno(err))
	}
	return nil
}

// Path is the path that the file was opened with.
func (f *File) Path() string { return f.path }

// Created says that OpenFile made the file, so that all of it reads as zeroes.
func (f *File) Created() bool { return f.created }

// Room is how many bytes the file or device has; Size may be less.
func (f *File) Room() uint64 { return uint64(f.room) }

// IsBlockDevice says that it is no regular file.
func (f *File) IsBlockDevice() bool { return f.block != nil }

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
	n := f.quick.read(p[:want], off)
	if n == want {
		return n, end
	}
	rest, err := f.file.ReadAt(p[n:want], off+int64(n))
	n += rest
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
	n := f.quick.write(p, off)
	if n == len(p) {
		return n, nil
	}
	rest, err := f.file.WriteAt(p[n:], off+int64(n))
	n += rest
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
