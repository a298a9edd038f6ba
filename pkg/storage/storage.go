// Package storage holds the plain storage interface that everything else is
// built on: a fixed number of bytes that can be read, written and flushed.
//
// What a store can do beyond that it says by implementing one of the optional
// interfaces below, as in package io. All offsets and lengths are in bytes and
// all ranges are half-open.
package storage

import (
	"errors"
	"io"
)

// ErrOutOfRange says that a request does not lie inside the storage. Nothing
// was read or written.
var ErrOutOfRange = errors.New("storage: range outside the storage")

// StorageProvider is storage of a fixed size. All methods may be called from
// any number of goroutines at once; overlapping writes leave one or the other
// in each sector, as on a disk.
type StorageProvider interface {
	// ReadAt fills p from off, with the contract of io.ReaderAt: past the end
	// it returns what there is and io.EOF.
	io.ReaderAt
	// WriteAt writes all of p at off, or says why not. A write that does not
	// lie inside the storage is refused whole with ErrOutOfRange.
	io.WriterAt
	// Size is the number of bytes, which never changes.
	Size() uint64
	// Flush returns when every write that was answered before the call is on
	// stable storage. A failed flush stays failed: what was written before it
	// may be lost.
	Flush() error
	// Close releases the storage. Flush is the caller's business.
	Close() error
}

// Zeroer is storage that can make a range read as zeroes without being sent
// the zeroes.
type Zeroer interface {
	// ZeroAt makes [off, off+length) read as zeroes. With punch the space may
	// be given back; without it, it stays (or becomes) allocated.
	ZeroAt(off, length int64, punch bool) error
}

// FastZeroer is storage that may know a way to zero a range in less time than
// it takes to write it.
type FastZeroer interface {
	// CanZeroFast says whether there is such a way where the space may be given
	// back. It never changes.
	CanZeroFast() bool
	// ZeroFastAt is ZeroAt where that takes less time than a write. Where it
	// does not, nothing is changed, and the error is errors.ErrUnsupported.
	ZeroFastAt(off, length int64, punch bool) error
}

// Splicer is storage that can take data out of a pipe: what came from a socket
// need not be copied to memory of ours for that (splice(2)).
type Splicer interface {
	// CanSplice says whether that saves anything.
	CanSplice() bool
	// SpliceAt is WriteAt with length bytes that are in the pipe, of which pipe
	// is the descriptor. After an error some of them may be left there.
	SpliceAt(pipe int, off, length int64) error
}

// Trimmer is storage that can be told that a range is not needed any more.
type Trimmer interface {
	// TrimAt gives back the space of [off, off+length) where it can; what the
	// range reads as afterwards is not defined.
	TrimAt(off, length int64) error
}

// CacheDropper is storage behind a cache of the system's, such as a file's.
type CacheDropper interface {
	// DropCache has what is read from now on read from the device, as far as it was
	// written there: what a write that failed has left in the cache is gone. Call it
	// after a Flush.
	DropCache() error
}

// Extenter is storage that knows where it has holes.
type Extenter interface {
	// ExtentAt describes the run that off lies in: it ends at end, and hole
	// says that all of it is a hole, which reads as zeroes.
	ExtentAt(off int64) (end int64, hole bool, err error)
}

// CheckRange returns ErrOutOfRange unless [off, off+length) lies inside size
// bytes of storage.
func CheckRange(off, length int64, size uint64) error {
	if off < 0 || length < 0 || uint64(off) > size || uint64(length) > size-uint64(off) {
		return ErrOutOfRange
	}
	return nil
}
