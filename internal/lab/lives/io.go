package lives

import (
	"math/rand/v2"
	"slices"
	"strconv"
	"time"
)

// owned returns the export of a process that answers writes of a disk; nil if
// it does not.
func (r *run) owned(w []string) (*process, *export) {
	p := r.proc(w[0])
	if p == nil || p.pending != nil {
		return nil, nil
	}
	for _, e := range p.disks {
		if e.name == w[1] && e.accepts && e.file != nil && e.file.line != nil && e.file.line.owner == e.file && e.conn != nil {
			return p, e
		}
	}
	return nil, nil
}

// write: write LABEL DISK SEED [flush]
func (r *run) write(w []string) (bool, error) {
	p, e := r.owned(w)
	if e == nil {
		return false, nil
	}
	if err := r.writes(p, e, w[2], -1); err != nil {
		return true, err
	}
	if slices.Contains(w, "flush") {
		_, err := r.flush(w)
		return true, err
	}
	return true, nil
}

// killWrite: killwrite LABEL DISK SEED: the process is killed between or in writes.
func (r *run) killWrite(w []string) (bool, error) {
	p, e := r.owned(w)
	if e == nil {
		return false, nil
	}
	seed, _ := strconv.ParseUint(w[2], 10, 64)
	return true, r.writes(p, e, w[2], int(seed%4))
}

// writes writes some runs of sectors. With killAt it kills the process while the
// n-th is under way.
func (r *run) writes(p *process, e *export, from string, killAt int) error {
	seed, _ := strconv.ParseUint(from, 10, 64)
	rnd := rand.New(rand.NewPCG(seed, 2))
	l := e.file.line
	for n := range 4 {
		first := rnd.IntN(l.checked())
		count := min(1+rnd.IntN(2*perBlock), l.checked()-first)
		if rnd.IntN(2) == 0 { // whole blocks
			first -= first % perBlock
			count = min(perBlock*(1+rnd.IntN(3)), l.checked()-first)
		}
		zero := rnd.IntN(5) == 0
		tokens := make([]token, count)
		b := make([]byte, count*sector)
		for i := range tokens {
			if !zero {
				tokens[i] = r.nextToken()
			}
			fill(b[i*sector:(i+1)*sector], first+i, tokens[i])
		}
		conn := e.conn
		do := func() error {
			if zero {
				return conn.ZeroAt(int64(first)*sector, int64(len(b)))
			}
			_, err := conn.WriteAt(b, int64(first)*sector)
			return err
		}
		if n == killAt {
			do = func(write func() error) func() error {
				return func() error {
					time.AfterFunc(time.Duration(seed%400)*time.Microsecond, func() { _ = p.cmd.Process.Kill() })
					return write()
				}
			}(do)
		}
		err, ok := answer(answerBound, do)
		if !ok {
			return violatedf("hang", "%s does not answer a write", p.label)
		}
		for i, t := range tokens {
			if err != nil {
				l.failed(first+i, t)
				continue
			}
			l.answered(first+i, t)
			if p.kind == live {
				r.refute(l)
			}
			e.file.local[first+i] = true
		}
		if n == killAt {
			r.killed(p, false)
			return nil
		}
		if err != nil {
			return nil
		}
	}
	return nil
}

// refute notes that a source of a line has answered a write: then no destination was
// its owner at an earlier snapshot.
func (r *run) refute(l *line) {
	for _, h := range r.hosts {
		for _, s := range h.snaps {
			if s.of == l {
				s.maybe = nil
			}
		}
	}
}

// flush: flush LABEL DISK
func (r *run) flush(w []string) (bool, error) {
	p, e := r.owned(w)
	if e == nil {
		return false, nil
	}
	err, ok := answer(answerBound, e.conn.Flush)
	if !ok {
		return true, violatedf("hang", "%s does not answer a flush", p.label)
	}
	if err == nil {
		e.file.line.flushed()
	}
	return true, nil
}

// read: read LABEL DISK: all of it, as far as it can be had.
func (r *run) read(w []string) (bool, error) {
	p, e := r.owned(w)
	if e == nil {
		return false, nil
	}
	type part struct {
		first int
		b     []byte
		err   error
	}
	l, conn := e.file.line, e.conn
	got := make(chan part, len(l.cur))
	n := 0
	for s := 0; s < l.checked(); s += perBlock {
		n++
		go func() {
			b := make([]byte, blockSize)
			_, err := conn.ReadAt(b, int64(s)*sector)
			got <- part{s, b, err}
		}()
	}
	t := time.NewTimer(awhile)
	defer t.Stop()
	for range n {
		select {
		case part := <-got:
			if part.err != nil {
				continue // it may end
			}
			for i, v := range names(part.b, part.first) {
				if s := part.first + i; !(l.tampered && !e.file.local[s]) && !l.may(s, v, true) {
					return true, violatedf("lost", "%s: sector %d of %s (line %d) holds %s, want %s", p.label, s, e.as, l.id, v, l.cur[s])
				}
			}
		case <-t.C:
			return true, nil
		}
	}
	return true, nil
}
