package lives

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/control"
)

const (
	// soon is how long a step waits for what may come or not.
	soon = 60 * time.Millisecond
	// awhile is how long one waits for the end of a move.
	awhile = 250 * time.Millisecond
	// again is how long a destination takes to connect again, and passBound how
	// long a pass of a live disk lasts at least.
	again     = 250 * time.Millisecond
	passBound = 1300 * time.Millisecond
	// sureBound is how long one waits for what has to come.
	sureBound = 30 * time.Second
	slowRate  = "1KiB"
)

// steps are what can happen. Each reports whether it could be made.
var steps map[string]func(r *run, w []string) (bool, error)

func init() {
	steps = map[string]func(r *run, w []string) (bool, error){
		"source": func(r *run, w []string) (bool, error) { return r.startSource(frozen, w) },
		"live":   func(r *run, w []string) (bool, error) { return r.startSource(live, w) },
		"clone":  func(r *run, w []string) (bool, error) { return r.startSource(golden, w) },
		"dest":   (*run).startDest,

		"kill": (*run).kill, "doom": (*run).doom, "term": (*run).term, "power": (*run).power,
		"handoff": (*run).handoff, "abort": (*run).abort, "fast": (*run).fast,
		"await": (*run).await, "finish": (*run).finish,

		"write": (*run).write, "flush": (*run).flush, "read": (*run).read, "killwrite": (*run).killWrite,

		"cut": (*run).cut, "swap": (*run).swap, "stall": (*run).stall, "heal": (*run).heal,

		"killhandoff": (*run).killHandoff, "replace": (*run).replace,

		"snap": (*run).snap, "restore": (*run).restore, "tamper": (*run).tamper,
		"mv": (*run).move, "ln": (*run).hardLink, "sym": (*run).symLink,
		"fill": (*run).fill, "free": (*run).free, "ro": (*run).readOnly, "rw": (*run).readWrite, "inspect": (*run).inspect,
	}
}

// startSource: source|live|clone LABEL HOST FILE[,FILE...] [slow] [auto] [reclaim]
func (r *run) startSource(k kind, w []string) (bool, error) {
	p, err := r.prepare(k, w)
	if p == nil || err != nil {
		return false, err
	}
	for _, n := range p.names {
		if p.host.file(n) == nil {
			return false, nil
		}
	}
	if p.port, err = r.port(p.host.name + p.names[0][1:]); err != nil {
		return false, err
	}
	for _, q := range r.procs {
		if q.running() && q.kind != dest && q.port == p.port {
			return false, nil
		}
	}
	var args []string
	if slices.Contains(w, "slow") {
		args = append(args, "--rate", slowRate)
	}
	if p.auto = k == live && slices.Contains(w, "auto"); p.auto {
		args = append(args, "--handoff", "auto")
	}
	before := map[string][]token{}
	if p.reclaim = slices.Contains(w, "reclaim"); p.reclaim {
		args = append(args, "--force-reclaim")
		for _, n := range p.names {
			if before[n], err = p.host.contents(n); err != nil {
				return false, err
			}
		}
	}
	if err := r.launch(p, args...); err != nil {
		return true, err
	}
	if p.hasEnded() {
		return true, nil
	}
	if err := r.ends(); err != nil { // of those that had the disks before
		return true, err
	}
	for _, e := range p.disks {
		l := e.file.line
		if l == nil {
			continue
		}
		if e.file.loose && l.owner != e.file && !p.host.knows(e.as) {
			have, err := p.host.contents(e.as)
			if err != nil {
				return true, err
			}
			l = newLine(r.nextLine(), have)
			l.owner, e.file.line, e.file.whole = e.file, l, true
		}
		if k != golden && p.host.ro && !exists(p.host.path(p.host.real(e.as))+stateSuffix) {
			l = r.nameless(e.file)
		}
		if p.reclaim {
			r.weird = true
			r.doubt(e.file)
			r.reclaimed(e, before[e.as])
			l = e.file.line
		}
		r.weird = r.weird || k == golden && r.received(e.file) // that is refused if the disk is served live again
		if l.owner == e.file && k != golden {
			l.offered = true
			l.sure = l.sure && k == live
		}
	}
	// Destinations that wait for it go on.
	within(again, func() bool { return p.hasEnded() || p.out.has("msg=sending") || !r.awaited(p) })
	return true, nil
}

