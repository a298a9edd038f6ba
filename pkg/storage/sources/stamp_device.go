package sources

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	sysDevices = "/sys/dev/block" // a link for each block device, MAJOR:MINOR
	udevData   = "/run/udev/data"

	blkGetDiskSeq = 0x80081280 // BLKGETDISKSEQ, since Linux 5.15
	loopGetStatus = 0x4c05     // LOOP_GET_STATUS64
)

// stamp is that of a block device.
func (b *blockDevice) stamp(f *File) (s Stamp, err error) {
	var major, minor uint32
	if _, err := fmt.Sscanf(b.number, "%d:%d", &major, &minor); err != nil {
		return s, err
	}
	s = Stamp{Block: true, Size: uint64(f.room), Dev: unix.Mkdev(major, minor)}
	var loop loopInfo
	isLoop := false
	err = control(f.raw, func(fd int) error {
		const all = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
		if err := unix.SyncFileRange(fd, 0, 0, all); err != nil {
			return err
		}
		_ = ioctl(fd, blkGetDiskSeq, unsafe.Pointer(&s.DiskSeq)) // an older kernel does not say
		isLoop = ioctl(fd, loopGetStatus, unsafe.Pointer(&loop)) == nil
		return nil
	})
	if err != nil {
		return s, err
	}
	dir, err := filepath.EvalSymlinks(filepath.Join(sysDevices, b.number))
	if err != nil {
		return s, nil // no sysfs: nothing is known
	}
	s.fromSysfs(dir, b.number)
	if isLoop {
		s.fromLoop(dir, &loop)
	}
	return s, nil
}

// fromSysfs fills in what the kernel shows in a device's directory.
func (s *Stamp) fromSysfs(dir, number string) {
	disk := dir
	if text(dir, "partition") != "" {
		disk = filepath.Dir(dir)
		s.PartUUID = partUUID(dir, number)
	}
	s.DMUUID = text(dir, "dm/uuid")
	s.WWID = wwid(disk)
	if text(disk, "queue/iostats") == "0" {
		return
	}
	var ok bool
	if s.Written, ok = written(text(dir, "stat")); !ok {
		return
	}
	s.BootID, _ = bootID() // empty: nothing is proved
}

// wwid is the name that a disk bears in all the world, or a serial number where
// it has no such name.
func wwid(disk string) string {
	for _, name := range []string{"wwid", "device/wwid", "serial", "device/serial", "device/cid", "md/uuid"} {
		if id := text(disk, name); id != "" {
			return id
		}
	}
	return ""
}

// partUUID is the UUID of a partition, from the kernel or from udev.
func partUUID(dir, number string) string {
	for _, where := range []struct{ file, key string }{
		{filepath.Join(dir, "uevent"), "PARTUUID="},
		{filepath.Join(udevData, "b"+number), "E:ID_PART_ENTRY_UUID="},
	} {
		b, err := os.ReadFile(where.file)
		if err != nil {
			continue // it is not said there
		}
		for line := range strings.Lines(string(b)) {
			if id, ok := strings.CutPrefix(strings.TrimSpace(line), where.key); ok {
				return strings.ToLower(id)
			}
		}
	}
	return ""
}

// written is the number of sectors written and discarded, from the text of a
// device's stat file (Documentation/block/stat.rst).
func written(stat string) (sectors uint64, ok bool) {
	const writeSectors, discardSectors = 6, 13
	fields := strings.Fields(stat)
	for _, i := range []int{writeSectors, discardSectors} {
		if i >= len(fields) {
			return sectors, i == discardSectors // before Linux 4.18 discards counted as writes
		}
		n, err := strconv.ParseUint(fields[i], 10, 64)
		if err != nil {
			return 0, false
		}
		sectors += n
	}
	return sectors, true
}

// loopInfo is the beginning of struct loop_info64, and room for the rest of it.
type loopInfo struct {
	device, inode, rdevice uint64
	offset, sizeLimit      uint64
	_                      [192]byte
}

// fromLoop names a loop device after the file behind it, which may be written
// past the device. A file that cannot be seen from here gives no name: an inode's
// number is given again.
func (s *Stamp) fromLoop(dir string, loop *loopInfo) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, text(dir, "loop/backing_file"), 0, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st)
	if err != nil || st.Ino != loop.inode {
		return
	}
	s.ModTime, s.ChangeTime = nanoseconds(st.Mtime), nanoseconds(st.Ctime)
	if st.Mask&unix.STATX_BTIME != 0 {
		s.WWID = fmt.Sprintf("loop-%d-%d-%d-%d", loop.device, loop.inode, nanoseconds(st.Btime), loop.offset)
	}
}

// text is the content of a file in a directory of sysfs, empty if there is none.
func text(dir, name string) string {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
