// Package bootfile keeps memory of a process as long as the boot lasts: in a file
// that is mapped shared, on a tmpfs as a rule. What a process has stored there is
// there for the next one however the first one ended, as with the page cache, and
// is gone after a power cut, as with the page cache.
//
// The memory may only be touched where Reserve has taken space for it: a store to a
// mapped page that the file system has no room for would end the process (SIGBUS).
package bootfile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrInUse means that another process has the file.
var ErrInUse = fmt.Errorf("in use by another process: %w", syscall.EBUSY)

const (
	magic = "silo-run"

	// headerSize is the part of the file before the caller's memory, in bytes: magic,
	// version, size of the memory, boot id, and whether the memory counts.
	headerSize = 4096
	versionAt  = 8
	sizeAt     = 16
	bootAt     = 24
	bootLen    = 36
	validAt    = 64

	pageSize = 4096 // bytes
)

// bootIDPath is where the kernel tells one boot from another.
const bootIDPath = "/proc/sys/kernel/random/boot_id"

// File is memory that outlives the process. It is locked: one process has it.
type File struct {
	f    *os.File
	path string
	all  []byte // header and memory, as mapped
	kept bool

	closer sync.Once
	closed error // the result of Close; read only after closer
}

// Open opens the file called name in the directory dir, and makes both if need be.
// The memory has size bytes. version is that of its layout: memory of another
// version, another size or another boot, and memory that was never valid, is
// replaced by new memory. Kept reports which it is.
func Open(dir, name string, version uint64, size int64) (*File, error) {
	if name == "" || strings.ContainsAny(name, "/\x00") || strings.HasPrefix(name, ".") {
		return nil, fmt.Errorf("bootfile: %q is not a file's name", name)
	}
	boot, err := BootID()
	if err != nil {
		return nil, err
	}
	if err := makeDir(dir); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, name)
	f, err := openLocked(path)
	if err != nil {
		return nil, fmt.Errorf("bootfile: %w", err)
	}
	file := &File{f: f, path: path}
	want := header(version, size, boot)
	if file.kept, err = keeps(f, want, size); err == nil && !file.kept {
		err = file.renew(size)
	}
	if err == nil {
		file.all, err = unix.Mmap(int(file.f.Fd()), 0, int(headerSize+size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	}
	if err != nil {
		_ = file.f.Close() // the error to report is the one before
		return nil, fmt.Errorf("bootfile: %s: %w", path, err)
	}
	if !file.kept {
		copy(file.all, want)
	}
	return file, nil
}

// BootID tells this boot of the host from all others. A container has its host's.
func BootID() (string, error) {
	b, err := os.ReadFile(bootIDPath)
	if err != nil {
		return "", fmt.Errorf("bootfile: %w", err)
	}
	if len(b) < bootLen {
		return "", fmt.Errorf("bootfile: %s has %d bytes: want %d", bootIDPath, len(b), bootLen)
	}
	return string(b[:bootLen]), nil
}

// Remove removes the file called name in dir, unless a process has it.
func Remove(dir, name string) error {
	path := filepath.Join(dir, name)
	if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	f, err := openLocked(path)
	if err != nil {
		return fmt.Errorf("bootfile: %w", err)
	}
	return errors.Join(os.Remove(path), f.Close())
}

// header is the beginning of a file, up to the word that says whether it counts.
func header(version uint64, size int64, boot string) []byte {
	b := append(make([]byte, 0, validAt), magic...)
	b = binary.NativeEndian.AppendUint64(b, version)
	b = binary.NativeEndian.AppendUint64(b, uint64(size))
	return append(b, boot...)
}

// makeDir makes the directory, and refuses one that others may write to: they could
// put a file of theirs in the place of ours.
func makeDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("bootfile: %w", err)
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("bootfile: %w", err)
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.IsDir() || int(st.Uid) != os.Geteuid() || info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("bootfile: %s is not a directory that only this user can write to", dir)
	}
	return nil
}

