package identity

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
)

// set is the disks of a source.
type set []*entry

// judge finds out whether the disks were handed off: all of them, or none. What
// is noted counts against the disks that the note names, and not against those
// that were given.
func (s set) judge(o Options) (gone, finished bool, err error) {
	for _, e := range s {
		if e.kin == kinForeign && !o.Moved {
			return false, false, e.foreign()
		}
	}
	if o.Reclaim {
		return false, false, nil
	}
	var away []*entry
	for _, e := range s {
		is, err := s.away(e)
		if err != nil {
			return false, false, err
		}
		if is {
			away = append(away, e)
		}
	}
	if len(away) == 0 {
		return false, false, nil
	}
	if err := s.together(away); err != nil {
		return false, false, err
	}
	finished, err = s.mayGoOn(o)
	return true, finished, err
}

// foreign says that a state file is another disk's.
func (e *entry) foreign() error {
	was := ""
	if e.state.Path != "" {
		was = fmt.Sprintf(" %s", e.state.Path)
	}
	return fmt.Errorf("%s is the state file of another disk%s (%d bytes, inode %d), not of %s (%d bytes, inode %d): nothing was changed: "+
		"give the right one with --state, or, if the disk was moved here, --disk-moved",
		e.where, was, e.state.Disk.Size, e.state.Disk.Inode, e.disk.Path(), e.now.Size, e.now.Inode)
}

// away reports whether a disk was handed off, and its handoff was published. An
// error says that it may have been, or that it cannot be told from the disks
// that were given.
func (s set) away(e *entry) (bool, error) {
	h, _, _ := e.standing()
	switch {
	case h == nil:
		return false, nil
	case e.state == nil || e.state.Handoff == nil:
		// Only the disk itself says so: its state file is elsewhere, or older.
		n := e.note()
		if e.state != nil {
			return false, fmt.Errorf("%w; its state file %s does not know of it: bring the right one back, or take the disk back with --force-reclaim, which gives up what was written there", n.Err(), e.where)
		}
		where := n.State
		if where == "" {
			where = "where it lies now"
		}
		return false, fmt.Errorf("%w; there is no state file at %s: name it with --state, as in --state %s, or take the disk back with --force-reclaim, which gives up what was written there", n.Err(), e.where, where)
	}
	return s.all(e, h)
}

// all reports whether all disks of a handoff say so. After a power cut in
// the middle of one some may not: then it was never published, and a disk that
// does not say so must prove it by knowing of the handoff.
func (s set) all(e *entry, h *handoff) (bool, error) {
	var missing []string
	half := false
	for _, m := range h.Disks {
		other := s.member(m.UUID)
		switch {
		case other == nil:
			missing = append(missing, m.label())
			continue
		case other.state.Handoff != nil && other.state.Handoff.ID == h.ID:
			continue
		}
		switch how := other.state.knows(h.ID); how {
		case endAborted:
			half = true
		case "":
			return false, fmt.Errorf("%s %w, together with %s, whose state file %s does not know of it: was that restored from a backup? "+
				"Bring the right one back, or take both disks back with --force-reclaim, which gives up what was written there",
				e.disk.Path(), ErrHandedOff, other.disk.Path(), other.where)
		default:
			return false, fmt.Errorf("%s %w, together with %s, which is this host's again (%s): take this one back as well, with --force-reclaim, or leave it out",
				e.disk.Path(), ErrHandedOff, other.disk.Path(), how)
		}
	}
	if len(missing) > 0 {
		return false, fmt.Errorf("%s %w, together with %s: give all of them", e.disk.Path(), ErrHandedOff, strings.Join(missing, ", "))
	}
	return !half, nil
}

// member is the given disk with a UUID; nil if it was not given.
func (s set) member(uuid string) *entry {
	i := slices.IndexFunc(s, func(e *entry) bool { return e.state != nil && e.state.UUID == uuid })
	if i < 0 {
		return nil
	}
	return s[i]
}

