package lazy

import (
	"slices"
	"testing"
)

func unmodified(d *Device) (blocks []int64) {
	d.EachUnmodified(func(off, length int64) bool {
		for ; length > 0; off, length = off+testBlock, length-testBlock {
			blocks = append(blocks, off/testBlock)
		}
		return true
	})
	return blocks
}

// TestBlockThatWasWrittenSinceItCameIsKnown, also after a power cut behind a flush:
// what is not written is as the source had it (rule 2).
func TestBlockThatWasWrittenSinceItCameIsKnown(t *testing.T) {
	for name, start := range map[string]func(*testing.T) *alive{
		"map":     func(t *testing.T) *alive { return newAlive(t, 8, Options{}) },
		"map log": func(t *testing.T) *alive { return newLogged(t, 8, Options{}) },
	} {
		t.Run(name, func(t *testing.T) {
			a := start(t)
			mustWrite(t, a.s, 0, filled(1, 5*testBlock))
			mustWrite(t, a.d, 5*testBlock, filled(2, testBlock)) // whole, and never fetched
			mustWrite(t, a.d, 6*testBlock, filled(2, 512))       // a part of a missing one
			mustWrite(t, a.d, testBlock+512, filled(2, 512))     // a part of a fetched one
			mustWrite(t, a.d, 3*testBlock-512, filled(2, 2*512)) // over an edge of two
			if err := a.d.TrimAtContext(t.Context(), 4*testBlock, 512); err != nil {
				t.Fatal(err)
			}
			if got := unmodified(a.d); !slices.Equal(got, []int64{0}) {
				t.Errorf("blocks %v are as they came", got)
			}
			a.sync()
			a.cut(false, false)
			if got := unmodified(a.d); !slices.Equal(got, []int64{0}) {
				t.Errorf("after the power cut blocks %v are as they came", got)
			}
			if !a.d.Unmodified(0) || a.d.Unmodified(testBlock) || a.d.Unmodified(7*testBlock) {
				t.Error("Unmodified and EachUnmodified differ")
			}
		})
	}
}

// TestRenewKeepsWhatIsHere under the new generation, durably.
func TestRenewKeepsWhatIsHere(t *testing.T) {
	a := newAlive(t, 8, Options{})
	mustWrite(t, a.s, 0, filled(1, 5*testBlock))
	mustWrite(t, a.d, testBlock, filled(2, 512))
	a.sync()
	if err := a.d.Renew(UUID{7}, 9); err != nil {
		t.Fatal(err)
	}
	a.cut(false, false)
	if st := a.d.Stats(); st.Missing != 3 || !slices.Equal(unmodified(a.d), []int64{0, 2, 3, 4}) {
		t.Errorf("%+v", st)
	}
	if id := a.d.saver.m.Identity(); id.Source != (UUID{7}) || id.Generation != 9 {
		t.Errorf("the map is for %v", id)
	}
}