// nameless is a disk whose identity cannot be kept: for each process it is another one.
func (r *run) nameless(f *file) *line {
	l := f.line
	if l.owner != f && l.owner != nil && f.host.knows(f.host.namesOf(f)[0]) {
		return l
	}
	if l.owner == f {
		l.owner, l.offered = nil, true // whoever the last process has met
	}
	f.line = l.clone(r.nextLine())
	f.line.owner = f
	return f.line
}

// awaited reports whether a destination waits for a source.
func (r *run) awaited(s *process) bool {
	for _, p := range r.procs {
		if p.kind == dest && p.port == s.port && p.running() {
			return true
		}
	}
	return false
}

// prepare makes a process of LABEL HOST FILES.
func (r *run) prepare(k kind, w []string) (*process, error) {
	if len(w) < 3 {
		return nil, nil
	}
	h := r.host(w[1])
	for _, p := range r.procs {
		if p.label == w[0] {
			return nil, nil
		}
	}
	if h == nil {
		return nil, nil
	}
	return &process{label: w[0], kind: k, host: h, names: strings.Split(w[2], ","), met: map[*process]bool{}}, nil
}

// reclaimed ends what was known of a disk that is taken back: it goes on as it
// was here, and what has been its owner is a disk of its own.
func (r *run) reclaimed(e *export, contents []token) {
	f, l := e.file, e.file.line
	e.file.host.noted[e.file.host.real(e.as)] = false
	f.noted, f.gone = false, false
	if l.owner == f || contents == nil {
		return
	}
	if o := l.owner; o != nil {
		o.line = l.clone(r.nextLine())
		o.line.owner, o.line.seen = o, l.seen
	}
	for _, s := range f.host.snaps {
		s.ended = s.ended || s.of == l // what it notes has ended
	}
	l.cur, l.open, l.unflushed, l.owner, l.offered, l.tampered = contents, map[int][]token{}, map[int][]token{}, f, false, false
	f.local, f.whole = map[int]bool{}, true
}

// startDest: dest LABEL HOST FILE[,FILE...] PORT [overwrite]
func (r *run) startDest(w []string) (bool, error) {
	p, err := r.prepare(dest, w)
	if p == nil || err != nil || len(w) < 4 {
		return false, err
	}
	if p.port, err = r.port(w[3]); err != nil {
		return false, err
	}
	var args []string
	if p.overwrite = slices.Contains(w, "overwrite"); p.overwrite {
		for _, n := range p.names {
			// What has no other copy is not given up.
			f := p.host.file(n)
			if f != nil && !r.mayLose(f) {
				return false, nil
			}
			if f != nil {
				r.leave(f)
			}
		}
		args = append(args, "--overwrite")
	}
	source := r.awaitedAt(p.port)
	if err := r.launch(p, args...); err != nil {
		return true, err
	}
	bound := soon
	if source == nil {
		bound = 10 * time.Millisecond // what it has it serves
	}
	within(bound, func() bool {
		p.look()
		ready := true
		for _, e := range p.disks {
			ready = ready && e.ready
		}
		return ready || p.hasEnded()
	})
	return true, nil
}

// mayLose reports whether a file may be overwritten: it is not an owner, nor
// what the owner lacks something of.
func (r *run) mayLose(f *file) bool {
	l := f.line
	if l == nil {
		return true
	}
	if l.owner == f || r.inUse(f) {
		return false
	}
	return l.owner == nil || r.holds(l.owner) == ""
}

func (r *run) awaitedAt(at *port) *process {
	for _, p := range r.procs {
		if p.kind != dest && p.port == at && p.running() {
			return p
		}
	}
	return nil
}

// kill: kill LABEL
func (r *run) kill(w []string) (bool, error) {
	p := r.proc(w[0])
	if p == nil {
		return false, nil
	}
	r.killed(p, false)
	return true, nil
}

// killed ends a process and notes what may be lost.
func (r *run) killed(p *process, power bool) {
	_ = r.attach(p) // what it has said counts
	p.kill()
	r.crashed(p, power)
}

func (r *run) crashed(p *process, power bool) {
	for _, e := range p.disks {
		if f := e.file; f != nil && f.line != nil && f.line.owner == f && (power || p.kind == dest && !r.killKeeps) {
			f.crashed()
		}
	}
}

// doom: doom LABEL MS: the process is killed in the middle of what comes next.
func (r *run) doom(w []string) (bool, error) {
	p := r.proc(w[0])
	if p == nil || p.doomed {
		return false, nil
	}
	ms, _ := strconv.Atoi(w[1])
	p.doomed = true
	r.unsure(p)
	time.AfterFunc(time.Duration(ms)*time.Millisecond, func() { _ = p.cmd.Process.Kill() }) // it may have ended by itself
	return true, nil
}