// together says why disks that were handed off cannot be given with the others.
func (s set) together(away []*entry) error {
	var groups []string
	group := make(map[string][]string)
	for _, e := range away {
		h, _, _ := e.standing()
		if group[h.ID] == nil {
			groups = append(groups, h.ID)
		}
		group[h.ID] = append(group[h.ID], e.disk.Path())
	}
	if len(groups) == 1 && len(away) == len(s) {
		return nil
	}
	var parts []string
	for _, id := range groups {
		parts = append(parts, strings.Join(group[id], " and "))
	}
	var rest []string
	for _, e := range s {
		if !slices.Contains(away, e) {
			rest = append(rest, e.disk.Path())
		}
	}
	if len(rest) > 0 {
		parts = append(parts, strings.Join(rest, " and ")+", which is this host's")
	}
	return fmt.Errorf("%s %w: start a source for each of these: %s", away[0].disk.Path(), ErrHandedOff, strings.Join(parts, "; "))
}

// mayGoOn says why disks that were handed off cannot be sent on by this command.
func (s set) mayGoOn(o Options) (finished bool, err error) {
	finished = true
	for _, e := range s {
		h, _, _ := e.standing()
		finished = finished && h.Complete
	}
	if finished {
		return true, errors.Join(s.elsewhere(o), s.replaced())
	}
	for _, e := range s {
		h, _, _ := e.standing()
		const back = "take the disk back with --force-reclaim, which gives up what was written there"
		switch {
		case o.Live && h.Frozen:
			return false, fmt.Errorf("%s %w: its move is under way, to device %s: let the source go on without --nbd, or %s", e.disk.Path(), ErrHandedOff, h.Owner, back)
		case !o.Live && !h.Frozen:
			return false, fmt.Errorf("%s %w: let the source go on with --nbd as before, or %s", e.disk.Path(), ErrHandedOff, back)
		}
	}
	return false, nil
}

// elsewhere says why a destination that is named now gets nothing, although the one that
// the disks were handed off to has everything.
func (s set) elsewhere(o Options) error {
	for _, e := range s {
		h, _, _ := e.standing()
		if h.At == o.At {
			continue
		}
		had, now := "at "+h.At, "the one at "+o.At
		if h.At == "" {
			had = "that had connected to the source"
		}
		if o.At == "" {
			now = "one that connects now"
		}
		return fmt.Errorf("%s %w: device %s, %s, has all of it; %s may be another, and gets nothing: use the disk where it is, "+
			"or take it back with --force-reclaim; an image that is to go to several destinations wants --clone from the start",
			e.disk.Path(), ErrHandedOff, h.Owner, had, now)
	}
	return nil
}

// replaced says why the destination does not have what is here now, although it has
// everything that was handed off. A disk that was renamed, or has another owner or
// mode, is the same.
func (s set) replaced() error {
	for _, e := range s {
		was, now := e.state.Disk, e.now
		was.ChangeTime, now.ChangeTime = 0, 0
		rebooted := now.Block && was.BootID != now.BootID // the count of sectors begins anew
		was.BootID = now.BootID
		if was.Birth != 0 {
			was.Dev = now.Dev // a file system may get another number when it is mounted again
		}
		if was == now || rebooted && e.kin == kinSame {
			continue
		}
		return fmt.Errorf("%w: the destination has all of it as it was then, but what is here now was written or replaced since, and was not sent: "+
			"take the disk back with --force-reclaim to send it as it is", e.note().Err())
	}
	return nil
}

// published returns the disks whose state file says that they were handed off, and
// the others.
func (s set) published() (those, others set) {
	for _, e := range s {
		if e.published() {
			those = append(those, e)
		} else {
			others = append(others, e)
		}
	}
	return those, others
}

func (s set) names(which func(e *entry) bool) (names []string) {
	for _, e := range s {
		if which(e) {
			names = append(names, e.name)
		}
	}
	return names
}

func (s set) unlock() error {
	var errs []error
	for _, e := range s {
		if e.lock != nil {
			errs = append(errs, e.lock.Close())
			e.lock = nil
		}
	}
	return errors.Join(errs...)
}

// entry finds a disk by its name.
func (s set) entry(disk string) *entry {
	for _, e := range s {
		if e.name == disk {
			return e
		}
	}
	return nil
}

func (s set) members() []member {
	all := make([]member, len(s))
	for i, e := range s {
		all[i] = member{UUID: e.state.UUID, Name: e.name, Path: e.path}
	}
	return all
}

func dirOf(path string) string { return filepath.Dir(path) }
