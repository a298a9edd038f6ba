package lazy

import (
	"errors"
	"fmt"
	"syscall"
)

var (
	// ErrClosed is what every call gets once the device is closed. It is also a
	// syscall.ESHUTDOWN.
	ErrClosed = fmt.Errorf("lazy: the device is closed: %w", syscall.ESHUTDOWN)

	// ErrDetached is what the source's hand gets once its session is over: the
	// stream was closed, or another source was attached.
	ErrDetached = errors.New("lazy: this session is over: its stream was closed or replaced by a later one")

	// ErrComplete is what the source's hand gets once the device is complete:
	// nothing that arrives later may change it.
	ErrComplete = errors.New("lazy: the device is complete: nothing is taken from a source any more")

	// ErrLive says that blocks cannot be taken back any more, because the
	// clients have seen them.
	ErrLive = errors.New("lazy: the device is live: its blocks cannot be invalidated any more")

	// ErrStandby says that the device cannot be complete, since the source has
	// not handed it over yet.
	ErrStandby = errors.New("lazy: the device is in standby: the source has not handed it over")

	// ErrMissing says that a range that was to be read without waiting is not
	// here yet.
	ErrMissing = errors.New("lazy: the range has not arrived")
)

// NoRoom says that err is for want of room on the file system of the disk or of
// the map, and not final: what failed can be tried again when there is room.
func NoRoom(err error) bool { return noRoom(err) }

// MapFull says that err is NoRoom because of the map.
func MapFull(err error) bool {
	var room *roomError
	return errors.As(err, &room)
}

// IncompleteError says that a device cannot be complete, since blocks are
// missing.
type IncompleteError struct {
	Missing int64 // blocks
	First   int64 // offset of the first of them, in bytes
}

func (e *IncompleteError) Error() string {
	return fmt.Sprintf("lazy: not complete: %d blocks are missing, the first at offset %d", e.Missing, e.First)
}
