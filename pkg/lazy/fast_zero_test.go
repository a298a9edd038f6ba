package lazy

import (
	"errors"
	"testing"
	"testing/synctest"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// fastDisk is a disk with a quick way to zero, for as much as fast says.
type fastDisk struct {
	*memDisk
	fast int64 // bytes of one operation; 0: none
}

var _ storage.FastZeroer = (*fastDisk)(nil)

func (f *fastDisk) CanZeroFast() bool { return f.fast > 0 }

func (f *fastDisk) ZeroFastAt(off, length int64, punch bool) error {
	if length > f.fast {
		return errors.ErrUnsupported
	}
	return f.ZeroAt(off, length, punch)
}

func TestFastZeroingIsAMatterOfTheDisk(t *testing.T) {
	slow, _ := newTestDevice(t, 4*testBlock, Options{BlockSize: testBlock})
	if slow.CanFastZero() {
		t.Error("a disk that knows no quick way is said to have one")
	}
	if err := slow.FastZeroAtContext(t.Context(), 0, testBlock, true); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("zeroed quickly where there is no quick way: %v", err)
	}
	disk := &fastDisk{newMemDisk(4 * testBlock), 4 * testBlock}
	copy(disk.b, filled(7, 4*testBlock))
	d := newDeviceOn(t, disk, Options{BlockSize: testBlock})
	if !d.CanFastZero() {
		t.Error("a disk that knows a quick way is said to have none")
	}
	if err := d.FastZeroAtContext(t.Context(), 0, 5*testBlock, true); !errors.Is(err, storage.ErrOutOfRange) {
		t.Errorf("past the end: %v", err)
	}
	if err := d.FastZeroAtContext(t.Context(), 4*testBlock, 0, true); err != nil {
		t.Errorf("nothing: %v", err)
	}
}

// What is missing is zeroed quickly, too, and stays so when the block arrives;
// but not where that takes a sector that has to come from the source.
func TestFastZeroingNeverWaitsForTheSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk := &fastDisk{newMemDisk(4 * testBlock), 4 * testBlock}
		d, a := newDeviceOn(t, disk, Options{BlockSize: testBlock}), &asks{}
		s := d.Attach(a)
		for _, r := range [][2]int64{{100, testBlock}, {512, testBlock + 1}, {512, 100}} {
			err := d.FastZeroAtContext(t.Context(), r[0], r[1], true)
			if !errors.Is(err, errors.ErrUnsupported) {
				t.Errorf("%d bytes at %d: %v, want that it is refused", r[1], r[0], err)
			}
		}
		synctest.Wait()
		if asked := a.needed(); len(asked) > 0 {
			t.Errorf("asked for %v, want nothing", asked)
		}
		if err := d.FastZeroAtContext(t.Context(), 512, 2*testBlock, true); err != nil {
			t.Fatal(err)
		}
		mustWrite(t, s, 0, filled(9, 4*testBlock))
		want := filled(9, 4*testBlock)
		clear(want[512 : 512+2*testBlock])
		mustRead(t, d, 0, want)
		if err := d.FastZeroAtContext(t.Context(), 100, 300, true); err != nil { // all is here now
			t.Fatal(err)
		}
		clear(want[100:400])
		mustRead(t, d, 0, want)
	})
}

// A refusal changes nothing: neither bytes nor what is known of them.
func TestRefusedFastZeroingChangesNothing(t *testing.T) {
	disk := &fastDisk{newMemDisk(4 * testBlock), testBlock}
	d := newDeviceOn(t, disk, Options{BlockSize: testBlock, KnownZero: true})
	s := d.Attach(&asks{})
	mustWrite(t, s, 0, filled(3, testBlock))
	if err := d.FastZeroAtContext(t.Context(), 0, 3*testBlock, true); !errors.Is(err, errors.ErrUnsupported) {
		t.Fatalf("%v, want that it is refused", err)
	}
	if !d.knownZero.Load() {
		t.Error("the disk is not known to be zero any more")
	}
	mustWrite(t, s, testBlock, filled(4, 3*testBlock))
	mustRead(t, d, 0, append(filled(3, testBlock), filled(4, 3*testBlock)...))
}

// What is zeroed in parts is finished once the first is done.
func TestFastZeroingThatHasBegunIsFinished(t *testing.T) {
	disk := &fastDisk{newMemDisk(2*zeroChunk + testBlock), zeroChunk}
	calls := 0
	disk.hook = func(op string, _, _ int64) error {
		if op == "zero" {
			if calls++; calls == 1 {
				disk.fast = 1 // from now on it refuses
			}
		}
		return nil
	}
	copy(disk.b, filled(7, 2*zeroChunk+testBlock))
	d := newDeviceOn(t, disk, Options{BlockSize: testBlock})
	if err := d.FastZeroAtContext(t.Context(), 0, 2*zeroChunk+testBlock, true); err != nil {
		t.Fatal(err)
	}
	mustRead(t, d, 0, make([]byte, 2*zeroChunk+testBlock))
}
