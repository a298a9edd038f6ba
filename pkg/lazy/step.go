package lazy

// Step counts a step of the epoch, durably, as a dirty list or going live does: the
// source is about to rely on the device's state, so that a copy that was made before
// must be told apart from one that is made later. NoRoom errors may be tried again.
func (d *Device) Step() error {
	if !d.ops.enter() {
		return ErrClosed
	}
	defer d.ops.leave()
	s := &d.epoch
	if s.m == nil {
		s.step()
		return nil
	}
	return d.flush.alone(d, func() error {
		return mayRetry(s.m.update(func(h *header) { h.epoch.step() }))
	})
}
