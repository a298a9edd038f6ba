package sources

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Perm is what a process does with a disk, a set of bits with the values that
// they have in QEMU.
type Perm uint8

const (
	PermRead   Perm = 1 << 0 // BLK_PERM_CONSISTENT_READ: what is read is the disk
	PermWrite  Perm = 1 << 1 // BLK_PERM_WRITE
	PermResize Perm = 1 << 3 // BLK_PERM_RESIZE
)

// Access is how a disk is used, and what others must not do meanwhile. All that
// lock as QEMU does see it: QEMU, qemu-nbd, qemu-img and other processes of ours.
type Access struct{ Use, Deny Perm }

var (
	AccessFrozen  = Access{PermRead, PermWrite | PermResize}                                     // it is read, and nobody may write it
	AccessLive    = Access{PermRead | PermWrite | PermResize, PermWrite | PermResize}            // it is written here and nowhere else
	AccessPartial = Access{PermRead | PermWrite | PermResize, PermRead | PermWrite | PermResize} // as AccessLive, and what is in it is not a disk yet
	AccessShared  = Access{PermRead, 0}                                                          // others may do what they like
)

// QEMU's locks: a shared OFD lock on a byte says that the permission of its bit
// is used, one on another byte that it is denied to others (block/file-posix.c).
const (
	lockUsed   = 100
	lockDenied = 200
	perms      = 4 // bits
)

// lockOthers is where QEMU has no locks, start and length in bytes. Of its own it
// may have more than we know of.
var lockOthers = [...][2]int64{{0, lockUsed}, {lockUsed + 10, lockDenied - lockUsed - 10}, {lockDenied + 10, 0}}

var permNames = [perms]string{0: "read", 1: "write", 2: "write", 3: "resize"}

// Access returns how the file is locked.
func (f *File) Access() Access {
	f.locking.Lock()
	defer f.locking.Unlock()
	return f.access
}

// SetAccess changes how the file is locked, or says who keeps us from that; then
// nothing has changed. Less is always possible. It does not change what the File
// itself allows to be done.
func (f *File) SetAccess(a Access) error {
	if f.closed.Load() {
		return fmt.Errorf("%s: lock it: %w", f.path, ErrClosed)
	}
	f.locking.Lock()
	defer f.locking.Unlock()
	if err := f.setAccessLocked(a); err != nil {
		return fmt.Errorf("%s: %w", f.path, explain(err))
	}
	return nil
}

func (f *File) setAccessLocked(a Access) error {
	if f.noBytes {
		f.access = a
		return nil
	}
	more := Access{a.Use &^ f.access.Use, a.Deny &^ f.access.Deny}
	err := f.lockBytes(more, unix.F_RDLCK)
	if err == nil {
		err = f.conflict(more) // after ours are there: of two that come at once one at least sees the other
	}
	if err != nil {
		_ = f.lockBytes(more, unix.F_UNLCK) // err says what counts, and closing unlocks as well
		return err
	}
	less := Access{f.access.Use &^ a.Use, f.access.Deny &^ a.Deny}
	if err := f.lockBytes(less, unix.F_UNLCK); err != nil {
		return err
	}
	f.access = a
	return nil
}

// lockBytes locks or unlocks the bytes of an access.
func (f *File) lockBytes(a Access, how int16) error {
	for bit := range int64(perms) {
		for base, perm := range map[int64]Perm{lockUsed: a.Use, lockDenied: a.Deny} {
			if perm&(1<<bit) == 0 {
				continue
			}
			l := unix.Flock_t{Type: how, Whence: io.SeekStart, Start: base + bit, Len: 1}
			switch err := f.ofd(unix.F_OFD_SETLK, &l); {
			case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
				return f.inUseBy(l.Start, "which has locked it")
			case err != nil:
				return fmt.Errorf("lock byte %d: %w", l.Start, err)
			}
		}
	}
	return nil
}

func (f *File) ofd(cmd int, l *unix.Flock_t) error {
	return control(f.raw, func(fd int) error { return callOFD(uintptr(fd), cmd, l) })
}

// conflict says who uses the file so that it cannot be used so as well.
func (f *File) conflict(a Access) error {
	for bit := range int64(perms) {
		if a.Use&(1<<bit) != 0 {
			if err := f.held(unix.F_WRLCK, lockDenied+bit, 1, "which does not let others "+permNames[bit]+" it"); err != nil {
				return err
			}
		}
		if a.Deny&(1<<bit) != 0 {
			if err := f.held(unix.F_WRLCK, lockUsed+bit, 1, "which may "+permNames[bit]+" it"); err != nil {
				return err
			}
		}
	}
	// Locks of other programs, which do not mean permissions: those that are
	// exclusive, and if we write all of them.
	how := int16(unix.F_RDLCK)
	if a.Use&PermWrite != 0 {
		how = unix.F_WRLCK
	}
	for _, r := range lockOthers {
		if a.Use&(PermRead|PermWrite) == 0 {
			break
		}
		if err := f.held(how, r[0], r[1], "which has locked it"); err != nil {
			return err
		}
	}
	return nil
}

