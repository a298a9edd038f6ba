package lives

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Failure is a run that has found a violation.
type Failure struct {
	Seed  uint64
	Err   error
	Steps []string // the fewest that show it
	Log   string   // what the processes said in the last of them
}

// String is a form that can be pasted into a table of runs.
func (f *Failure) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d: %v\n\t{%q, []string{\n", f.Seed, f.Err, f.Err.Error())
	for _, s := range f.Steps {
		fmt.Fprintf(&b, "\t\t%q,\n", s)
	}
	fmt.Fprintf(&b, "\t}},\n%s", f.Log)
	return b.String()
}

// play makes a run of these steps. It returns what was made of them.
func (w *worker) play(seed uint64, next func(*run) string) (r *run, err error) {
	r, err = w.begin(seed)
	defer r.end()
	for err == nil && !r.over {
		step := next(r)
		if step == "" {
			break
		}
		err = r.step(step)
	}
	return r, err
}

// listed gives the steps of a list.
func listed(steps []string) func(*run) string {
	return func(*run) string {
		if len(steps) == 0 {
			return ""
		}
		s := steps[0]
		steps = steps[1:]
		return s
	}
}

// draw makes a run by chance; nil if it found nothing.
func (w *worker) draw(seed uint64, shrink time.Duration) *Failure {
	d := newDrawer(seed)
	r, err := w.play(seed, d.next)
	if err == nil {
		return nil
	}
	return w.shrink(seed, r, err, shrink)
}

// shrink leaves out steps for as long as the same kind of violation is found.
func (w *worker) shrink(seed uint64, r *run, err error, bound time.Duration) *Failure {
	f := &Failure{Seed: seed, Err: err, Steps: r.done, Log: r.log()}
	end := time.Now().Add(bound)
	for size := len(f.Steps) / 2; size >= 1; {
		shorter := false
		for at := 0; at < len(f.Steps) && time.Now().Before(end); {
			rest := slices.Delete(slices.Clone(f.Steps), at, min(at+size, len(f.Steps)))
			if g := w.again(seed, rest, err); g != nil {
				f, shorter = g, true
				continue
			}
			at += size
		}
		if size == 1 && !shorter || time.Now().After(end) {
			break
		}
		if !shorter || size > 1 {
			size = max(size/2, 1)
		}
	}
	return f
}

// again reports whether these steps find a violation of the same kind; time may
// hide it once.
func (w *worker) again(seed uint64, steps []string, want error) *Failure {
	for range 2 {
		r, err := w.play(seed, listed(steps))
		if err != nil && kindOf(err) == kindOf(want) && !errors.Is(err, errors.ErrUnsupported) {
			return &Failure{Seed: seed, Err: err, Steps: r.done, Log: r.log()}
		}
	}
	return nil
}

// log is what the processes have said.
func (r *run) log() string {
	var b strings.Builder
	for _, p := range r.procs {
		how := "killed"
		if p.cmd.ProcessState != nil && !p.killed {
			how = fmt.Sprintf("exit %d", p.code())
		}
		fmt.Fprintf(&b, "--- %s (%s at %s), %s: %s\n%s", p.label, p.kind, p.host.name, how, strings.Join(p.cmd.Args[1:], " "), p.out)
	}
	return b.String()
}
