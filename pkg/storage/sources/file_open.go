package sources

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// OpenFile opens a regular file or block device, and locks it: one that writes
// excludes all others, those that read exclude who writes. Other processes of
// ours see that by flock, QEMU's programs by Access; a block device is claimed
// (O_EXCL), so that it cannot be mounted. What somebody else uses is refused. A
// file that was created is on stable storage when OpenFile returns, with its
// directory entry. Errors begin with the path and say what to do.
func OpenFile(path string, o FileOptions) (*File, error) {
	f, err := openFile(path, o)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, explain(err))
	}
	return f, nil
}

// CheckPath says why nothing can be opened or created at a path, as far as that
// can be known without trying: it opens nothing and never waits, also not for a
// FIFO. It is for everything that wants a regular file or a block device.
func CheckPath(path string) error {
	if err := checkPath(path); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func checkPath(path string) error {
	info, err := os.Stat(path)
	if err == nil && !info.Mode().IsRegular() && !isBlockDevice(info) {
		return notADisk(info)
	}
	if errors.Is(err, os.ErrNotExist) {
		if to, err := os.Readlink(path); err == nil {
			return fmt.Errorf("is a symbolic link to %s, which does not exist: give that path, or remove the link", to)
		}
	}
	return nil
}

func openFile(path string, o FileOptions) (*File, error) {
	if o.Size < 0 {
		return nil, fmt.Errorf("a disk of %d bytes is not possible", o.Size)
	}
	if o.Shared && !o.ReadOnly {
		return nil, errors.New("a disk that others write cannot be written here")
	}
	if err := checkPath(path); err != nil {
		return nil, err
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

	file, err := openExisting(path, info, o)
	if err != nil {
		return nil, err
	}
	f, err := newFile(path, file, o, isBlockDevice(info))
	if err == nil && o.Fill && info.Mode().IsRegular() {
		err = f.fill(o.Size)
	}
	if err == nil {
		err = f.measure(o)
	}
	if err == nil {
		err = f.checkUsers(o)
	}
	if err != nil {
		file.Close() // the error to report is the one before
		return nil, err
	}
	return f, nil
}

func openExisting(path string, info os.FileInfo, o FileOptions) (*os.File, error) {
	flags := os.O_RDWR
	if o.ReadOnly {
		flags = os.O_RDONLY
	}
	if isBlockDevice(info) {
		if !o.Shared {
			flags |= os.O_EXCL // refused while it is mounted or part of something, and then it cannot become so
		}
	} else {
		flags |= syscall.O_NONBLOCK // if a FIFO takes its place now, we do not hang
	}
	file, err := os.OpenFile(path, flags, 0)
	if isBlockDevice(info) && errors.Is(err, syscall.EBUSY) {
		return nil, claimed(path)
	}
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

// newFile locks an open file. The caller closes it on error.
func newFile(path string, file *os.File, o FileOptions, patient bool) (*File, error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, err
	}
	f := &File{path: path, file: file, raw: raw, rdonly: o.ReadOnly}
	f.flusher.init(f.fdatasync)
	access := AccessLive
	switch {
	case o.Shared:
		access = AccessShared
	case o.ReadOnly:
		access = AccessFrozen
	case o.Partial:
		access = AccessPartial
	}
	return f, f.lock(access, !o.ReadOnly, patient)
}

// measure finds out the size of what is open.
func (f *File) measure(o FileOptions) error {
	info, err := f.file.Stat()
	if err != nil {
		return err
	}
	f.room = info.Size()
	if isBlockDevice(info) {
		if f.block, err = examineBlockDevice(f.raw); err != nil {
			return err
		}
		if f.block.readOnly && !o.ReadOnly {
			return errReadOnlyDevice
		}
		f.room = f.block.size
	}
	f.size = f.room
	if o.Size > 0 {
		f.size = o.Size
	}
	switch {
	case f.room == 0:
		return errEmpty
	case f.room < f.size:
		return fmt.Errorf("too small: it has %d bytes and the disk needs %d: make it larger or choose another",
			f.room, f.size)
	}
	f.fastZero = f.probeFastZero()
	return nil
}

// fill makes the file, which is locked, size bytes large if it is empty.
func (f *File) fill(size int64) error {
	info, err := f.file.Stat()
	if err != nil || info.Size() > 0 {
		return err
	}
	if err := f.file.Truncate(size); err != nil {
		return err
	}
	return f.file.Sync()
}

// createFile makes a sparse file of o.Size bytes. What it could not finish it
// removes again, unless another process has it.
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
	f, err := newFile(path, file, o, true)
	if err != nil { // somebody has locked it since: it is his
		file.Close() // the error to report is the one before
		return nil, err
	}
	defer func() {
		if err != nil {
			removeOwn(path, file)
			file.Close() // not before: it unlocks
		}
	}()
	if err := file.Truncate(o.Size); err != nil {
		return nil, err
	}
	if err := f.measure(o); err != nil {
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

// removeOwn removes what is at path if it is the file still, as best it can: it
// is for the way out of an error.
func removeOwn(path string, file *os.File) {
	ours, err := file.Stat()
	if err != nil {
		return
	}
	if there, err := os.Lstat(path); err == nil && os.SameFile(ours, there) {
		os.Remove(path)
	}
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

// claimed is the error of a block device that somebody has for himself alone.
func claimed(path string) error {
	id, ok := idOf(0, path, 0)
	if ok {
		by := thisSystem.claimer(id)
		if who := thisSystem.holder(thisSystem.family(id), anyhow); by == "" && who != "" {
			by = who + " has it" // that it claims it is not shown
		}
		if by != "" {
			return busy(by)
		}
	}
	return syscall.EBUSY
}

// checkUsers finds who uses the disk in spite of all locks.
func (f *File) checkUsers(o FileOptions) error {
	found, err := f.users(o)
	for pause := lockPause; err == nil && found != "" && f.block != nil && pause <= maxLockPause; pause *= 2 {
		<-time.After(pause) // one that was about to close it
		found, err = f.users(o)
	}
	if err != nil || found == "" {
		return err
	}
	if o.Shared {
		f.warn("%s", found)
		return nil
	}
	return busy(found)
}

// busy is the error of a disk that is used as by says.
func busy(by string) error {
	return &advice{"in use: " + by + ": unmount it or stop what uses it first", syscall.EBUSY}
}

// users says who else uses the disk so that it cannot be what o wants.
func (f *File) users(o FileOptions) (string, error) {
	var id fileID
	var ok bool
	err := control(f.raw, func(fd int) error {
		id, ok = idOfOpen(fd)
		return nil
	})
	if err != nil || !ok {
		return "", err
	}
	if f.block != nil {
		return f.deviceUsers(id, o), nil
	}
	if path := thisSystem.swap([]fileID{id}); path != "" {
		return "it is swap space (" + path + ")", nil
	}
	for _, l := range thisSystem.loops(id) {
		if by, busy := thisSystem.loopUsers(l, !o.ReadOnly); busy && by != "" {
			return "it is the file behind /dev/" + l.name + ", and " + by, nil
		} else if busy {
			return "it is the file behind /dev/" + l.name, nil
		}
	}
	if o.ReadOnly {
		if o.Shared {
			if err := f.conflict(AccessFrozen); err != nil {
				return err.Error(), nil
			}
		}
		if who := f.other(open.writes); who != "" {
			f.warn("%s has it open for writing: if it writes, what is sent is of no use", who)
		}
	}
	return "", nil
}

// deviceUsers is users of a block device.
func (f *File) deviceUsers(id fileID, o FileOptions) string {
	if o.Shared {
		if by := thisSystem.claimer(id); by != "" {
			return by
		}
	}
	if who := f.otherOf(thisSystem.family(id), open.writes); who != "" {
		return who + " has it open for writing"
	}
	return ""
}

func (f *File) warn(format string, args ...any) {
	f.warnings = append(f.warnings, fmt.Sprintf("%s: ", f.path)+fmt.Sprintf(format, args...))
}
