// Package migrate holds the two ends of a migration: a Source, which sends a
// disk, and a Destination, which takes it into a lazy device that can be used
// at once. Both speak the Silo protocol through package protocol, over any
// connection that a Connector makes, and carry on over a new connection when
// one breaks.
//
// The source sends the blocks that were asked for first, then what it was told
// would be wanted soon, then the rest in order. It holds no memory of earlier
// connections: on each new one the destination says what it has, and only the
// rest travels.
package migrate

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"time"
)

// Sizes in bytes.
const (
	// DefaultBlockSize is the unit in which a source sends and a destination
	// remembers, unless told otherwise.
	DefaultBlockSize = 64 << 10
	// MinBlockSize and MaxBlockSize bound what both ends accept.
	MinBlockSize = 512
	MaxBlockSize = 16 << 20
)

// ErrClosed says that the Source or the Destination was closed.
var ErrClosed = errors.New("migrate: closed")

// Connector makes one connection to the other side: it dials, or accepts the
// next one. It returns when it has one or when ctx is done.
type Connector func(ctx context.Context) (io.ReadWriteCloser, error)

// States of a disk, as DiskStatus.State has them.
const (
	StateWaiting   = "waiting"   // no connection to the other side
	StateMigrating = "migrating" // blocks travel
	StateStandby   = "standby"   // blocks travel to a destination that waits for the handoff
	StateComplete  = "complete"  // every block is at the destination, which has said so

	// StateComparing: what the destination has is compared with the source's disk, of
	// which it is not proved that it is as it was. Nothing travels.
	StateComparing = "comparing"

	// Of a live source's disk, while there is a connection:
	StateFirstPass     = "first pass"
	StateConverging    = "converging"     // what is dirty becomes less
	StateNotConverging = "not converging" // clients write faster than it travels
	StateHandedOff     = "handed off"     // the destination serves it; the rest travels
)

// DiskStatus is one disk's progress, seen from either side. All sizes are in
// bytes.
type DiskStatus struct {
	Name      string
	Size      int64
	BlockSize int64
	State     string // one of the States

	// BytesDone is what is settled: at a destination, what is local; at a
	// source, what was acknowledged or is not needed.
	BytesDone     int64
	BytesSent     int64 // data that went out, as it was on the wire: a zero run counts a few bytes
	BytesAsked    int64 // of BytesSent, what was asked for
	BytesReceived int64 // disk content that came in, zero runs counted whole
	// Damaged is how many packets had bytes changed on the way, as their checksum
	// told: data, which was sent again, or others, which cost the connection. Each
	// side counts what it hears of.
	Damaged      int64
	BytesWritten int64 // at a destination: what was written there: wholly, or since it came

	// In StateComparing: how much was compared, and how much is to be in all.
	BytesCompared, BytesToCompare int64

	// Of a live source's disk:
	Pass       int           // over what has changed, from 1, on this connection
	DirtyBytes int64         // written since it was sent, or not sent yet and written
	WriteRate  float64       // what clients write, in bytes a second
	LinkRate   float64       // what the path to the destination takes, in bytes a second
	ETA        time.Duration // until all has travelled, at these rates; 0: it is not known

	// Of a source's disk, while there is a connection:
	Device  Device // the destination's device; zero: it has not said
	Address string // the destination's, with the port; empty if the connection has none

	Waiting    int           // reads that wait for a block
	OldestWait time.Duration // how long the first of them has waited
	Connected  bool
	Reconnects int
	Err        error // the last thing that went wrong with this disk, nil if nothing did
}

func logger(l *slog.Logger) *slog.Logger {
	if l == nil {
		return slog.New(slog.DiscardHandler)
	}
	return l
}