// held returns an error if somebody has a lock on some of length bytes at start
// that excludes one of ours; a length of 0 is to the end.
func (f *File) held(how int16, start, length int64, what string) error {
	l := unix.Flock_t{Type: how, Whence: io.SeekStart, Start: start, Len: length}
	if err := f.ofd(unix.F_OFD_GETLK, &l); err != nil {
		return fmt.Errorf("look who has locked it: %w", err)
	}
	if l.Type == unix.F_UNLCK {
		return nil
	}
	return f.inUseBy(l.Start, what)
}

// inUseBy is the error of a file on which another one has a lock at a byte.
func (f *File) inUseBy(at int64, what string) error {
	return inUse(f.other(func(o open) bool { return o.locked("OFDLCK", at, at) || o.locked("POSIX", at, at) }), what)
}

// other returns, in words, who else has the file open so that is is true of it.
func (f *File) other(is func(open) bool) string { return f.otherOf(nil, is) }

// otherOf is other for several files; of none it is ours.
func (f *File) otherOf(ids []fileID, is func(open) bool) string {
	own := ""
	err := control(f.raw, func(fd int) error {
		own = strconv.Itoa(fd)
		if ids == nil {
			id, _ := idOfOpen(fd)
			ids = []fileID{id}
		}
		return nil
	})
	if err != nil {
		return ""
	}
	self := strconv.Itoa(os.Getpid())
	return thisSystem.holder(ids, func(o open) bool { return !(o.pid == self && o.fd == own) && is(o) })
}

// inUse is the error of a disk that somebody has; who is empty if that is not
// known.
func inUse(who, what string) error {
	switch who {
	case thisProcess:
		return &advice{"in use by this process already: give each disk once", syscall.EBUSY}
	case "":
		who = "another process (another user's, or on another host)"
	}
	text := "in use by " + who
	if what != "" {
		text += ", " + what
	}
	return &advice{text + ": stop that one first", syscall.EBUSY}
}

// unlockable reports whether an error says that there are no such locks here.
func unlockable(err error) bool {
	return errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.ENOLCK) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL)
}

const (
	lockPause    = time.Millisecond
	maxLockPause = 512 * time.Millisecond // the last one: a second in all
)

// lock takes all locks of a file that was just opened. It does not wait for
// another process, save that udev locks a device for a moment to look at it when
// somebody has closed it, and that one which finds an empty file lets go of it
// at once: with patient they are tried for a second.
func (f *File) lock(a Access, exclusive, patient bool) error {
	var fs unix.Statfs_t
	if err := control(f.raw, func(fd int) error { return unix.Fstatfs(fd, &fs) }); err != nil {
		return err
	}
	whole := errNoLocks // flock is a lock of all bytes there: QEMU's could not be told from it
	if fs.Type != unix.NFS_SUPER_MAGIC {
		if whole = f.flock(exclusive, patient); whole != nil && !unlockable(whole) {
			return whole
		}
	}
	bytes := errNoLocks // a lock there keeps also ourselves from writing the byte
	if fs.Type != unix.SMB_SUPER_MAGIC && fs.Type != unix.SMB2_SUPER_MAGIC && fs.Type != unix.CIFS_SUPER_MAGIC {
		if bytes = f.setAccessLocked(a); bytes != nil && !unlockable(bytes) {
			return bytes
		}
	}
	f.noBytes = bytes != nil
	if whole != nil && bytes != nil {
		var why syscall.Errno
		_ = errors.As(whole, &why) // it is one: unlockable knows no others
		f.warn("the file system knows no locks (%v): make sure that no other process uses the disk", why)
	}
	return nil
}

var errNoLocks = error(unix.EOPNOTSUPP)

// The kernel's locks; tests put file systems without them in their place.
var (
	callFlock = unix.Flock
	callOFD   = unix.FcntlFlock
)

// flocker returns, in words, who has the flock.
func (f *File) flocker() (who string) {
	_ = control(f.raw, func(fd int) error { // an error: then it is not known
		if id, ok := idOfOpen(fd); ok && !id.block {
			who = thisSystem.flocker(id)
		}
		return nil
	})
	if who == "" {
		who = f.other(func(o open) bool { return o.locked("FLOCK", 0, 0) })
	}
	return who
}

func (f *File) flock(exclusive, patient bool) error {
	how := unix.LOCK_SH
	if exclusive {
		how = unix.LOCK_EX
	}
	for pause := lockPause; ; pause *= 2 {
		err := control(f.raw, func(fd int) error { return callFlock(fd, how|unix.LOCK_NB) })
		if !errors.Is(err, unix.EWOULDBLOCK) {
			if err != nil {
				return fmt.Errorf("lock it: %w", err)
			}
			return nil
		}
		if !patient || pause > maxLockPause {
			return inUse(f.flocker(), "")
		}
		<-time.After(pause)
	}
}
