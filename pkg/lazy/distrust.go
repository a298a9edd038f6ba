package lazy

import (
	"fmt"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// After a sync that failed the kernel has marked the pages clean that it could not
// write, and keeps them: what is read looks as if it were on the device, every later
// sync succeeds, and only a power cut or the page's eviction shows what is there. The
// error is told once, to a process that ends of it. So the map says that a sync of the
// disk or of the map has failed, and the next process believes nothing that only the
// cache has: it drops the disk's cached pages, and takes what the log holds for not
// yet on the disk. The pages of the map are dropped at every start.

// markFailed has the map say that a sync has failed, if one has. It may not be
// possible: the map may lie on the device that fails. The map's turn is held.
func (d *Device) markFailed() {
	m := d.epoch.m
	if m == nil || d.flush.failure() == nil || m.header().flags&flagFailed != 0 {
		return
	}
	if err := m.update(func(h *header) { h.flags |= flagFailed }); err != nil {
		d.log.Warn("the map could not be marked: the next process does not know that a sync has failed", "map", m.path, "error", err)
	}
}

// distrust has the disk read from the device from now on: an earlier process has
// seen a sync fail.
func (d *Device) distrust(m *Map) error {
	d.log.Warn("a sync of the disk or its map has failed in an earlier process: what was written and never flushed since may be lost, as after a power cut", "map", m.path)
	if err := d.disk.Flush(); err != nil {
		return fmt.Errorf("lazy: flush the disk, whose sync has failed in an earlier process: %w", err)
	}
	if c, ok := d.disk.(storage.CacheDropper); ok {
		if err := c.DropCache(); err != nil {
			return fmt.Errorf("lazy: read the disk anew, whose sync has failed in an earlier process: %w", err)
		}
	}
	return nil
}

// trusted has the map say no more that a sync has failed.
func (m *Map) trusted() error {
	return m.update(func(h *header) { h.flags &^= flagFailed })
}
