package migrate

import (
	"context"
	"time"
)

// watchEvery is how often a frozen disk is looked at while it is sent.
const watchEvery = time.Second

// unchanged returns why a frozen disk must no longer be sent: it was written, so
// that the destination has a mixture. Nothing mends that but another beginning.
func (d *sourceDisk) unchanged() error {
	if d.Changed == nil || d.stillWritten() {
		return nil
	}
	err := d.Changed()
	if err == nil {
		return nil
	}
	err = &FatalError{&DiskError{Name: d.Name, Err: err}}
	d.note(err)
	return err
}

// unchanged is that of all disks.
func (s *Source) unchanged() error {
	for _, d := range s.disks {
		if err := d.unchanged(); err != nil {
			return err
		}
	}
	return nil
}

// watchLoop looks at the disks while a connection lasts. done is closed when all of
// them have been moved.
func (s *Source) watchLoop(ctx context.Context, done <-chan struct{}) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if err := s.unchanged(); err != nil {
				return err
			}
		case <-done:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// watched reports whether a disk is to be looked at.
func (s *Source) watched() bool {
	for _, d := range s.disks {
		if d.Changed != nil {
			return true
		}
	}
	return false
}
