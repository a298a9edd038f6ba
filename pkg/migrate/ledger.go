package migrate

// Ledger keeps, also over a crash, to whom the disks of a live source belong.
type Ledger interface {
	// HandOff makes it durable that the disks belong to the destination: all of
	// them or none, also if the power goes meanwhile. to is the destination's
	// device for each disk, by the disk's name. It is called before the
	// destination is told, and before anything is served there.
	HandOff(to map[string]Device) error
	// TakeBack makes it durable that the disks are still ours, after HandOff
	// failed: nobody knows then how far it came. The destination was not told.
	TakeBack() error
}

// noLedger remembers nothing.
type noLedger struct{}

func (noLedger) HandOff(map[string]Device) error { return nil }
func (noLedger) TakeBack() error                 { return nil }

// unnamed is the owner of a disk that was handed off to a destination which has
// no name for its device, as a plain Silo one: no other one has this name.
var unnamed = Device{
	0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
}
