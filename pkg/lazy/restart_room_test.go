package lazy

import (
	"errors"
	"syscall"
	"testing"
)

// roomSteps are the changes of state that need room in the map.
func roomSteps(a *alive) map[string]func() error {
	return map[string]func() error{
		"dirty list":  func() error { return a.s.DirtyList([]uint32{1, 5}) },
		"restart":     func() error { return a.d.Restart(UUID{7}, 8) },
		"go live":     a.d.GoLive,
		"begin epoch": func() error { _, err := a.d.BeginEpoch(0); return err },
	}
}

// The n-th write to the map finds no room, for every n, whatever it is for: that is
// said, nothing has happened that a power cut would show, and the same call succeeds
// when there is room (fault F13, trap I11).
func TestNoRoomForAChangeOfStateIsNotFinal(t *testing.T) {
	for _, no := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT} {
		for what := range roomSteps(newAlive(t, 8, Options{Standby: true})) {
			for n := 0; ; n++ {
				a := newAlive(t, 8, Options{Standby: true})
				mustWrite(t, a.s, 0, filled(1, 8*testBlock))
				if err := a.s.Flush(); err != nil {
					t.Fatal(err)
				}
				was, writes, last, spare := a.d.Epoch(), 0, "", false
				a.p.hook = func(op string) error {
					before := last
					last = op
					if op == "write map" {
						if writes++; writes-1 == n {
							spare = before == "sync map" // the other copy of a header that is durable
							return no
						}
					}
					return nil
				}
				do := roomSteps(a)[what]
				err := do()
				fired := writes > n
				a.p.hook = nil
				if err == nil && (!fired && n == 0 || fired && !spare) {
					t.Fatalf("%s: write %d of %d found no room, and it succeeded", what, n, writes)
				}
				if err != nil && (!NoRoom(err) || !errors.Is(err, no) || a.d.Epoch() != was || a.d.isLive.Load()) {
					t.Errorf("%s: write %d found no room: %v, epoch %+v, was %+v", what, n, err, a.d.Epoch(), was)
				}
				if err != nil && what == "go live" { // so the source can still take blocks back
					if err := a.s.DirtyList([]uint32{2}); err != nil {
						t.Errorf("a dirty list after a handoff that found no room: %v", err)
					}
				}
				if err != nil {
					if err := do(); err != nil {
						t.Errorf("%s, with room again: %v", what, err)
					}
				}
				a.cut(false, false)
				live, local := a.d.isLive.Load(), a.d.Stats().BytesLocal/testBlock
				if live != (what == "go live") || what == "dirty list" && local != 6 || what == "restart" && local != 0 {
					t.Errorf("%s: write %d found no room, and after a power cut: live %t, %d blocks", what, n, live, local)
				}
				if !fired {
					break
				}
			}
		}
	}
}

// As long as the map cannot forget blocks that were taken back, nothing is laid over
// them: after a power cut that would be a mixture that the map says is whole (fault
// F13, traps M13 and I11).
func TestNothingIsLaidOverWhatTheMapCouldNotForget(t *testing.T) {
	for _, what := range []string{"dirty list", "restart"} {
		a := newAlive(t, 8, Options{Standby: true})
		mustWrite(t, a.s, 0, filled(1, 8*testBlock))
		if err := a.s.Flush(); err != nil {
			t.Fatal(err)
		}
		a.p.hook = func(op string) error {
			if op == "write map" {
				return syscall.ENOSPC
			}
			return nil
		}
		if err := roomSteps(a)[what](); !NoRoom(err) {
			t.Fatalf("%s: %v", what, err)
		}
		if _, err := a.s.WriteAt(filled(2, testBlock), testBlock); !NoRoom(err) {
			t.Errorf("%s: what came was taken: %v", what, err)
		}
		a.p.hook = nil
		mustWrite(t, a.s, testBlock, filled(2, testBlock)) // pays what is owed
		a.cut(true, false)
		if a.d.state.fetched.get(1) {
			t.Errorf("%s: block 1 was taken back, and is claimed after a power cut", what)
		}
	}
}
