package lazy

import (
	"errors"
	"log/slog"
	"math/rand/v2"
	"testing"
)

// Every operation of opening a map fails once, in turn, and the program dies at each
// once: whoever opens is told, and the next who does finds all that was flushed.
func TestEveryOperationOfOpeningFailsOnce(t *testing.T) {
	a := newAlive(t, 8, Options{})
	if _, err := a.s.WriteAt(filled(1, 2*testBlock), 0); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, a.d, testBlock, filled(2, testBlock)) // into a fetched block
	mustWrite(t, a.d, 3*testBlock, filled(3, testBlock))
	mustWrite(t, a.d, 5*testBlock+512, filled(4, 512))
	a.sync()
	what := make(map[string]int)
	for _, dies := range []bool{false, true} {
		for n := 0; ; n++ {
			a.p.kill()
			_ = a.d.Close() // it is dead
			p := newProcess(nil, -1)
			if dies {
				p = newProcess(rand.New(rand.NewPCG(uint64(n), 6)), n)
			} else {
				p.failAt = n
			}
			d, err := a.machine.start(p, Options{Log: slog.New(slog.DiscardHandler)})
			fired := p.failed != "" || p.isDead()
			told := errors.Is(err, errInjected) || errors.Is(err, errDead) || dies && err == nil // it may die after its last
			if fired && !told || !fired && err != nil {
				t.Fatalf("operation %d (%q failed, of %q): %v", n, p.failed, p.done(), err)
			}
			if err == nil {
				_ = d.Close() // it was opened
			}
			what[p.failed]++
			a.cut(false, false)
			mustRead(t, a.d, 0, filled(1, testBlock))
			mustRead(t, a.d, testBlock, filled(2, testBlock))
			mustRead(t, a.d, 3*testBlock, filled(3, testBlock))
			mustRead(t, a.d, 5*testBlock+512, filled(4, 512))
			if st := a.d.Stats(); st.Fetched+st.Written != 3 || st.Partial != 1 {
				t.Fatalf("operation %d (%q failed), and then: %+v", n, p.failed, st)
			}
			if !fired {
				break
			}
		}
	}
	for _, op := range []string{"read map", "sync map"} {
		if what[op] == 0 {
			t.Errorf("opening does no %s: %v", op, what)
		}
	}
}
