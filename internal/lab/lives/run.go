package lives

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// disks is how many disks a run may have.
const disks = 3

// run is two hosts and what happens to them.
type run struct {
	bin     string
	dir     string // of the sockets
	hosts   [2]*host
	ports   map[string]*port
	procs   []*process
	lines   int
	lives   int
	tokens  token
	sockets int
	started int
	sizes   map[string]int // sectors, by the disk's name
	done    []string       // the steps that were made
	// weird tells that something was done after which a move need not come to
	// its end by itself.
	weird bool
	// over tells that the model does not know how it goes on.
	over bool
	// killKeeps tells that a kill of dest loses nothing that was answered.
	killKeeps bool
}

// worker makes runs one after the other.
type worker struct {
	bin, dir  string
	hosts     [2]*host
	killKeeps bool
}

func newWorker(bin, dir string, killKeeps bool) (*worker, error) {
	w := &worker{bin: bin, dir: filepath.Join(dir, "s"), killKeeps: killKeeps}
	saved := filepath.Join(dir, "saved")
	if err := errors.Join(os.MkdirAll(w.dir, 0o700), os.MkdirAll(saved, 0o700)); err != nil {
		return nil, err
	}
	for i, name := range []string{"A", "B"} {
		h, err := newHost(name, dir, saved)
		if err != nil {
			return nil, errors.Join(err, w.close())
		}
		w.hosts[i] = h
	}
	return w, nil
}

func (w *worker) close() error {
	var err error
	for _, h := range w.hosts {
		if h != nil {
			err = errors.Join(err, h.close())
		}
	}
	return err
}

// begin makes the disks of a run, all of them at the first host.
func (w *worker) begin(seed uint64) (*run, error) {
	r := &run{bin: w.bin, dir: w.dir, hosts: w.hosts, ports: map[string]*port{}, sizes: map[string]int{}, killKeeps: w.killKeeps}
	err := empty(w.dir)
	for _, h := range w.hosts {
		err = errors.Join(err, h.reset())
	}
	rnd := rand.New(rand.NewPCG(seed, 1))
	for i := range disks {
		n := fmt.Sprintf("d%d", i)
		sectors := 128 + []int{0, 0, 3}[rnd.IntN(3)]
		contents := make([]token, sectors)
		b := make([]byte, sectors*sector)
		for s := range contents {
			if s/perBlock%5 != 2 { // some are holes
				contents[s] = r.nextToken()
			}
			fill(b[s*sector:(s+1)*sector], s, contents[s])
		}
		r.sizes[n] = sectors
		f := &file{host: w.hosts[0], line: newLine(r.nextLine(), contents), whole: true, local: map[int]bool{}}
		f.line.owner = f
		w.hosts[0].files[n] = f
		err = errors.Join(err, os.WriteFile(w.hosts[0].path(n), b, 0o600))
	}
	return r, err
}

// end kills what still runs.
func (r *run) end() {
	for _, p := range r.procs {
		p.kill()
	}
	for _, p := range r.ports {
		p.close()
	}
}

func (r *run) nextLine() int    { r.lines++; return r.lines }
func (r *run) nextLife() int    { r.lives++; return r.lives }
func (r *run) nextToken() token { r.tokens++; return r.tokens }

func (r *run) contents(disk string) []token { return make([]token, r.sizes[disk]) }

func (r *run) host(name string) *host {
	for _, h := range r.hosts {
		if h.name == name {
			return h
		}
	}
	return nil
}

// proc is the running process of a label; nil if there is none.
func (r *run) proc(label string) *process {
	for _, p := range r.procs {
		if p.label == label && p.running() {
			return p
		}
	}
	return nil
}

func (r *run) port(name string) (*port, error) {
	if p := r.ports[name]; p != nil {
		return p, nil
	}
	p, err := newPort(filepath.Join(r.dir, "port"+name))
	if err == nil {
		r.ports[name] = p
	}
	return p, err
}

// step makes one step and checks. One that cannot be made as things are is left
// out, so that steps before it can be.
func (r *run) step(text string) error {
	words := strings.Fields(text)
	if len(words) == 0 {
		return nil
	}
	do, ok := steps[words[0]]
	if !ok {
		return fmt.Errorf("%q: no such step", text)
	}
	if err := r.ends(); err != nil { // what happened before the step
		return err
	}
	made, err := do(r, words[1:])
	if made {
		r.done = append(r.done, text)
	}
	if err != nil || !made || r.over {
		return err
	}
	r.poll()
	return r.check()
}

// ends looks at the processes that have ended.
func (r *run) ends() error {
	for _, p := range r.procs { // what was received counts before the end of its source
		if err := r.attach(p); err != nil {
			return err
		}
	}
	for _, p := range r.procs {
		if err := r.claims(p); err != nil {
			return err
		}
	}
	return nil
}

// poll takes the answers to what was asked for before.
func (r *run) poll() {
	for _, p := range r.procs {
		if p.pending == nil {
			continue
		}
		select {
		case <-p.pending:
			p.pending = nil
		default:
		}
	}
}

// inUse reports whether a process has a file, and has not been seen to end.
func (r *run) inUse(f *file, but ...kind) bool {
	for _, p := range r.procs {
		if !p.seen && p.uses(f) && (len(but) == 0 || p.kind != but[0]) {
			return true
		}
	}
	return false
}

// settle waits until a process has come to its end, or a time has passed.
func (p *process) settled(bound time.Duration) bool {
	return within(bound, func() bool {
		return p.hasEnded() || p.kind == dest && p.out.has("the source is not needed any more")
	})
}
