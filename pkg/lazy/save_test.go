package lazy

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// Without any flush the bits follow, and nothing is written when nothing changes.
func TestBitsFollowWithoutAFlush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAlive(t, 8, Options{})
		mustWrite(t, a.s, 0, filled(1, testBlock))
		pass(saveLatest / 2)
		mustWrite(t, a.d, testBlock, filled(1, 512))
		n := len(a.p.done())
		pass(saveLatest)
		if log := a.p.done()[n:]; !slices.Equal(log, []string{"sync disk", "write map", "read map", "write map", "sync map"}) {
			t.Errorf("%v after a change: %v", saveLatest, log)
		}
		n = len(a.p.done())
		pass(100 * saveLatest)
		if log := a.p.done()[n:]; len(log) != 0 {
			t.Errorf("with nothing new: %v", log)
		}
		mustWrite(t, a.d, testBlock+1024, filled(1, 512))
		a.sync()
		n = len(a.p.done())
		pass(100 * saveLatest)
		if log := a.p.done()[n:]; len(log) != 0 {
			t.Errorf("after a flush: %v", log)
		}
		mustWrite(t, a.s, 2*testBlock, filled(1, testBlock))
		pass(2 * saveLatest)
		a.cut(false, false)
		if st := a.d.Stats(); st.Fetched != 2 || st.Partial != 1 {
			t.Errorf("after a power cut: %+v", st)
		}
	})
}

// What has arrived is saved soon if it is much; what clients wrote has time.
func TestMuchThatHasArrivedIsSavedSoon(t *testing.T) {
	for _, c := range []struct {
		arrived int64
		soon    bool
	}{{saveWorth - testBlock, false}, {saveWorth, true}} {
		synctest.Test(t, func(t *testing.T) {
			a := newAlive(t, 2*saveWorth/testBlock, Options{})
			a.sync()
			mustWrite(t, a.d, saveWorth, filled(2, saveWorth)) // of a client: does not count
			mustWrite(t, a.s, 0, filled(1, c.arrived))
			n := len(a.p.done())
			pass(saveEvery + time.Millisecond)
			if saved := slices.Contains(a.p.done()[n:], "sync map"); saved != c.soon {
				t.Errorf("%d bytes have arrived, saved %v after: %v", c.arrived, saveEvery, saved)
			}
			pass(saveLatest)
			a.cut(false, false)
			if st := a.d.Stats(); st.Fetched != c.arrived/testBlock || st.Written != saveWorth/testBlock {
				t.Errorf("after a power cut: %+v", st)
			}
		})
	}
}
