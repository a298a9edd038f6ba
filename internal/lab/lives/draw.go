package lives

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
)

// drawer draws the steps of a run: those of a story, with others between them
// and behind them.
type drawer struct {
	rnd    *rand.Rand
	story  []string
	more   int // how many steps follow the story
	labels int
	snaps  []string // "HOST ID FILE"
	last   []string // closing steps, when all else has been drawn
	closed bool
}

func newDrawer(seed uint64) *drawer {
	d := &drawer{rnd: rand.New(rand.NewPCG(seed, 4))}
	if d.rnd.IntN(4) > 0 {
		if s := stories[d.rnd.IntN(len(stories))]; s.open == "" {
			d.story = slices.Clone(s.steps)
		}
	}
	d.more = 1 + d.rnd.IntN(5)
	if d.story == nil {
		d.more += 8
	}
	return d
}

// next is the next step; empty when there is none.
func (d *drawer) next(r *run) string {
	for {
		switch {
		case len(d.story) > 0:
			if d.rnd.IntN(5) == 0 {
				return d.draw(r)
			}
			s := d.story[0]
			d.story = d.story[1:]
			if d.rnd.IntN(12) == 0 {
				continue // left out
			}
			return s
		case d.more > 0:
			d.more--
			return d.draw(r)
		case !d.closed:
			d.closed = true
			d.last = d.closing(r)
		case len(d.last) > 0:
			s := d.last[0]
			d.last = d.last[1:]
			return s
		default:
			return ""
		}
	}
}

// closing are the steps that look at what has become of it all.
func (d *drawer) closing(r *run) (all []string) {
	for _, s := range r.procs {
		for _, p := range r.procs {
			if s.kind != dest && p.kind == dest && s.port == p.port && s.running() && p.running() {
				all = append(all, "finish "+s.label+" "+p.label)
			}
		}
	}
	for _, p := range r.procs {
		if p.running() {
			for _, e := range p.disks {
				all = append(all, "read "+p.label+" "+e.name)
			}
		}
	}
	for _, h := range r.hosts {
		var names []string
		for n, f := range h.files {
			if f.dest {
				names = append(names, n)
			}
		}
		slices.Sort(names)
		for _, n := range names {
			all = append(all, "inspect "+h.name+" "+n)
		}
	}
	return all
}

func (d *drawer) label() string {
	d.labels++
	return fmt.Sprintf("x%d", d.labels)
}

// one chooses one of several; empty if there is none.
func one[T any](d *drawer, all []T) (v T) {
	if len(all) == 0 {
		return v
	}
	return all[d.rnd.IntN(len(all))]
}

