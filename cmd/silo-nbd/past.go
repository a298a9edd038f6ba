package main

import (
	"log/slog"
	"slices"

	"github.com/silo-nbd/silo-nbd/internal/identity"
)

// past keeps, in the state files of the disks, whether a destination has begun
// to take them: then one that does not answer is waited for, also by a source
// that has just been started.
type past struct {
	log   *slog.Logger
	files []string
	lacks bool // a disk has none
}

func (p *past) add(file string) {
	p.files = append(p.files, file)
	p.lacks = p.lacks || file == ""
}

// met says whether one has begun to take all of them.
func (p *past) met() bool {
	return !p.lacks && !slices.ContainsFunc(p.files, func(file string) bool {
		met, err := identity.Met(file)
		return err != nil || !met
	})
}

func (p *past) set(met bool) {
	if p.lacks {
		return
	}
	for _, file := range p.files {
		if err := identity.SetMet(file, met); err != nil {
			p.log.Warn("if this source is started again, it may not wait for its destination", "state", file, "error", err)
		}
	}
}
