package migrate

import (
	"fmt"
	"slices"

	"github.com/silo-nbd/silo-nbd/pkg/protocol"
)

// classifyRefusal makes a refusal the end of Run if the destination says that a disk of
// ours is in use there, or if it was dialled and refuses frozen disks that none has
// taken yet. A source that listens or is live waits for a destination that takes them.
func (s *Source) classifyRefusal(refused *protocol.RefusedError) error {
	if err := s.dispossess(refused); err != nil {
		return &FatalError{err}
	}
	if !s.waitsForPeers() && !s.served {
		return &FatalError{refused}
	}
	return refused
}

// dispossess ends all service here if the destination that refuses a disk says that it
// is in use there, and the source does not know that it was handed off: this host, or
// what it knows, was rolled back to before that. It returns nil if that is not so.
//
// Only a peer that names the disk's UUID is believed. It is told to whoever connects,
// so that a stranger can lie; but one who may connect can also be handed the disk.
func (s *Source) dispossess(refused *protocol.RefusedError) error {
	i := int(refused.Dev) - firstDevice
	if i < 0 || i >= len(s.disks) {
		return nil
	}
	d, peer := s.disks[i], refused.Peer
	last, owned := d.peer.get()
	if owned || d.clone || !peer.Live || peer.Device == (Device{}) || peer.Identity.UUID != d.Identity.UUID {
		return nil
	}
	if slices.Contains(d.Former, peer.Device) {
		return nil // the disk was taken back from it, and it goes on without knowing
	}
	owner := Owner{Device: peer.Device, Epoch: peer.Epoch.Now, Taken: true}
	to := make(map[string]Owner)
	for _, d := range s.disks { // they belong together
		to[d.Name] = owner
		if d.Live != nil {
			d.Live.give(owner.Device)
		}
	}
	for _, d := range s.disks {
		d.peer.confirm(owner)
		d.peer.own(true)
	}
	err := fmt.Errorf("disk %q is in use at a destination, device %x: it was handed off, and what is known of it here is older than that, as after a rollback "+
		"of this host: nothing is sent or served here any more: use the disk there; or end that destination, and take the disk back as it is here with --force-reclaim", d.Name, owner.Device)
	s.log.Error("the disk is another host's: its service here has ended", "disk", d.Name, "device", fmt.Sprintf("%x", owner.Device), "last met", fmt.Sprintf("%x", last.Device))
	s.hand.noting.take()
	defer s.hand.noting.leave()
	noted := s.opts.Ledger.Prepare(to)
	if noted == nil {
		noted = s.opts.Ledger.HandOff()
	}
	if noted == nil {
		noted = s.opts.Ledger.Taken()
	}
	if noted != nil {
		return fmt.Errorf("%w; that cannot be noted, so do not serve it again: %w", err, noted)
	}
	return err
}
