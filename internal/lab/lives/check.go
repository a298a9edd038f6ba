package lives

import (
	"errors"
	"strings"
	"syscall"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
)

const (
	// startBound, endBound and answerBound are for a machine that is busy with
	// much else: whatever reaches one hangs.
	startBound  = 20 * time.Second
	endBound    = 20 * time.Second
	answerBound = 20 * time.Second
	// grace is how long a write is waited for that may have to wait.
	grace = 4 * time.Millisecond
)

// check holds what the processes do against the model.
func (r *run) check() error {
	for _, p := range r.procs {
		if err := r.attach(p); err != nil {
			return err
		}
	}
	if err := r.probe(); err != nil {
		return err
	}
	if err := r.ends(); err != nil {
		return err
	}
	for _, p := range r.procs {
		for _, e := range p.disks {
			if err := r.readBack(p, e); err != nil {
				return err
			}
		}
	}
	return nil
}

// attach notes what a destination has begun to receive.
func (r *run) attach(p *process) error {
	if p.kind != dest || p.seen {
		return nil
	}
	p.look()
	for _, e := range p.disks {
		if e.ready && !e.begun && e.file != nil {
			e.begun = true
			e.file.life, e.file.clean = r.nextLife(), false
		}
		if e.ready && !e.fresh && !e.file.dest {
			return violatedf("takeover", "%s serves %s, which was never received", p.label, e.as)
		}
		if !e.ready || !e.fresh {
			continue
		}
		s, src := r.sourceOf(p, e.name)
		if src == nil {
			continue
		}
		e.fresh = false
		f := p.host.file(e.as)
		if f == nil {
			f = &file{}
			p.host.files[p.host.real(e.as)] = f
		}
		of := src.line
		*f = file{host: p.host, line: of, dest: true, life: r.nextLife()}
		e.begun = true
		if s.kind == golden {
			f.line = of.clone(r.nextLine())
			f.line.owner, f.local = f, map[int]bool{}
		}
		p.host.noted[p.host.real(e.as)] = false
		e.file = f
	}
	return nil
}

// sourceOf is the source from which a destination receives a disk, and the file that it
// has of it: the one that runs, or the last that may have met the destination.
func (r *run) sourceOf(d *process, disk string) (last *process, of *file) {
	for _, p := range r.procs {
		if p.kind == dest || p.port != d.port || p.seen && !p.met[d] {
			continue
		}
		for _, e := range p.disks {
			if e.name == disk && e.file != nil && e.file.line != nil && (last == nil || last.seen) {
				last, of = p, e.file
			}
		}
	}
	return last, of
}

// probe finds out which processes answer writes, and that no two do for a line.
func (r *run) probe() error {
	type answering struct {
		p *process
		e *export
	}
	accepting := map[*line][]answering{}
	for _, p := range r.procs {
		for _, e := range p.disks {
			if !r.accepts(p, e) {
				continue
			}
			f := e.file
			if f == nil || f.line == nil {
				continue // a race with its first word
			}
			if err := r.owns(p, e); err != nil {
				return err
			}
			if !e.accepts {
				continue
			}
			f.line.sure = p.pending == nil && !p.auto
			accepting[f.line] = append(accepting[f.line], answering{p, e})
		}
	}
	for l, all := range accepting {
		if len(all) < 2 {
			continue
		}
		// One may have stopped before the other began: both are asked again.
		var still []string
		for range 2 {
			still = nil
			for _, a := range all {
				if r.accepts(a.p, a.e) {
					still = append(still, a.p.label)
				}
			}
		}
		if len(still) > 1 {
			return violatedf("two-owners", "of line %d: %s answer writes", l.id, strings.Join(still, " and "))
		}
	}
	return nil
}

// accepts reports whether an export answers a write.
func (r *run) accepts(p *process, e *export) bool {
	was := e.accepts
	e.accepts = false
	if p.hasEnded() || !p.connect(e) {
		return false
	}
	if e.probe == nil {
		t := r.nextToken()
		conn, done := e.conn, make(chan error, 1)
		s := len(r.contents(e.name)) - 1 - int(uint64(t)%2)
		go func() {
			var b [sector]byte
			fill(b[:], s, t)
			_, err := conn.WriteAt(b[:], int64(s)*sector)
			done <- err
		}()
		e.probe = done
	}
	bound := grace
	if was && p.pending == nil && !p.doomed {
		bound = answerBound // it is live, and a write waits for nothing
	}
	timer := time.NewTimer(bound)
	defer timer.Stop()
	select {
	case err := <-e.probe:
		e.probe = nil
		var no *nbdclient.Error
		switch {
		case err == nil:
			e.accepts = true
		case errors.As(err, &no):
			// No room is no end: it is the owner still.
			e.accepts = no.Errno == syscall.ENOSPC
		default:
			e.conn.Close() // it has ended already
			e.conn = nil
		}
		return e.accepts
	case <-timer.C:
		return false
	}
}