// term: term LABEL
func (r *run) term(w []string) (bool, error) {
	p := r.proc(w[0])
	if p == nil {
		return false, nil
	}
	_ = r.attach(p) // what it has said counts
	if !p.terminate() {
		return true, violatedf("hang", "%s does not end %v after SIGTERM", p.label, endBound)
	}
	return true, nil
}

// power: power HOST
func (r *run) power(w []string) (bool, error) {
	h := r.host(w[0])
	for _, p := range r.procs {
		if p.host == h && p.running() {
			r.killed(p, true)
		}
	}
	for _, f := range h.files {
		if f.line != nil && f.line.owner == f {
			f.crashed()
		}
	}
	return true, empty(h.run)
}

// handoff: handoff LABEL
func (r *run) handoff(w []string) (bool, error) {
	p := r.proc(w[0])
	if p == nil || p.kind != live || p.pending != nil {
		return false, nil
	}
	r.unsure(p)
	done := make(chan error, 1)
	go func() {
		done <- p.steer(sureBound, func(ctx context.Context, c *control.Client) error { return c.Handoff(ctx) })
	}()
	t := time.NewTimer(soon)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
		p.pending = done
	}
	return true, nil
}

// unsure notes that a process may hand off its disks.
func (r *run) unsure(p *process) {
	for _, e := range p.disks {
		if e.file != nil && e.file.line != nil {
			e.file.line.sure = false
		}
	}
}

// leave notes, before a file is written over, that a source of its line may end with 0
// from now on, if the file holds all: it may have said so already.
func (r *run) leave(f *file) {
	if f.line == nil || !f.dest || f.line.owner != f && (!f.line.offered || f.line.sure) || r.holds(f) != "" {
		return
	}
	for _, h := range r.hosts {
		for _, o := range h.files {
			if o != f && o.line == f.line {
				o.gone = true
			}
		}
	}
}

// doubt ends the run if a file that seems to be the owner may have been handed
// off without being seen, since what is done to it now means another thing then.
func (r *run) doubt(f *file) {
	l := f.line
	if l == nil || l.owner != f || l.sure || !l.offered {
		return
	}
	for _, h := range r.hosts {
		for _, o := range h.files {
			r.over = r.over || o != f && o.line == l && o.dest
		}
	}
}

// killHandoff: killhandoff LABEL SEED: the source is killed in the handoff.
func (r *run) killHandoff(w []string) (bool, error) {
	p := r.proc(w[0])
	if p == nil || p.kind != live || p.pending != nil {
		return false, nil
	}
	r.unsure(p)
	seed, _ := strconv.ParseUint(w[1], 10, 64)
	time.AfterFunc(time.Duration(seed%20)*time.Millisecond, func() { _ = p.cmd.Process.Kill() })
	_ = p.steer(answerBound, func(ctx context.Context, c *control.Client) error { return c.Handoff(ctx) }) // it dies
	r.killed(p, false)
	return true, nil
}

// abort: abort LABEL
func (r *run) abort(w []string) (bool, error) {
	p := r.proc(w[0])
	if p == nil || p.kind != live {
		return false, nil
	}
	_ = p.steer(answerBound, func(ctx context.Context, c *control.Client) error { return c.Abort(ctx) }) // it may be too late
	return true, nil
}

// fast: fast LABEL
func (r *run) fast(w []string) (bool, error) {
	p := r.proc(w[0])
	if p == nil || p.kind == dest {
		return false, nil
	}
	_ = p.steer(answerBound, func(ctx context.Context, c *control.Client) error { // it may be about to end
		_, err := c.SetRate(ctx, 0)
		return err
	})
	return true, nil
}

// await: await LABEL [pass]: until all is there; pass gives a live disk time for another pass.
func (r *run) await(w []string) (bool, error) {
	p := r.proc(w[0])
	if p == nil {
		return false, nil
	}
	bound := awhile
	if slices.Contains(w, "pass") {
		bound = passBound
	}
	within(bound, func() bool {
		r.poll()
		for _, q := range r.procs {
			if q.pending != nil && q.running() {
				return p.settled(0)
			}
		}
		return p.settled(0) || p.hasAll()
	})
	return true, nil
}