// openLocked opens or makes the file at path, and locks it.
func openLocked(path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
		if err != nil {
			return nil, err
		}
		same, err := lock(f, path)
		if same {
			return f, nil
		}
		_ = f.Close() // the error to report is the one before
		if err != nil {
			return nil, err
		}
	}
}

// lock locks f, and reports whether path still leads to it.
func lock(f *os.File, path string) (same bool, err error) {
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrInUse
		}
		return false, fmt.Errorf("%s: %w", path, err)
	}
	ours, err := f.Stat()
	if err != nil {
		return false, err
	}
	if !ours.Mode().IsRegular() {
		return false, fmt.Errorf("%s is not a regular file", path)
	}
	there, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil // removed since: come again
	}
	return err == nil && os.SameFile(ours, there), err
}

// keeps reports whether the file holds memory of this boot that counts.
func keeps(f *os.File, want []byte, size int64) (bool, error) {
	info, err := f.Stat()
	if err != nil || info.Size() != headerSize+size {
		return false, err
	}
	b := make([]byte, headerSize)
	if _, err := f.ReadAt(b, 0); err != nil {
		return false, err
	}
	return string(b[:len(want)]) == string(want) && binary.NativeEndian.Uint64(b[validAt:]) == 1, nil
}

// renew makes the file one of zeroes that takes no space but for its header.
func (f *File) renew(size int64) error {
	if err := f.f.Truncate(0); err != nil {
		return err
	}
	if err := f.f.Truncate(headerSize + size); err != nil {
		return err
	}
	return f.reserve(0, headerSize)
}

func (f *File) reserve(off, length int64) error {
	for {
		err := unix.Fallocate(int(f.f.Fd()), 0, off, length)
		if err != unix.EINTR {
			return err
		}
	}
}

// Kept reports whether the memory is that of an earlier process of this boot. Else
// it is all zero.
func (f *File) Kept() bool { return f.kept }

// Bytes is the memory. It must not be touched where Reserve has not taken space,
// nor after Close or Remove. It begins at a page.
func (f *File) Bytes() []byte { return f.all[headerSize:] }

// Reserve takes space for [off, off+length) of the memory, in bytes. It may be
// called again for the same range, and leaves the contents as they are.
func (f *File) Reserve(off, length int64) error {
	if off < 0 || length < 0 || off+length > int64(len(f.all))-headerSize {
		return fmt.Errorf("bootfile: %s has no range of %d bytes at %d", f.path, length, off)
	}
	if length == 0 {
		return nil
	}
	if err := f.reserve(headerSize+off, length); err != nil {
		return fmt.Errorf("bootfile: take %d bytes of %s: %w", length, f.path, err)
	}
	return nil
}

// Validate makes the memory count, from now on, for a process that comes after.
func (f *File) Validate() { f.valid().Store(1) }

// Invalidate makes it count no more.
func (f *File) Invalidate() { f.valid().Store(0) }

func (f *File) valid() *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&f.all[validAt])) // a page is aligned
}

// Forget removes the file's name. The memory may be used until Close, and is gone
// then.
func (f *File) Forget() error {
	f.Invalidate()
	if err := os.Remove(f.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("bootfile: %w", err)
	}
	return nil
}

// Close gives the memory and the lock back, and leaves the file for the next
// process, unless Forget was called. It may be called again.
func (f *File) Close() error {
	f.closer.Do(func() {
		f.closed = errors.Join(unix.Munmap(f.all), f.f.Close())
		f.all = nil
	})
	return f.closed
}

// Words is memory as words for atomic operations. b must begin at a multiple of 8
// bytes, which Bytes does, and must not be used otherwise.
func Words(b []byte) []atomic.Uint64 {
	if len(b) < 8 {
		return nil
	}
	return unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(&b[0])), len(b)/8)
}
