package sources

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A Stamp tells, without reading the disk, which file or device it is and
// whether it has been written. It is comparable and may be kept as JSON. A field
// that is zero is not known.
type Stamp struct {
	Size uint64 `json:"size"` // bytes
	// Dev is the number of the file system that a file lies on, or of the block
	// device itself. It may change when the host restarts.
	Dev   uint64 `json:"dev,omitempty"`
	Block bool   `json:"block,omitempty"` // it is a block device

	// Of a regular file, times in nanoseconds since 1970; the two last ones also
	// of the file behind a loop device.
	Inode      uint64 `json:"inode,omitempty"`
	Fickle     bool   `json:"fickle,omitempty"` // the file system may number the same file anew
	Birth      int64  `json:"birth,omitempty"`
	ModTime    int64  `json:"modtime,omitempty"`
	ChangeTime int64  `json:"changetime,omitempty"`

	// Of a block device.
	WWID     string `json:"wwid,omitempty"` // of the disk, also of a partition's
	DMUUID   string `json:"dmuuid,omitempty"`
	PartUUID string `json:"partuuid,omitempty"`
	DiskSeq  uint64 `json:"diskseq,omitempty"` // new for each device that appears, within one boot
	// Written is the number of sectors written or discarded since it appeared. What
	// is written past it, through the disk of a partition or under a volume, is not
	// in it.
	Written uint64 `json:"written,omitempty"`

	// BootID is the boot in which the stamp was taken. It is empty for a block
	// device of which the kernel does not count what is written.
	BootID string `json:"bootid,omitempty"`
}

// Stamp takes the stamp of the file or device that is open, whatever its path
// leads to by now. What others have written to a block device and the kernel has
// not yet passed on is written first, since it is not counted before.
func (f *File) Stamp() (Stamp, error) {
	if f.closed.Load() {
		return Stamp{}, fmt.Errorf("%s: look at it: %w", f.path, ErrClosed)
	}
	s, err := f.stamp()
	if err != nil {
		return Stamp{}, fmt.Errorf("%s: look at it: %w", f.path, errno(err))
	}
	return s, nil
}

func (f *File) stamp() (s Stamp, err error) {
	if f.block != nil {
		return f.block.stamp(f)
	}
	err = control(f.raw, func(fd int) (err error) {
		s, err = fileStamp(fd)
		return err
	})
	return s, err
}

// StampOf takes the stamp of a regular file that others may have open. It neither
// opens it for reading nor locks it.
func StampOf(path string) (Stamp, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return Stamp{}, fmt.Errorf("%s: look at it: %w", path, err)
	}
	defer unix.Close(fd) // only looked at
	s, err := fileStamp(fd)
	if err != nil {
		return Stamp{}, fmt.Errorf("%s: look at it: %w", path, err)
	}
	return s, nil
}

func fileStamp(fd int) (s Stamp, err error) {
	var st unix.Statx_t
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return s, err
	}
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st); err != nil {
		return s, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return s, errors.New("it is not a regular file")
	}
	s = Stamp{
		Size: st.Size, Dev: unix.Mkdev(st.Dev_major, st.Dev_minor),
		Inode: st.Ino, Fickle: fickle(int64(fs.Type)),
		ModTime: nanoseconds(st.Mtime), ChangeTime: nanoseconds(st.Ctime),
	}
	if st.Mask&unix.STATX_BTIME != 0 && !s.Fickle {
		s.Birth = nanoseconds(st.Btime)
	}
	s.BootID, err = bootID()
	return s, err
}

// fickle reports whether a type of file system has no inode numbers of its own, or
// gives a file another one when it is first written.
func fickle(magic int64) bool {
	const exfat, cifs, smb2 = 0x2011bab0, 0xff534d42, 0xfe534d42
	switch magic {
	case unix.FUSE_SUPER_MAGIC, unix.MSDOS_SUPER_MAGIC, unix.V9FS_MAGIC, unix.OVERLAYFS_SUPER_MAGIC, exfat, cifs, smb2:
		return true
	}
	return false
}

// OwnTimes reports whether the times of the file are of the clock of this host, as far
// as that is known: a server has another one, and so has another host that writes it.
func (f *File) OwnTimes() bool {
	var fs unix.Statfs_t
	err := control(f.raw, func(fd int) error { return unix.Fstatfs(fd, &fs) })
	return err == nil && f.block == nil && ownTimes(int64(fs.Type))
}

// ownTimes reports whether a type of file system is known to be one of this host. Of
// those that pass times on it is not known.
func ownTimes(magic int64) bool {
	const zfs, bcachefs, ntfs3 = 0x2fc12fc1, 0xca451a4e, 0x7366746e
	switch magic {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.F2FS_SUPER_MAGIC, unix.TMPFS_MAGIC,
		unix.RAMFS_MAGIC, unix.OVERLAYFS_SUPER_MAGIC, unix.MSDOS_SUPER_MAGIC, zfs, bcachefs, ntfs3:
		return true
	}
	return false
}

func nanoseconds(t unix.StatxTimestamp) int64 { return t.Sec*int64(time.Second) + int64(t.Nsec) }

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// SameDisk reports whether s and o name the same file or device, written or not;
// known is false when that cannot be told from them.
func (s Stamp) SameDisk(o Stamp) (same, known bool) {
	switch {
	case s.Block != o.Block, s.Size != o.Size:
		return false, true
	case s.Block:
		return s.sameDevice(o)
	case s.Inode == 0 || o.Inode == 0:
		return false, false
	case s.Inode != o.Inode:
		return false, !s.Fickle && !o.Fickle
	case differ(s.Birth, o.Birth): // the number was given again
		return false, true
	}
	return s.Dev == o.Dev, s.Dev == o.Dev
}

func (s Stamp) sameDevice(o Stamp) (same, known bool) {
	switch {
	case differ(s.WWID, o.WWID), differ(s.DMUUID, o.DMUUID), differ(s.PartUUID, o.PartUUID):
		return false, true
	case s.BootID != "" && s.BootID == o.BootID && s.DiskSeq != 0 && s.DiskSeq == o.DiskSeq && s.Dev == o.Dev:
		return true, true
	case s.DMUUID != "" && s.DMUUID == o.DMUUID:
		return true, true
	case s.WWID != "" && s.WWID == o.WWID && s.PartUUID == o.PartUUID:
		return true, true
	}
	return false, false // a partition's UUID alone is copied with its disk
}

// differ reports whether both are known and not the same.
func differ[T comparable](a, b T) bool {
	var unknown T
	return a != unknown && b != unknown && a != b
}

// Unchanged reports whether s and o prove that they are of the same disk, and
// that it was not written between them. A file must be closed or flushed by all
// who write it for that to hold over a power cut; of a block device there is no
// proof over a restart of the host. Not proved does not mean changed.
func (s Stamp) Unchanged(o Stamp) bool {
	if s.Block {
		return s == o && s.BootID != ""
	}
	o.BootID = s.BootID
	return s == o && s.Inode != 0 && s.ChangeTime != 0
}
