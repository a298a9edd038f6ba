package identity

import "errors"

// A frozen disk may be sent where no state file can be kept. What its handoff was lies in
// its mark alone then, if it can bear one.

var errAlone = errors.New("the mark at the disk is all that there is")

// recall makes the state of disks that were handed off so from their marks: the owner goes
// on, and no other destination gets them. Which generation they had is not known, so the
// ends compare.
func (l *Ledger) recall() {
	groups := make(map[string][]*entry)
	for _, e := range l.disks {
		if m := e.alone(); m != nil {
			groups[m.ID] = append(groups[m.ID], e)
		}
	}
	for _, group := range groups {
		if len(group) != group[0].alone().Disks {
			continue // judge says that the others are to be given as well
		}
		var members []member
		for _, e := range group {
			members = append(members, member{UUID: firstUUID(e.path, e.now), Name: e.name, Path: e.path})
		}
		for i, e := range group {
			m := e.alone()
			h := m.handoff()
			h.Disks = members
			e.state = &state{UUID: members[i].UUID, Generation: draw(), Disk: e.now, Handoff: h}
			e.state.Disk.ModTime, e.state.Disk.ChangeTime = m.ModTime, 0
			e.lacks = errAlone
		}
	}
}

// alone returns the mark of a disk that has no state file and never had one; nil if there
// is no such mark.
func (e *entry) alone() *mark {
	if e.state != nil || len(e.marks) != 1 || !e.marks[0].Alone || e.marks[0].Staged || e.marks[0].Disks == 0 {
		return nil
	}
	return e.marks[0]
}

// place writes the state file of a disk where there is room for it by now, and returns why
// there is none.
func (k keeper) place(e *entry) error {
	err := k.save(e)
	if err != nil && e.spare != "" && e.where != e.spare && !e.given && k.saveSpare(e) == nil {
		return nil
	}
	return err
}
