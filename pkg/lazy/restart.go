package lazy

// Restart takes back every block: what is here came from another disk, or from
// other contents of it, than what comes from now on. It is for a device in
// standby, where nothing was written yet: else it is refused with ErrLive. When
// it returns nil, that is durable, and the map says that it is for generation
// generation of the disk source. A crash meanwhile leaves nothing of the old
// contents that counts, under the old name or the new one.
func (d *Device) Restart(source UUID, generation uint64) error {
	if !d.ops.enter() {
		return ErrClosed
	}
	defer d.ops.leave()
	if d.revocable {
		return ErrLive // its blocks may have been written here
	}
	all := span{0, d.state.blocks}
	if err := d.invalidate(all.lo, all.hi); err != nil {
		return err
	}
	return d.flush.alone(d, func() error {
		m := d.saver.m
		if m == nil {
			return nil
		}
		return m.forget([]span{all}, func(h *header) { h.id.Source, h.id.Generation = source, generation })
	})
}
