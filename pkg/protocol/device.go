package protocol

import (
	"fmt"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// device is what a connection knows of a device id: that we announced it, or
// that the peer did. Its fields are guarded by ProtocolRW.mu.
type device struct {
	to   *ToProtocol // not nil: ours, we send its data
	in   *incoming   // not nil: the peer's, or expected to be
	seen bool        // a packet of it was sent or received
	sent bool        // our DevInfo is on its way, so the peer may know the device
}

// close wakes whoever waits for the device.
func (d *device) close() {
	if d.to != nil {
		d.to.window.close()
	}
	if d.in != nil {
		d.in.close()
	}
}

// deviceLocked returns the device, which comes into being if it must.
func (p *ProtocolRW) deviceLocked(dev uint32) (*device, error) {
	if d, ok := p.devices[dev]; ok {
		return d, nil
	}
	if len(p.devices) >= p.opts.MaxDevices {
		return nil, fmt.Errorf("device %d: %w: %d devices", dev, ErrTooMany, p.opts.MaxDevices)
	}
	d := new(device)
	p.devices[dev] = d
	return d, nil
}

// seeLocked notes a packet of the device; the first one calls newDevice.
func (p *ProtocolRW) seeLocked(dev uint32, d *device) {
	if d.seen {
		return
	}
	d.seen = true
	if p.newDevice != nil && !p.ended {
		p.drainer.announcing++
		p.wg.Go(func() {
			p.newDevice(p, dev)
			p.mu.Lock()
			p.drainer.announcing--
			p.mu.Unlock()
			p.stir()
		})
	}
}

// register makes t the sender of a device.
func (p *ProtocolRW) register(t *ToProtocol) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	d, err := p.deviceLocked(t.dev)
	if err != nil {
		return fmt.Errorf("protocol: %w", err)
	}
	if d.to != nil || d.in != nil {
		return fmt.Errorf("protocol: device %d: the id is already in use on this connection", t.dev)
	}
	d.to = t
	if p.ended {
		d.close()
	}
	return nil
}

// announce notes that t's DevInfo is about to be sent, before it is: what the
// peer says about the device can beat the send's return.
func (p *ProtocolRW) announce(t *ToProtocol) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := p.devices[t.dev]
	if d.sent {
		return fmt.Errorf("protocol: device %d: DevInfo was already sent", t.dev)
	}
	d.sent = true
	p.seeLocked(t.dev, d)
	return nil
}

// expect makes f the receiver of a device, which may have been announced
// already.
func (p *ProtocolRW) expect(f *FromProtocol) error {
	p.mu.Lock()
	d, err := p.deviceLocked(f.dev)
	if err == nil && d.to != nil {
		err = fmt.Errorf("device %d: the id is already in use on this connection", f.dev)
	}
	if err != nil {
		p.mu.Unlock()
		return err
	}
	if d.in == nil {
		d.in = newIncoming(p, f.dev)
	}
	if p.ended {
		d.close()
	}
	in := d.in
	p.mu.Unlock()
	f.in = in
	return in.register(f.factory)
}

// announced takes a DevInfo from the peer.
func (p *ProtocolRW) announced(h wire.Header, di *wire.DevInfo) error {
	dev := h.Dev
	p.mu.Lock()
	d, err := p.deviceLocked(dev)
	if err == nil && d.to != nil {
		err = fmt.Errorf("device %d: DevInfo of a device of ours: %w", dev, ErrUnexpected)
	}
	if err != nil {
		p.mu.Unlock()
		return err
	}
	if d.in == nil {
		d.in = newIncoming(p, dev)
	}
	if p.ended {
		d.close()
	}
	in := d.in
	p.mu.Unlock()
	if takesChecked(di) { // before anything is said about the device
		p.allow()
		p.sender.check()
	}
	if err := in.announce(di, h); err != nil { // before newDevice: it may use the device
		return err
	}
	p.mu.Lock()
	p.seeLocked(dev, d)
	p.mu.Unlock()
	return nil
}

// incoming returns the receiving side of a device that has been announced.
func (p *ProtocolRW) incoming(dev uint32) (*incoming, error) {
	p.mu.Lock()
	var in *incoming
	if d := p.devices[dev]; d != nil {
		in = d.in
	}
	p.mu.Unlock()
	if in == nil || !in.known {
		return nil, ErrNoDevInfo
	}
	if in.removed {
		return nil, fmt.Errorf("%w: the device was removed", ErrUnexpected)
	}
	return in, nil
}

// outgoing returns the sending side of a device that we have announced.
func (p *ProtocolRW) outgoing(dev uint32) (*ToProtocol, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if d := p.devices[dev]; d != nil && d.to != nil && d.sent {
		return d.to, nil
	}
	return nil, ErrNoDevInfo
}
