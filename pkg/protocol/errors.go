package protocol

import (
	"errors"
	"fmt"
)

// ErrClosed is the reason of a connection that ended by Close.
var ErrClosed = errors.New("closed")

// What a peer can do wrong with packets that are well-formed. The connection
// ends with it, wrapped with the device.
var (
	// ErrNoDevInfo says that the first packet of a device was not its DevInfo.
	ErrNoDevInfo = errors.New("the device has not been announced by a DevInfo")
	// ErrTooMany says that the peer has more devices or requests than it may.
	ErrTooMany = errors.New("more than the peer may have")
	// ErrUnknownCommand says that a packet's command is not known here.
	ErrUnknownCommand = errors.New("unknown command")
	// ErrUnexpected says that a packet came which cannot come here or now.
	ErrUnexpected = errors.New("packet out of place")
	// ErrRefused says that the factory did not take the device.
	ErrRefused = errors.New("the device was refused")
	// ErrNoRoom says that a store has no room for what is written to it, and may
	// have later. It is for a store to return, wrapped; at the source a RemoteError
	// is one when the peer says so.
	ErrNoRoom = errors.New("no room")
)

// RemoteError says that the peer answered a request with an error, or did less
// than was asked. The connection lives.
type RemoteError struct {
	Op       string // "read" or "write"
	Off, Len int64  // what was asked for, in bytes
	Done     int64  // how many bytes the peer says it has done
	NoRoom   bool   // the peer says that it has no room for them
	Damaged  bool   // the peer says that they were changed on the way, or had no checksum
}

// Error names the request.
func (e *RemoteError) Error() string {
	if e.Done > 0 {
		return fmt.Sprintf("protocol: the peer did only %d bytes of a %s of %d bytes at %d", e.Done, e.Op, e.Len, e.Off)
	}
	if e.NoRoom {
		return fmt.Sprintf("protocol: the peer has no room to %s %d bytes at %d", e.Op, e.Len, e.Off)
	}
	if e.Damaged {
		return fmt.Sprintf("protocol: %d bytes at %d were changed on the way to the peer", e.Len, e.Off)
	}
	return fmt.Sprintf("protocol: the peer could not %s %d bytes at %d", e.Op, e.Len, e.Off)
}

// Is makes a refusal for want of room an ErrNoRoom, and one of damaged data an
// ErrDamaged.
func (e *RemoteError) Is(target error) bool {
	return e.NoRoom && target == ErrNoRoom || e.Damaged && target == ErrDamaged
}