// owns notes that a process answers writes, and looks whether it may.
func (r *run) owns(p *process, e *export) error {
	f := e.file
	e.answered = true
	if f.line.owner != f && p.kind == dest {
		r.follow(p, e)
		r.becomeCopy(p, e)
	}
	l := f.line
	l.seen = true
	if l.owner == f || r.over {
		return nil
	}
	if l.goesOn(f) {
		return nil
	}
	if !l.offered {
		// It may have answered before it was asked whether it does.
		if e.conn != nil && !r.accepts(p, e) {
			return nil
		}
		return violatedf("takeover", "%s answers writes of %s (line %d), but %s is the owner and has not handed it off",
			p.label, e.as, l.id, r.ownerName(l))
	}
	if o := l.owner; o != nil {
		o.local = nil
	}
	if o := l.owner; o != nil && !o.host.ro {
		o.noted = true
		for _, n := range o.host.namesOf(o) {
			o.host.noted[n] = true
		}
	}
	l.owner, l.offered = f, false
	f.local, f.gone = map[int]bool{}, false
	return nil
}

// follow lets a destination that was in standby go with the source that it has now:
// that may have another line of the disk, such as a copy of it, and then the
// destination has nothing of the one before.
func (r *run) follow(p *process, e *export) {
	f := e.file
	for _, s := range r.procs {
		if s.kind == dest || s.port != p.port || s.seen {
			continue
		}
		for _, o := range s.disks {
			if o.name != e.name || o.file.line == nil || o.file.line == f.line || !o.file.line.offered {
				continue
			}
			switch {
			case f.line.sure, s.kind == live && !r.accepts(s, o):
				f.line = o.file.line
			case s.kind != live:
				r.over = true // either of the two may have been handed off
			}
			return
		}
	}
}

// becomeCopy lets a destination that was in standby go on as a copy of its own if its
// source serves the disk as a golden image now.
func (r *run) becomeCopy(p *process, e *export) {
	f := e.file
	if s, of := r.sourceOf(p, e.name); s != nil && s.kind == golden && of != f && of.line == f.line {
		f.line = f.line.clone(r.nextLine())
		f.line.owner, f.local = f, map[int]bool{}
	}
}

func (r *run) ownerName(l *line) string {
	if l.owner == nil {
		return "nothing"
	}
	return l.owner.host.name + " " + strings.Join(l.owner.host.namesOf(l.owner), "=")
}

// readBack reads what was written where it was written, over NBD.
func (r *run) readBack(p *process, e *export) error {
	f := e.file
	if f == nil || f.line == nil || f.line.owner != f || !e.accepts || p.hasEnded() || e.conn == nil || p.pending != nil {
		return nil
	}
	for s := range f.local {
		var b [sector]byte
		conn := e.conn
		err, ok := answer(answerBound, func() error {
			_, err := conn.ReadAt(b[:], int64(s)*sector)
			return err
		})
		if !ok {
			return violatedf("hang", "%s does not answer a read of sector %d, which was written there", p.label, s)
		}
		if err != nil {
			return nil // it is about to end, which is looked at
		}
		if got := name(b[:], s); !f.line.may(s, got, true) {
			return violatedf("lost", "%s: sector %d of %s holds %s, want %s, which was acknowledged", p.label, s, e.as, got, f.line.cur[s])
		}
	}
	return nil
}

