package migrate

import (
	"time"

	"golang.org/x/sys/unix"
)

const (
	// coarse is how much earlier than a write began a file may say that it was changed:
	// file systems take the time of the last tick, and it is never later than the write
	// ended.
	coarse = 20 * time.Millisecond
	// fine is what no file system that counts nanoseconds has its times in multiples
	// of, but by chance. One with coarser times does not tell what came shortly after.
	fine = time.Millisecond
	// A clock that is set gradually loses at most a thousandth, and setBack is how much
	// more it may have lost since the last write.
	setBack = 5 * time.Millisecond
)

// reading is a look at the clocks.
type reading struct {
	now   time.Time
	ahead time.Duration // of the time since the boot, which is never set
}

type clock func() reading

func systemClock() reading {
	var since unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &since) // never fails
	now := time.Now()
	return reading{now, time.Duration(now.UnixNano() - since.Nano())}
}

// WrittenLast reports whether it is proved that a file which was changed at changed, as
// its file system has it, was written by the earlier process last, and by no other
// since. The file system must take its times from the clock of this host. A process that
// was killed while it wrote has not noted when that ended, so that this is not proved.
func (c *Changes) WrittenLast(changed time.Time) bool {
	word := func(i int) int64 { return int64(c.head[i].Load()) }
	begun, ended := time.Unix(0, word(changesBegun)), time.Unix(0, word(changesEnded))
	r := c.clock()
	lost := time.Duration(word(changesClock)) - r.ahead
	switch {
	case changed.Nanosecond()%int(fine) == 0:
		return false
	case lost > setBack+max(0, r.now.Sub(ended))/1000: // what was written since may be of the same time
		return false
	}
	return !changed.Before(begun.Add(-coarse)) && !changed.After(ended)
}

// SetWritten notes when the disk was changed last, before its Tracker is made.
func (c *Changes) SetWritten(at time.Time) {
	c.head[changesBegun].Store(uint64(at.UnixNano()))
	c.head[changesEnded].Store(uint64(at.UnixNano()))
	c.head[changesClock].Store(uint64(c.clock().ahead))
}

// begins and ends note that a write does, now.
func (c *Changes) begins() {
	if c != nil {
		c.head[changesBegun].Store(uint64(time.Now().UnixNano()))
	}
}

func (c *Changes) ends() {
	if c != nil {
		r := c.clock()
		c.head[changesEnded].Store(uint64(r.now.UnixNano()))
		c.head[changesClock].Store(uint64(r.ahead))
	}
}
