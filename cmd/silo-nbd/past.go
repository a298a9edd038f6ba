package main

import (
	"log/slog"
	"slices"

	"github.com/silo-nbd/silo-nbd/internal/identity"
)

// past keeps, in the state files of the disks, whether the destination that is
// connected to has begun to take them: then it is waited for if it does not
// answer, also by a source that has just been started.
type past struct {
	log   *slog.Logger
	at    string // its address; "" if the source listens: then it waits anyway
	files []string
	lacks bool // a disk has none
}

func (p *past) add(file string) {
	p.files = append(p.files, file)
	p.lacks = p.lacks || file == ""
}

// known says whether the destination has begun to take all of them.
func (p *past) known() bool {
	return !p.lacks && p.at != "" && !slices.ContainsFunc(p.files, func(file string) bool {
		at, err := identity.Met(file)
		return err != nil || at != p.at
	})
}

// met keeps that the destination has begun to take them.
func (p *past) met() { p.set(p.at) }

// over keeps that nothing is under way any more.
func (p *past) over() { p.set("") }

func (p *past) set(at string) {
	if p.lacks || p.at == "" {
		return
	}
	for _, file := range p.files {
		if err := identity.SetMet(file, at); err != nil {
			p.log.Warn("if this source is started again, it may not wait for its destination", "state", file, "error", err)
		}
	}
}
