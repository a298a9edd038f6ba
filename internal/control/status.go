// Package control lets others look at a running source or dest, and hold its
// reins: JSON over HTTP on a unix socket. docs/CONTROL.md is its reference.
package control

import (
	"context"
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

// Roles of a process.
const (
	RoleSource = "source"
	RoleDest   = "dest"
)

// States of a disk, as Disk.State has them.
const (
	StateWaitingForSource = "waiting for source"      // of a dest: not connected
	StateWaitingForDest   = "waiting for destination" // of a source: not connected
	StateStarting         = "starting"                // too short to tell more
	StateCopying          = "copying"                 // what is missing gets less, and nobody can make it more
	StateFirstPass        = "first pass"              // of a live disk: the first time over all of it
	StateConverging       = "converging"              // of a live disk: what is missing gets less
	StateNotConverging    = "not converging"          // of a live disk: it does not; Disk.Detail says why
	StateReady            = "ready for handoff"       // of a live disk: what is missing takes less than readyTime
	StateStandby          = "waiting for handoff"     // of a dest: blocks come, and the disk is still in use at the source
	StateComparing        = "comparing"               // it is found out whether the source's disk is as it was; nothing travels
	StatePaused           = "paused"                  // by pause; what is asked for is sent
	StateNoRoom           = "no room"                 // at the destination; Disk.Error says more
	StateStalled          = "stalled"                 // connected, and yet nothing moves
	StateFinishing        = "finishing"               // nothing is missing; it has to be confirmed
	StateComplete         = "complete"                // the source is not needed any more
)

// Status is how far a process is.
type Status struct {
	Role       string      `json:"role"` // RoleSource or RoleDest
	Version    string      `json:"version"`
	PID        int         `json:"pid"`
	Uptime     float64     `json:"uptime_seconds"`
	Draining   bool        `json:"draining"`             // it has been told to end when it has finished
	Background *Background `json:"background,omitempty"` // of a source
	NBD        *NBD        `json:"nbd,omitempty"`        // if it serves NBD
	Copies     *Copies     `json:"copies,omitempty"`     // of a source that clones
	Disks      []Disk      `json:"disks"`
}

// Background is what holds a source's background back.
type Background struct {
	RateLimit int64 `json:"rate_limit"` // bytes a second; 0: none
	Paused    bool  `json:"paused"`
}

// Copies is how many destinations a source that clones has served.
type Copies struct {
	Complete   int `json:"complete"`   // have everything
	UnderWay   int `json:"under_way"`  // are connected, and do not
	Unfinished int `json:"unfinished"` // do not, connected or not
}

// NBD is who uses the exports.
type NBD struct {
	Clients int `json:"clients"`
	Waiting int `json:"waiting_requests"` // requests that wait for data
}

// Disk is how far a disk is. Sizes are in bytes, rates in bytes a second.
type Disk struct {
	Name   string `json:"name"`
	State  string `json:"state"`
	Detail string `json:"detail,omitempty"` // what the state cannot say, in words

	Size      int64 `json:"size"`
	BlockSize int64 `json:"block_size"`
	Done      int64 `json:"done"`     // local at a dest; confirmed, or not needed, at a source
	Percent   int   `json:"percent"`  // rounded down; 100 only when complete
	Sent      int64 `json:"sent"`     // by a source, as it was on the wire
	Received  int64 `json:"received"` // by a dest, content
	Written   int64 `json:"written"`  // local at a dest because it was written there

	Compared  int64 `json:"compared,omitempty"`   // of ToCompare, while they are compared
	ToCompare int64 `json:"to_compare,omitempty"` // bytes that came, and were not written since

	Rate *int64   `json:"rate,omitempty"`        // how fast Done grows, or shrinks; absent while it cannot be told
	ETA  *float64 `json:"eta_seconds,omitempty"` // until nothing is missing, at this rate; absent if it cannot be told

	Live *LiveDisk `json:"live,omitempty"` // of a source whose disk is in use

	Owner *Owner `json:"owner,omitempty"` // of a source whose disk was handed off

	Destination *Destination `json:"destination,omitempty"` // of a source: the one that is connected

	WaitingReads int     `json:"waiting_reads"`
	OldestWait   float64 `json:"oldest_wait_seconds"`
	Connected    bool    `json:"connected"`
	Reconnects   int     `json:"reconnects"`
	Damaged      int64   `json:"damaged"`         // packets that arrived damaged and were sent again
	Error        string  `json:"error,omitempty"` // the last thing that went wrong with this disk
}

// LiveDisk is what is special about a disk that is in use at the source.
type LiveDisk struct {
	Pass      int   `json:"pass"`       // from 1
	HandedOff bool  `json:"handed_off"` // it is the destination's
	WriteRate int64 `json:"write_rate"` // what its clients write, bytes a second
	LinkRate  int64 `json:"link_rate"`  // what the path takes, bytes a second; 0 while it is not known
}

// Owner is the destination's device that a disk was handed off to, as it is noted
// at the source.
type Owner struct {
	Device   string `json:"device"`       // 32 hexadecimal digits
	At       string `json:"at,omitempty"` // the destination's address, if the source connects to it
	Taken    bool   `json:"taken"`        // it has said that it is live
	Complete bool   `json:"complete"`     // it has everything
}

// Destination is the other end of a source's connection.
type Destination struct {
	Device  string `json:"device,omitempty"`  // 32 hexadecimal digits; absent of a plain Silo
	Address string `json:"address,omitempty"` // host and port; absent if the connection has none
}

// Sample is a disk as it is now.
type Sample struct {
	migrate.DiskStatus
	Live  *Live  // nil: nobody writes the disk at the source
	Owner *Owner // nil: the disk is this host's
}

// Live is what there is to know of a disk that is in use at the source.
type Live struct {
	Pass      int   // from 1
	WriteRate int64 // what its clients write, in bytes a second
	LinkRate  int64 // what the path to the destination takes, in bytes a second
	HandedOff bool  // from here on it only becomes less
}

// Pacer is what can be done to a source's background.
type Pacer interface {
	SetRate(bytesPerSecond int64) // 0: no bound
	Rate() int64
	Pause()
	Resume()
	Paused() bool
}

// Handoffer hands live disks over.
type Handoffer interface {
	// Handoff returns when the destination has the disks, or why it has not. When
	// ctx ends it may be given up. to names the destination that is to have them;
	// empty: the only one there was.
	HandoffTo(ctx context.Context, to string) error
	// NoRoom says why a handoff should not be: the destination is full.
	NoRoom() error
	// AbortHandoff ends a handoff that has not gone too far.
	AbortHandoff() error
}

// Options of a Server.
type Options struct {
	Role    string
	Version string
	// Disks tells how the disks are. It must be quick.
	Disks func() []Sample
	Pace  Pacer      // nil: nothing is sent here
	Hand  Handoffer  // nil: there is nothing to hand over
	NBD   func() NBD // nil: nothing is served
	// Copies is how many copies were made; nil: this is not what the process does.
	Copies func() Copies
	Drain  func() // lets the process end once it has finished; nil: that is not known here
}

// readyTime is how long what is missing of a live disk may take to send for the
// disk to be called ready.
const readyTime = time.Second
