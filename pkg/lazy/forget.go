package lazy

// ForgetFetched takes back every block that was fetched: the source may have changed
// any of them. What was written here stays. It is for a Revocable device; another one
// refuses with ErrLive once it is live. It returns how many bytes are missing that were
// not before; when it returns nil, that is durable.
func (d *Device) ForgetFetched() (bytes int64, err error) {
	if !d.ops.enter() {
		return 0, ErrClosed
	}
	defer d.ops.leave()
	before := d.state.local.Load()
	all := span{0, d.state.blocks}
	if err := d.invalidate(all.lo, all.hi); err != nil {
		return 0, err
	}
	bytes = max(0, before-d.state.local.Load()) * d.blockSize
	return bytes, d.forget([]span{all})
}
