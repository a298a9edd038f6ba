package lazy

import (
	"runtime"
	"slices"
	"testing"
)

// A list of millions of blocks that does not ascend costs little more than itself, and
// all of it is taken back. (fault C1, trap P1)
func TestADirtyListThatDoesNotAscendCostsLittle(t *testing.T) {
	a := newAlive(t, 8, Options{Standby: true})
	mustWrite(t, a.s, 0, filled(1, 8*testBlock))
	if err := a.s.Flush(); err != nil {
		t.Fatal(err)
	}
	steps := a.d.Epoch().Steps
	list := make([]uint32, 4*takeBackAtOnce)
	for i := range list {
		list[i] = uint32(i&1) * 2
	}
	list[len(list)-1] = 5
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if err := a.s.DirtyList(list); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if n := (after.TotalAlloc - before.TotalAlloc) >> 20; n > 128 {
		t.Errorf("a list of 16 MiB took %d MiB", n)
	}
	if got, want := a.local(), [][2]int64{{1, 1}, {3, 2}, {6, 2}}; !slices.Equal(got, want) {
		t.Errorf("local %v, want %v", got, want)
	}
	if got := a.d.Epoch().Steps - steps; got == 0 {
		t.Error("the list was not counted")
	}
}
