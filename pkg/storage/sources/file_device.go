package sources

import (
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// blockDevice is what is known of a block device.
type blockDevice struct {
	size     int64  // bytes
	align    int64  // bytes; what is zeroed or discarded begins and ends on multiples
	readOnly bool   // set so; it can still be opened for writing
	number   string // MAJOR:MINOR
}

func isBlockDevice(info os.FileInfo) bool {
	return info.Mode()&(os.ModeDevice|os.ModeCharDevice) == os.ModeDevice
}

func examineBlockDevice(raw syscall.RawConn) (*blockDevice, error) {
	var size uint64
	var sector, readOnly int
	err := control(raw, func(fd int) (err error) {
		if err := ioctl(fd, unix.BLKGETSIZE64, unsafe.Pointer(&size)); err != nil {
			return err
		}
		if readOnly, err = unix.IoctlGetInt(fd, unix.BLKROGET); err != nil {
			return err
		}
		sector, err = unix.IoctlGetInt(fd, unix.BLKSSZGET)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("ask for the device's size: %w", err)
	}
	number, err := deviceNumber(raw)
	if err != nil {
		return nil, err
	}
	// Not less than a page: the kernel drops cached pages of the range, and
	// those that are only partly in it are better written.
	return &blockDevice{
		size:     int64(size),
		align:    int64(max(sector, os.Getpagesize())),
		readOnly: readOnly != 0,
		number:   number,
	}, nil
}

// blockRange is BLKZEROOUT or BLKDISCARD of length bytes at off.
func blockRange(fd int, request uint, off, length int64) error {
	r := [2]uint64{uint64(off), uint64(length)}
	return ioctl(fd, request, unsafe.Pointer(&r))
}

func ioctl(fd int, request uint, arg unsafe.Pointer) error {
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(arg)); e != 0 {
		return e
	}
	return nil
}