// claims holds what a process has said of success against what is there.
func (r *run) claims(p *process) error {
	said := p.out.String()
	if err := r.attach(p); err != nil { // what it has said first counts first
		return err
	}
	if strings.Contains(said, "\npanic: ") || strings.Contains(said, "fatal error: ") || strings.Contains(said, "DATA RACE") {
		return violatedf("crash", "%s has crashed", p.label)
	}
	if p.kind == dest && !p.claimed && strings.Contains(said, "the source is not needed any more") {
		p.claimed = true
		for _, e := range p.disks {
			if err := r.complete(p, e, "has said that it is complete"); err != nil {
				return err
			}
		}
	}
	if p.seen || !p.hasEnded() {
		return nil
	}
	for _, d := range r.procs {
		if p.kind != dest && d.kind == dest && d.port == p.port && !d.seen {
			p.met[d] = true
		}
	}
	p.seen = true
	p.close()
	if p.doomed && p.code() < 0 && !p.killed {
		p.killed = true
		r.crashed(p, false)
	}
	if !p.killed && !p.told && p.code() != 0 {
		for _, e := range p.disks {
			if f := e.file; e.answered && f != nil && f.line != nil && f.line.owner == f && !f.line.rolledBack {
				return violatedf("outage", "%s has ended by itself with %d, and was the owner of %s", p.label, p.code(), e.as)
			}
		}
	}
	if p.kind != dest {
		p.port.lead("")
		if p.killed || p.code() != 0 || p.kind == golden {
			return nil
		}
		return r.sourceDone(p)
	}
	for _, e := range p.disks {
		if f := e.file; !p.killed && f != nil && e.begun {
			f.life, f.clean = r.nextLife(), true
		}
	}
	if !p.killed && p.code() == 0 {
		for _, e := range p.disks {
			if err := r.complete(p, e, "has ended with 0"); err != nil {
				return err
			}
		}
	}
	return nil
}

// complete looks whether a destination's disk is all that it should be.
func (r *run) complete(p *process, e *export, what string) error {
	f := e.file
	if f == nil {
		f = p.host.file(e.as)
	}
	if f == nil || f.line == nil {
		return violatedf("false-success", "%s %s, but has received nothing of %s", p.label, what, e.as)
	}
	if diff := r.holds(f); diff != "" && !r.followed(f) {
		return violatedf("false-success", "%s %s, but %s is not line %d: %s", p.label, what, e.as, f.line.id, diff)
	}
	f.whole, f.life = true, r.nextLife()
	for _, h := range r.hosts {
		for _, o := range h.files {
			if o != f && o.line == f.line {
				o.gone = true // a source of it may end with 0, also later
			}
		}
	}
	return nil
}

// followed reports whether a destination's disk is, but for what was written there, that
// of a source with other contents: all that had come was compared with these, and was
// equal. Then its line goes on with them.
func (r *run) followed(f *file) bool {
	all := f.host.namesOf(f)
	if len(all) == 0 {
		return false
	}
	have, err := f.host.contents(all[0])
	if err != nil {
		return false
	}
	for _, h := range r.hosts {
		for _, o := range h.files {
			if o == f || o.line == nil || o.line == f.line || !f.isLike(o.line, have) {
				continue
			}
			for s, t := range have {
				f.line.cur[s] = t
				delete(f.line.open, s)
				delete(f.line.unflushed, s)
			}
			o.gone = true
			return true
		}
	}
	return false
}

// isLike reports whether have holds what was written to the file, and is l elsewhere.
func (f *file) isLike(l *line, have []token) bool {
	if len(have) != len(l.cur) || len(have) != len(f.line.cur) {
		return false
	}
	for s, t := range have {
		from := l
		if f.local[s] {
			from = f.line
		}
		if !from.may(s, t, false) {
			return false
		}
	}
	return true
}

// holds says what a file lacks of its line; empty if nothing.
func (r *run) holds(f *file) string {
	all := f.host.namesOf(f)
	if len(all) == 0 {
		return "it has no name any more"
	}
	have, err := f.host.contents(all[0])
	if err != nil {
		return err.Error()
	}
	return f.line.differs(have)
}

// sourceDone looks whether all of a source's disks are elsewhere, which has
// ended with 0.
func (r *run) sourceDone(p *process) error {
	for _, e := range p.disks {
		f := e.file
		if f.gone {
			continue
		}
		l := f.line
		for _, h := range r.hosts {
			for _, o := range h.files {
				_ = o.line == l && l.goesOn(o) // its source ends only with the owner
			}
		}
		if l.owner != f {
			if diff := r.holds(l.owner); diff != "" {
				return violatedf("false-success", "%s has ended with 0, but the owner of %s, %s, lacks something: %s", p.label, e.as, r.ownerName(l), diff)
			}
			f.gone = true
			continue
		}
		found := false
		for _, h := range r.hosts {
			for _, o := range h.files {
				// Of a host that was rolled back the disk may go on to its owner: then
				// that is another line, and holds all of its own.
				if o != f && o.line != nil && o.dest && (o.line == l || o.whole && len(o.line.cur) == len(l.cur)) && r.holds(o) == "" {
					found = true
				}
				if o != f && o.line != nil && o.dest && o.line != l && r.followed(o) && f.gone {
					found = true
				}
			}
		}
		if !found {
			return violatedf("false-success", "%s has ended with 0, but %s is not complete anywhere else, and was not handed off", p.label, e.as)
		}
	}
	return nil
}
