package migrate

import (
	"crypto/rand"
	"fmt"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/protocol"
	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// deviceOf is the UUID of the device that a disk becomes: that of its map, or
// without one a new one, since such a device does not outlive its process.
func deviceOf(opened DestinationDisk) (device Device) {
	if opened.Map != nil {
		return opened.Map.Identity().Device
	}
	_, _ = rand.Read(device[:]) // never fails
	return device
}

// Describe tells a source which device its disk comes to, and in which state that is.
func (a *arrivals) Describe(ext *wire.Extension) {
	ext.Device = a.disk.device
	ext.Epoch = a.epoch
	ext.Live = a.disk.isLive()
	ext.Compare = a.compare != nil
}

// isLive says that the disk belongs to this side: clients use it, and the
// source changes nothing any more.
func (d *destDisk) isLive() bool {
	select {
	case <-d.dev.Live():
		return true
	default:
		return false
	}
}

// goLive takes the disk over, durably, if that has not happened.
func (d *destDisk) goLive(why string) error {
	if d.isLive() {
		return nil
	}
	if err := d.dev.GoLive(); err != nil {
		if !lazy.NoRoom(err) { // else nothing has happened, and it is tried again
			d.fail(err)
		}
		return fmt.Errorf("disk %q: %w", d.name, err)
	}
	d.log.Info("live: "+why, "disk", d.name)
	return nil
}

// handedTo is the device that the source says it has handed the disk off to.
func handedTo(di *protocol.DevInfo) Device {
	if di.Extension == nil {
		return Device{}
	}
	return di.Extension.Device
}

// stillWritten says that the source's disk is being written.
func stillWritten(di *protocol.DevInfo) bool {
	return di.Extension != nil && di.Extension.Live
}

// awaitsPostLock reports whether the device stays in standby until EventPostLock: the
// source's disk is being written, or the source has to note or to check first that
// this device is the owner. A plain Silo source and one before wire.RevisionEpoch
// give a frozen disk away by announcing it.
func awaitsPostLock(di *protocol.DevInfo) bool {
	ext := di.Extension
	switch {
	case ext == nil:
		return false
	case ext.Live, ext.Hold:
		return true
	}
	return ext.Revision >= wire.RevisionEpoch && ext.Device != (Device{})
}

// beginEpoch draws the epoch of this connection, which is durable before anything is
// claimed.
func (a *arrivals) beginEpoch(di *protocol.DevInfo) error {
	if di.Extension == nil {
		return nil
	}
	e, err := a.disk.dev.BeginEpoch(di.Extension.Epoch.Now)
	switch {
	case lazy.NoRoom(err):
		return fmt.Errorf("disk %q: there is no room for its map: make room: %w", a.disk.name, err)
	case err != nil:
		a.disk.fail(err)
		return &localError{fmt.Errorf("disk %q: %w", a.disk.name, err)}
	}
	a.epoch = wire.Epoch{Now: e.Now, Before: e.Before, Steps: e.Steps}
	return nil
}

// lock notes durably that the source prepares a handoff: a copy of the device that was
// made before does not know it, and is told apart.
func (a *arrivals) lock() error {
	if !a.written || a.disk.isLive() {
		return nil // it is a question, or what a plain Silo says before it looks for dirty blocks
	}
	if err := a.disk.withRoom(a.gone, a.disk.dev.Step); err != nil {
		return fmt.Errorf("disk %q: the handoff cannot be noted: %w", a.disk.name, err)
	}
	return nil
}

// refusalBy is why the source ends the connection, in its words.
func refusalBy(text []byte) error {
	return fmt.Errorf("the source refuses this destination: %s", protocol.OneLine(string(text)))
}

// resume tells the source what is here already, so that only the rest travels. Of a
// plain Silo source only what was written here: it has written its disk since the last
// connection, or is another one, and has no word for it (trap I12).
func (a *arrivals) resume(di *protocol.DevInfo) error {
	if di.Extension == nil && !a.disk.complete.Load() {
		var n int64
		err := a.disk.withRoom(a.gone, func() (err error) {
			n, err = a.disk.dev.ForgetFetched()
			return err
		})
		if err != nil {
			return &localError{fmt.Errorf("disk %q: %w", a.disk.name, err)}
		}
		if n > 0 {
			a.disk.log.Warn("a plain Silo source does not say what it has changed since: what had come from it is fetched again",
				"disk", a.disk.name, "bytes", n)
		}
	}
	a.claim()
	return nil
}

// ownership is what a source whose disk is refused should know: that the device of
// that disk is live here, so that the disk is not the source's any more. The zero value
// says nothing.
func (d *Destination) ownership(di *protocol.DevInfo) (ext wire.Extension) {
	d.mu.Lock()
	disk := d.byName[di.Name]
	d.mu.Unlock()
	if disk == nil || di.Extension == nil || !disk.isLive() {
		return ext
	}
	disk.mu.Lock()
	id := disk.id
	disk.mu.Unlock()
	if id.UUID == ([16]byte{}) || id.UUID != di.Extension.Identity.UUID {
		return ext
	}
	e := disk.dev.Epoch()
	ext.Live, ext.Device, ext.Identity = true, disk.device, id
	ext.Epoch = wire.Epoch{Now: e.Now, Before: e.Before, Steps: e.Steps}
	return ext
}

// elsewhere says that the source has handed the disk off, and not to device.
func elsewhere(di *protocol.DevInfo, device Device) error {
	if to := handedTo(di); to != (Device{}) && to != device {
		return fmt.Errorf("disk %q: the source has handed it off to another destination, or to one that was begun anew since: "+
			"it has one owner: nothing was changed: start that destination again with its disk and map", cut(di.Name, maxName))
	}
	return nil
}

// same says why di is not the disk that came before under this name, if so. In
// standby a disk whose contents have changed begins anew.
func (d *destDisk) same(di *protocol.DevInfo) error {
	if int64(di.Size) != d.geo.size || int64(di.BlockSize) != d.geo.blockSize {
		return fmt.Errorf("disk %q was %d bytes in blocks of %d, the source now says %d in blocks of %d: it is another disk",
			d.name, d.geo.size, d.geo.blockSize, di.Size, di.BlockSize)
	}
	if err := elsewhere(di, d.device); err != nil {
		return err
	}
	d.mu.Lock()
	was := d.id
	d.mu.Unlock()
	switch id := announcement(di).Identity; {
	case d.resumed && id == (Identity{}):
		return fmt.Errorf("disk %q: the source does not say which disk it has, so it may be another: "+
			"nothing was changed: use a source that keeps its identity, or begin anew with --overwrite", d.name)
	case stillWritten(di) && d.isLive():
		return fmt.Errorf("disk %q is in use here, and the source has taken it back and serves it too: "+
			"nothing was changed: end one of the two; to move it again begin anew with --overwrite", d.name)
	case d.mustCompare(di):
		return d.comparable(id)
	case d.comparisonAsked() && id.UUID == was.UUID && id.UUID != [16]byte{} && !d.isLive():
		return d.restart(id)
	case d.comparisonAsked():
		return fmt.Errorf("disk %q was moved here, so what is here of it has to be compared with %s, and the source has %s, or cannot compare: "+
			"nothing was changed: give the same source, frozen, with this version of silo-nbd, or begin anew with --overwrite", d.name, was, id)
	case id == was:
		return nil
	case id.UUID == was.UUID && id.UUID != [16]byte{} && !d.isLive():
		return d.restart(id)
	default:
		return fmt.Errorf("disk %q came from %s, the source now has %s: it is another disk, or was written since; "+
			"nothing was changed: give the right source, or begin anew with --overwrite", d.name, was, id)
	}
}

// restart forgets what is here: the source cannot tell any more what of it is
// as it has it.
func (d *destDisk) restart(id Identity) error {
	if err := d.dev.Restart(id.UUID, id.Generation); err != nil {
		return &localError{fmt.Errorf("disk %q: %w", d.name, err)}
	}
	d.mu.Lock()
	d.id = id
	d.mu.Unlock()
	d.log.Warn("the source was started anew, and nobody knows what was written before it was: what was copied before is not trusted, and the copy begins anew",
		"disk", d.name, "generation", id.Generation)
	return nil
}
