package lazy

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// mapFile is the file that a map lies in. It is small, so that tests can put
// one in its place that loses power.
type mapFile interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	// Size is how long the file is, in bytes.
	Size() (int64, error)
	// NextData is the first run in [off, end) that may hold more than zeroes;
	// lo is end if there is none.
	NextData(off, end int64) (lo, hi int64, err error)
	// Truncate makes the file so long, in bytes. What is new of it is zero and
	// takes no space.
	Truncate(size int64) error
	// Sync returns when all that was written before is on stable storage.
	Sync() error
	// Drop has what is read from now on read from the device, as far as it was
	// written there. It comes after a Sync.
	Drop() error
}

// osFile is a mapFile in a file system.
type osFile struct{ f *os.File }

// ReadAt reads, with the contract of io.ReaderAt.
func (o osFile) ReadAt(p []byte, off int64) (int, error) { return o.f.ReadAt(p, off) }

// WriteAt writes, with the contract of io.WriterAt.
func (o osFile) WriteAt(p []byte, off int64) (int, error) { return o.f.WriteAt(p, off) }

func (o osFile) Close() error              { return o.f.Close() }
func (o osFile) Truncate(size int64) error { return o.f.Truncate(size) }

func (o osFile) Size() (int64, error) {
	info, err := o.f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (o osFile) Sync() error {
	return o.control("fdatasync", unix.Fdatasync)
}

// Drop gives the file's pages in the cache back. A file system without a cache of
// pages may refuse that.
func (o osFile) Drop() error {
	err := o.control("fadvise", func(fd int) error { return unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED) })
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return nil
	}
	return err
}

func (o osFile) NextData(off, end int64) (lo, hi int64, err error) {
	// The descriptor's position is moved by this and used by nothing.
	err = o.control("seek", func(fd int) (err error) {
		if lo, err = unix.Seek(fd, off, unix.SEEK_DATA); errors.Is(err, unix.ENXIO) {
			lo, hi, err = end, end, nil
		} else if err == nil {
			hi, err = unix.Seek(fd, lo, unix.SEEK_HOLE)
		}
		return err
	})
	switch {
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP):
		return off, end, nil // the file system does not know
	case err != nil:
		return 0, 0, err
	}
	return min(lo, end), min(hi, end), nil
}

// inode is which file it is; zeroes if that cannot be found out.
func (o osFile) inode() (dev, inode uint64) {
	info, err := o.f.Stat()
	if err != nil {
		return 0, 0
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, 0
	}
	return st.Dev, st.Ino
}

// control calls do with the descriptor, again if a signal came between.
func (o osFile) control(op string, do func(fd int) error) error {
	raw, err := o.f.SyscallConn()
	if err != nil {
		return err
	}
	refused := raw.Control(func(fd uintptr) {
		for err = unix.EINTR; err == unix.EINTR; {
			err = do(int(fd))
		}
	})
	if refused != nil {
		return refused
	}
	if err != nil {
		return &os.PathError{Op: op, Path: o.f.Name(), Err: err}
	}
	return nil
}

// reserve takes space for [off, off+length), where the file system can: a disk
// that is full must not keep the bits from being saved.
func (o osFile) reserve(off, length int64) error {
	err := o.control("fallocate", func(fd int) error { return unix.Fallocate(fd, 0, off, length) })
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return nil
	}
	return err
}

// lockPatience is how long a lock is tried for that only those have who look at the map
// for a moment, and lockPause how long between two tries.
const (
	lockPatience = time.Second
	lockPause    = 5 * time.Millisecond
)

// lockToOwn is lock for a process that wants the map for itself. It waits for those who
// inspect it, which takes them no time.
func (o osFile) lockToOwn() error {
	for until := time.Now().Add(lockPatience); ; {
		err := o.lock(unix.LOCK_EX)
		if !errors.Is(err, ErrMapInUse) {
			return err
		}
		// An owner keeps out those who inspect, too.
		if shared := o.lock(unix.LOCK_SH); shared != nil || time.Now().After(until) {
			return err
		}
		if err := o.lock(unix.LOCK_UN); err != nil {
			return err
		}
		<-time.After(lockPause)
	}
}

// lock takes the file's lock, which goes when it is closed, or says ErrMapInUse.
func (o osFile) lock(how int) error {
	err := o.control("lock", func(fd int) error { return unix.Flock(fd, how|unix.LOCK_NB) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		return ErrMapInUse
	}
	return err
}

// createFile makes a file at path that does not exist before and, once it does,
// is as fill has left it, also after a crash. The file is locked.
func createFile(path string, fill func(f osFile) error) (_ osFile, err error) {
	if _, err := os.Lstat(path); err == nil {
		return osFile{}, os.ErrExist
	}
	dir, base := filepath.Split(path)
	if dir == "" {
		dir = "."
	}
	temp := tempName(base)
	removeLeft(dir, temp)
	f, err := os.CreateTemp(dir, temp)
	if err != nil {
		return osFile{}, err
	}
	o, temporary := osFile{f}, f.Name()
	defer func() {
		if err != nil {
			os.Remove(temporary) // best effort: the error to report is the one before
			f.Close()
		}
	}()
	if err := o.lock(unix.LOCK_EX); err != nil {
		return o, err
	}
	if err := fill(o); err != nil {
		return o, err
	}
	if err := f.Sync(); err != nil {
		return o, err
	}
	if err := rename(temporary, path); err != nil {
		return o, err
	}
	if err := syncDir(dir); err != nil {
		os.Remove(path) // best effort
		return o, err
	}
	return o, nil
}

// maxTempBase is how long the name of a file may be to be in that of its temporary one,
// in bytes: file systems take names of 255.
const maxTempBase = 255 - len("..new-") - len("4294967295")

// tempName is what the name of a file begins with as long as it is being made.
func tempName(base string) string {
	if len(base) > maxTempBase {
		sum := sha256.Sum256([]byte(base))
		base = hex.EncodeToString(sum[:16])
	}
	return "." + base + ".new-"
}

// removeLeft removes what processes that were killed have left: files that are named so
// and that nobody has locked. It is best effort.
func removeLeft(dir, temp string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return // whoever makes a file there will hear why
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), temp) || !e.Type().IsRegular() {
			continue
		}
		path := filepath.Join(dir, e.Name())
		f, err := os.OpenFile(path, os.O_RDWR|syscall.O_NONBLOCK, 0)
		if err != nil {
			continue
		}
		if o := (osFile{f}); o.lock(unix.LOCK_EX) == nil {
			os.Remove(path) // best effort
		}
		f.Close() // nothing was written
	}
}

// rename gives a file a name that nothing has.
func rename(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // not here
		if err = os.Link(from, to); err == nil {
			err = os.Remove(from)
		}
	}
	return err
}

// syncDir makes a new entry of a directory durable.
func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("sync its directory: %w", err)
	}
	defer dir.Close() // only read
	// EINVAL: the file system has no such thing as syncing a directory.
	if err := dir.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) {
		return fmt.Errorf("sync its directory: %w", err)
	}
	return nil
}
