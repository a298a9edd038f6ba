package identity

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"

	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

// ErrHandedOff says that a disk is not this side's any more.
var ErrHandedOff = errors.New("was handed off to a destination, which has what was written since: " +
	"let the source go on with --nbd as before, or take the disk back with --nbd and --force-reclaim, which gives up what was written there")

// handoff says to whom a disk was handed off. It counts if all disks that were
// handed off together say so: the destination was told only after that.
type handoff struct {
	ID    string   `json:"id"`    // of this handoff
	Disks []string `json:"disks"` // the UUIDs of all disks of it
	Owner string   `json:"owner"` // the UUID of the destination's device
}

// LiveDisk is a disk that is to be served while it moves.
type LiveDisk struct {
	Disk Disk
	Name string // what its source calls it
	Path string // of its state file
}

// Live keeps the state files of the disks of a live source. It is their
// migrate.Ledger.
type Live struct {
	mu    sync.Mutex
	disks []LiveDisk
	// Guarded by mu:
	states []state
	staged map[string]migrate.Owner // by Prepare

	crashed   []string
	ended     []string
	handedOff bool
}

// OpenLive reads the state files, or makes them, and marks them as open under a
// new generation before it returns: from then on the disks may be written.
// Disks that were handed off are left so, unless reclaim says to take them
// back. Close it when nobody writes the disks any more.
func OpenLive(disks []LiveDisk, reclaim bool) (*Live, error) {
	l := &Live{disks: disks}
	for _, d := range disks {
		s, err := load(d.Path)
		if errors.Is(err, fs.ErrNotExist) {
			s, err = state{UUID: newUUID()}, nil
		}
		if err != nil {
			return nil, err
		}
		s.Fingerprint.Size = d.Disk.Size()
		l.states = append(l.states, s)
	}
	gone, err := l.gone()
	if err != nil && !reclaim {
		return nil, err
	}
	if gone && !reclaim {
		l.handedOff = true
		return l, nil
	}
	for i := range l.states {
		s := &l.states[i]
		switch {
		case s.Open && s.Handoff == nil:
			l.crashed = append(l.crashed, disks[i].Name)
		case s.Generation > 0 && s.Handoff == nil:
			l.ended = append(l.ended, disks[i].Name)
		}
		s.Version, s.Open, s.Handoff = versionLive, true, nil
		s.Generation++
	}
	if err := l.save(); err != nil {
		return nil, fmt.Errorf("keep that the disk is in use here: %w", err)
	}
	return l, nil
}

// gone says whether the disks were handed off: all of them together, or, after
// a crash in the middle of it, none.
func (l *Live) gone() (bool, error) {
	n := 0
	for i, s := range l.states {
		if s.Handoff == nil {
			continue
		}
		for _, uuid := range s.Handoff.Disks {
			if !slices.ContainsFunc(l.states, func(o state) bool { return o.UUID == uuid }) {
				return false, fmt.Errorf("%s was handed off together with another disk: give all of them", l.disks[i].Disk.Path())
			}
		}
		if s.Handoff.ID != l.states[0].handoffID() {
			continue
		}
		n++
	}
	return n > 0 && n == len(l.states), nil
}

func (s state) handoffID() string {
	if s.Handoff == nil {
		return ""
	}
	return s.Handoff.ID
}

// HandedOff says that the disks belong to a destination.
func (l *Live) HandedOff() bool { return l.handedOff }

// Crashed are the names of disks whose last source did not end in order: what
// was copied before is not trusted.
func (l *Live) Crashed() []string { return l.crashed }

// Ended are the names of disks that had a source before, which ended in order:
// what was copied then is not trusted either, since it is not known what has
// changed.
func (l *Live) Ended() []string { return l.ended }

// Identity is that of the i-th disk.
func (l *Live) Identity(i int) (migrate.Identity, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.states[i].identity()
}

// Owner implements migrate.Ledger.
func (l *Live) Owner(disk string) (owner migrate.Owner, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, d := range l.disks {
		h := l.states[i].Handoff
		if d.Name != disk || h == nil {
			continue
		}
		raw, err := hex.DecodeString(h.Owner)
		if err == nil && len(raw) == len(owner.Device) {
			owner.Device = migrate.Device(raw)
		}
		return owner, true
	}
	return owner, false
}

// Peer implements migrate.Ledger.
func (l *Live) Peer(disk string) (migrate.Owner, bool) { return l.Owner(disk) }

// Confirm implements migrate.Ledger.
func (l *Live) Confirm(string, migrate.Owner) error { return nil }

// Prepare implements migrate.Ledger.
func (l *Live) Prepare(to map[string]migrate.Owner) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.staged = to
	return nil
}

// HandOff implements migrate.Ledger.
func (l *Live) HandOff() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	id := newUUID()
	var all []string
	for _, s := range l.states {
		all = append(all, s.UUID)
	}
	for i, d := range l.disks {
		owner := l.staged[d.Name].Device
		l.states[i].Handoff = &handoff{ID: id, Disks: all, Owner: hex.EncodeToString(owner[:])}
	}
	return l.saveLocked()
}

// TakeBack implements migrate.Ledger.
func (l *Live) TakeBack() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.states {
		l.states[i].Handoff = nil
	}
	return l.saveLocked()
}

// Taken implements migrate.Ledger.
func (l *Live) Taken() error { return nil }

// Complete implements migrate.Ledger.
func (l *Live) Complete() error { return nil }

// Close notes that nobody writes the disks any more.
func (l *Live) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.states[0].Handoff != nil {
		return nil
	}
	for i := range l.states {
		l.states[i].Open = false
	}
	return l.saveLocked()
}

func (l *Live) save() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.saveLocked()
}

func (l *Live) saveLocked() error {
	for i, d := range l.disks {
		if err := save(d.Path, l.states[i]); err != nil {
			return err
		}
	}
	return nil
}