// draw draws a step that can be made now, or nearly so.
func (d *drawer) draw(r *run) string {
	var running, sources, lives, owners []string
	for _, p := range r.procs {
		if !p.running() {
			continue
		}
		running = append(running, p.label)
		if p.kind != dest {
			sources = append(sources, p.label)
		}
		if p.kind == live {
			lives = append(lives, p.label)
		}
		for _, e := range p.disks {
			if e.accepts {
				owners = append(owners, p.label+" "+e.name)
			}
		}
	}
	h := r.hosts[d.rnd.IntN(2)]
	var files []string
	for n := range h.files {
		files = append(files, n)
	}
	for n := range h.links {
		files = append(files, n)
	}
	slices.Sort(files)
	f := one(d, files)
	disk := fmt.Sprint(d.rnd.IntN(100) * 3 / 250) // mostly the first
	seed := d.rnd.IntN(10000)
	var ports []string
	for n := range r.ports {
		ports = append(ports, n)
	}
	slices.Sort(ports)
	port := one(d, ports)
	type choice struct {
		weight int
		step   string
	}
	some := func(base string, all ...string) string {
		for _, a := range all {
			if d.rnd.IntN(3) == 0 {
				base += " " + a
			}
		}
		return base
	}
	var all []choice
	add := func(weight int, is bool, step string) {
		if is {
			all = append(all, choice{weight, step})
		}
	}
	newName := one(d, []string{"e", "g", "k"}) + disk
	add(6, f != "", some("source "+d.label()+" "+h.name+" "+f, "slow"))
	add(8, f != "", some("live "+d.label()+" "+h.name+" "+f, "slow", "auto"))
	add(2, f != "", "live "+d.label()+" "+h.name+" "+f+" reclaim")
	add(2, len(files) > 1, some("live "+d.label()+" "+h.name+" "+one(d, files)+","+f, "slow"))
	add(2, f != "", "clone "+d.label()+" "+h.name+" "+f)
	add(9, port != "", some("dest "+d.label()+" "+h.name+" "+d.taking(r, port)+" "+port, "overwrite"))
	add(2, port != "" && f != "", some("dest "+d.label()+" "+h.name+" "+f+" "+port, "overwrite"))
	add(7, len(running) > 0, "kill "+one(d, running))
	add(4, len(running) > 0, fmt.Sprintf("doom %s %d", one(d, running), d.rnd.IntN(d.rnd.IntN(80)+1)))
	add(5, len(running) > 0, "term "+one(d, running))
	add(1, len(running) > 0, "power "+h.name)
	add(10, len(lives) > 0, "handoff "+one(d, lives))
	add(2, len(lives) > 0, "abort "+one(d, lives))
	add(4, len(sources) > 0, "fast "+one(d, sources))
	add(4, len(running) > 0, "await "+one(d, running))
	add(10, len(owners) > 0, some(fmt.Sprintf("write %s %d", one(d, owners), seed), "flush"))
	add(2, len(owners) > 0, "flush "+one(d, owners))
	add(2, len(owners) > 0, fmt.Sprintf("killwrite %s %d", one(d, owners), seed))
	add(3, len(owners) > 0, "read "+one(d, owners))
	add(3, port != "", "cut "+port)
	add(2, port != "", "swap "+port)
	add(1, port != "", "stall "+port)
	add(2, port != "", "heal "+port)
	add(5, f != "", d.snapStep(h, f))
	if len(d.snaps) > 0 {
		var on, id, of string
		fmt.Sscan(one(d, d.snaps), &on, &id, &of)
		as := of
		if d.rnd.IntN(3) == 0 {
			as = newName
		}
		add(7, true, some("restore "+on+" "+id+" "+one(d, []string{"dms", "dms", "d", "m", "s", "dm", "ds"})+" "+as, "inplace", "plain"))
	}
	add(2, f != "", some(fmt.Sprintf("tamper %s %s %d", h.name, f, seed), "touch"))
	add(1, f != "", fmt.Sprintf("replace %s %s %d", h.name, f, seed))
	add(2, f != "", some("mv "+h.name+" "+f+" "+newName, "alone"))
	add(2, f != "", "ln "+h.name+" "+f+" "+newName)
	add(2, f != "", "sym "+h.name+" "+f+" "+newName)
	add(1, true, "fill "+h.name)
	add(1, true, "ro "+h.name)
	add(6, h.ro, "rw "+h.name)
	add(3, h.full, "free "+h.name)
	add(2, f != "", "inspect "+h.name+" "+f)
	total := 0
	for _, c := range all {
		total += c.weight
	}
	at := d.rnd.IntN(total)
	for _, c := range all {
		if at -= c.weight; at < 0 {
			d.note(c.step)
			return c.step
		}
	}
	return ""
}

// taking names files for the disks that the last source at a port had.
func (d *drawer) taking(r *run, port string) string {
	if port == "" {
		return ""
	}
	names := []string{"d" + port[1:]}
	for _, p := range r.procs {
		if p.kind != dest && p.port == r.ports[port] {
			names = p.names
		}
	}
	first := one(d, []string{"d", "d", "e", "g", "k"})
	var all []string
	for _, n := range names {
		all = append(all, first+n[len(n)-1:])
	}
	return strings.Join(all, ",")
}

func (d *drawer) snapStep(h *host, f string) string {
	return fmt.Sprintf("snap %s %s n%d", h.name, f, len(d.snaps)+1)
}

// note remembers snapshots.
func (d *drawer) note(step string) {
	var op, on, of, id string
	if fmt.Sscan(step, &op, &on, &of, &id); op == "snap" {
		d.snaps = append(d.snaps, on+" "+id+" "+of)
	}
}
