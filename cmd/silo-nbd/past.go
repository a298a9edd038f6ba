package main

import (
	"log/slog"

	"github.com/silo-nbd/silo-nbd/internal/identity"
)

// past keeps, in the state files of the disks, whether the destination that is
// connected to has begun to take them: then it is waited for if it does not
// answer, also by a source that has just been started.
type past struct {
	log    *slog.Logger
	at     string // its address; "" if the source listens: then it waits anyway
	ledger *identity.Ledger
}

// known reports whether the destination has begun to take all of them.
func (p *past) known() bool { return p.at != "" && p.ledger.Met() == p.at }

// met keeps that the destination has begun to take them.
func (p *past) met() { p.set(p.at) }

// over keeps that nothing is under way.
func (p *past) over() { p.set("") }

func (p *past) set(at string) {
	if p.at == "" {
		return
	}
	if err := p.ledger.SetMet(at); err != nil {
		p.log.Warn("if this source is started again, it may not wait for its destination", "error", err)
	}
}