// hasAll reports whether nothing is missing as things are, as the process knows.
func (p *process) hasAll() bool {
	all := false
	_ = p.steer(answerBound, func(ctx context.Context, c *control.Client) error { // it may have ended
		st, err := c.Status(ctx)
		all = err == nil && len(st.Disks) == len(p.disks)
		for _, d := range st.Disks {
			all = all && d.Done == d.Size && d.Connected
		}
		return err
	})
	return all
}

// finish: finish SOURCE DEST: a move that nothing keeps from its end comes to it.
func (r *run) finish(w []string) (bool, error) {
	s, d := r.proc(w[0]), r.proc(w[1])
	if s == nil || d == nil || s.doomed || d.doomed || r.weird || s.port != d.port || len(s.disks) != len(d.disks) || s.kind == golden {
		return false, nil
	}
	d.look()
	for _, p := range r.procs {
		if p != d && p.kind == dest && p.port == d.port && p.running() {
			return false, nil // it may be the one
		}
	}
	for i, e := range d.disks {
		for _, h := range r.hosts {
			for _, o := range h.files {
				if o != e.file && o != s.disks[i].file && o.dest && o.line == s.disks[i].file.line {
					return false, nil // it may belong to that one
				}
			}
		}
		if !e.ready || e.file == nil || e.file.line != s.disks[i].file.line {
			return false, nil
		}
	}
	if made, err := r.fast(w); !made || err != nil {
		return made, err
	}
	if s.kind == live && s.disks[0].file.line.owner == s.disks[0].file {
		if !within(sureBound, func() bool {
			if s.hasEnded() {
				return true
			}
			time.Sleep(10 * time.Millisecond)
			return s.steer(answerBound, handOffToConnected) == nil
		}) {
			return true, violatedf("hang", "%s cannot be handed off to %s", s.label, d.label)
		}
	}
	if !d.settled(sureBound) || !s.settled(sureBound) {
		return true, violatedf("hang", "the move from %s to %s does not come to its end within %v", s.label, d.label, sureBound)
	}
	return true, nil
}

// handOffToConnected hands off to the destination that is connected, also if several
// have been.
func handOffToConnected(ctx context.Context, c *control.Client) error {
	st, err := c.Status(ctx)
	if err != nil {
		return err
	}
	to := ""
	if len(st.Disks) > 0 && st.Disks[0].Destination != nil {
		to = st.Disks[0].Destination.Device
	}
	return c.HandoffWith(ctx, control.HandoffArguments{To: to})
}

// cut: cut PORT
func (r *run) cut(w []string) (bool, error) {
	p := r.ports[w[0]]
	if p != nil {
		p.cut()
	}
	return p != nil, nil
}

// swap: swap PORT: the connection that is used is cut, and those that wait are not.
func (r *run) swap(w []string) (bool, error) {
	p := r.ports[w[0]]
	if p != nil {
		p.swap()
	}
	return p != nil, nil
}

// stall: stall PORT; heal: heal PORT
func (r *run) stall(w []string) (bool, error) {
	p := r.ports[w[0]]
	if p != nil {
		p.stall(true)
		r.weird = true
	}
	return p != nil, nil
}

func (r *run) heal(w []string) (bool, error) {
	p := r.ports[w[0]]
	if p != nil {
		p.stall(false)
	}
	return p != nil, nil
}

// stopped calls do while nothing on a host runs.
func (r *run) stopped(h *host, do func() error) error {
	for _, p := range r.procs {
		if p.host == h && p.running() {
			_ = p.cmd.Process.Signal(syscall.SIGSTOP) // it may have ended
			defer p.cmd.Process.Signal(syscall.SIGCONT)
			if !within(endBound, p.stands) {
				return violatedf("hang", "%s does not stand still", p.label)
			}
		}
	}
	return do()
}

// fill: fill HOST; free: free HOST
func (r *run) fill(w []string) (bool, error) {
	h := r.host(w[0])
	if !h.mounted || h.stuck() {
		return false, nil
	}
	r.weird = true
	return true, h.fill()
}

func (r *run) free(w []string) (bool, error) {
	h := r.host(w[0])
	if !h.full || h.ro {
		return false, nil
	}
	return true, h.free()
}

// ro: ro HOST: the file system is for reading only; rw: rw HOST
func (r *run) readOnly(w []string) (bool, error) {
	h := r.host(w[0])
	if !h.mounted || h.ro {
		return false, nil
	}
	r.weird = true
	return h.remount(true) == nil, nil // not while something is written
}

func (r *run) readWrite(w []string) (bool, error) {
	h := r.host(w[0])
	if !h.ro {
		return false, nil
	}
	return true, h.remount(false)
}
