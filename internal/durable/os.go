package durable

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// OS is the file system of the operating system.
var OS FS = osFS{}

const (
	// maxContent bounds a file that is read, in bytes.
	maxContent = 4 << 20
	// openTries bounds how often a file may be replaced while it is opened.
	openTries = 100
)

type osFS struct{}

type osFile struct {
	f       *os.File
	content []byte
	changed int64
}

func (o *osFile) Content() []byte { return o.content }
func (o *osFile) Changed() int64  { return o.changed }
func (o *osFile) Close() error    { return o.f.Close() }

func (osFS) Read(path string) ([]byte, error) { return ReadFile(path) }

func (osFS) Open(path string) (File, error) {
	for range openTries {
		f, err := openRegular(path)
		if err != nil {
			return nil, err
		}
		file, err := lockAndRead(f, path)
		if err == nil {
			return file, nil
		}
		f.Close() // the error to report is the one before
		if !errors.Is(err, errReplaced) {
			return nil, err
		}
	}
	return nil, &os.PathError{Op: "open", Path: path, Err: ErrInUse}
}

// errReplaced reports that another file has the name by now.
var errReplaced = errors.New("it was replaced")

func lockAndRead(f *os.File, path string) (File, error) {
	if err := lock(f); err != nil {
		return nil, err
	}
	// The lock may be of a file that its owner has replaced meanwhile.
	ours, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if now, err := os.Stat(path); err != nil || !os.SameFile(ours, now) {
		return nil, errReplaced
	}
	b, err := readAll(f)
	if err != nil {
		return nil, err
	}
	file := &osFile{f: f, content: b}
	if st, ok := ours.Sys().(*syscall.Stat_t); ok {
		file.changed = st.Ctim.Nano()
	}
	return file, nil
}

// openRegular opens a regular file, for writing where that is allowed: some file
// systems want that for a lock. It does not wait for the writer of a FIFO.
func openRegular(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil && ReadOnly(err) {
		f, err = os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	}
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = &os.PathError{Op: "open", Path: path, Err: errors.New("it is not a regular file")}
	}
	if err != nil {
		f.Close() // the error to report is the one before
		return nil, err
	}
	return f, nil
}

func readAll(f *os.File) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(f, maxContent+1))
	if err == nil && len(b) > maxContent {
		err = fmt.Errorf("%s: it has more than %d bytes", f.Name(), maxContent)
	}
	return b, err
}

// ReadFile reads a regular file without its lock.
func ReadFile(path string) ([]byte, error) {
	f, err := openRegular(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() // only read
	return readAll(f)
}

// lock takes the flock of a file, which goes when it is closed. Where the file
// system has no locks there is none.
func lock(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	refused := raw.Control(func(fd uintptr) {
		for err = unix.EINTR; err == unix.EINTR; {
			err = unix.Flock(int(fd), unix.LOCK_EX|unix.LOCK_NB)
		}
	})
	switch {
	case refused != nil:
		return refused
	case errors.Is(err, unix.EWOULDBLOCK):
		return &os.PathError{Op: "lock", Path: f.Name(), Err: ErrInUse}
	case err == nil, noLocks(err):
		return nil
	}
	return &os.PathError{Op: "lock", Path: f.Name(), Err: err}
}

// noLocks reports whether a file system cannot lock the file. EBADF: it wants a
// file that is open for writing, and this one may only be read.
func noLocks(err error) bool {
	return errors.Is(err, errors.ErrUnsupported) || errors.Is(err, unix.ENOLCK) || errors.Is(err, unix.EBADF)
}

func (osFS) Create(path string, content []byte) (_ File, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			os.Remove(path) // best effort: the error to report is the one before
			f.Close()
		}
	}()
	if err := lock(f); err != nil {
		return nil, err
	}
	if _, err := f.Write(content); err != nil {
		return nil, err
	}
	if err := f.Sync(); err != nil {
		return nil, err
	}
	return &osFile{f: f, content: content}, nil
}

func (osFS) Rename(from, to string) error { return os.Rename(from, to) }

func (osFS) Claim(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, errors.ErrUnsupported) { // not on this file system
		if err = os.Link(from, to); err == nil {
			return os.Remove(from)
		}
		if errors.Is(err, fs.ErrPermission) || errors.Is(err, errors.ErrUnsupported) { // nor are there links
			if _, err := os.Lstat(to); err == nil {
				return &os.PathError{Op: "rename", Path: to, Err: fs.ErrExist}
			}
			return os.Rename(from, to)
		}
	}
	var link *os.LinkError
	if err == nil || errors.As(err, &link) {
		return err
	}
	return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
}

func (osFS) Remove(path string) error {
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (osFS) SyncDir(dir string) error { return SyncDir(dir) }

func (osFS) Names(dir string) ([]string, error) {
	d, err := os.Open(filepath.Clean(dir))
	if err != nil {
		return nil, err
	}
	defer d.Close() // only read
	return d.Readdirnames(-1)
}
