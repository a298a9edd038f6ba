package lazy

import (
	"crypto/sha256"
	"encoding/binary"

	"github.com/silo-nbd/silo-nbd/pkg/storage/bootfile"
)

// cacheName names the page cache in which what a device of the map writes lies until
// it is durable: the boot, and which file the map is, so that a copy of it or a
// snapshot of its file system has another one. While a device is in use its map says
// which cache that is. So the next process knows that all which was written to the disk
// is there, also if the mirror is gone: the directory that lives as long as the boot
// was made anew with a container or a service. Zero: not known.
func (o Options) cacheName(m *Map) (name UUID) {
	bootID := o.bootID
	if bootID == nil {
		bootID = bootfile.BootID
	}
	id, err := bootID()
	if err != nil {
		return UUID{} // then it is as after a power cut
	}
	dev, inode := m.inode()
	b := binary.LittleEndian.AppendUint64([]byte(id), dev)
	sum := sha256.Sum256(binary.LittleEndian.AppendUint64(b, inode))
	copy(name[:], sum[:])
	return name
}

// cached reports whether the disk's cache is the one that the process before has
// written to, which was killed, though nothing but the map is left of it. Then nothing
// must be laid over the disk, which may have newer data.
func (d *Device) cached(m *Map, cache UUID) bool {
	if m.fresh || cache == (UUID{}) || m.header().boot != cache {
		return false
	}
	if m.header().state == MapLive {
		d.log.Warn("the process before was killed, and what it kept beside the map is gone, though the host was not started anew: "+
			"what clients wrote to blocks that are not all here, and have not flushed, may be undone: start clients that stayed attached anew, and keep the directory for that over a restart (RuntimeDirectoryPreserve=yes, or a mount from the host)",
			"map", m.path)
	}
	return true
}

// leave has the map say that its device ended in order: nothing lies in a cache only.
func (d *Device) leave() error {
	m := d.saver.m
	if m == nil {
		return nil
	}
	return d.flush.alone(d, func() error {
		return mayRetry(m.update(func(h *header) { h.boot = UUID{} }))
	})
}
