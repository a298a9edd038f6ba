package lazy

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
)

// manyMasks is the memory of so many masks of test blocks.
func manyMasks(n int64) int64 { return n * maskCost(Options{BlockSize: testBlock}.maskWords()) }

// Beyond the bound a part of a missing block is written when the block has come: the
// write waits, and asks for it. Whole blocks, blocks that have a mask, trims and fast
// zeroes do not wait. (fault F16)
func TestMasksAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, disk := newTestDevice(t, 16*testBlock, Options{BlockSize: testBlock, MaskMemory: manyMasks(2)})
		src := new(asks)
		s := d.Attach(src)
		mustWrite(t, d, 0, filled(2, 512))
		mustWrite(t, d, testBlock, filled(2, 512))
		mustWrite(t, d, testBlock+1024, filled(2, 512)) // it has a mask
		mustWrite(t, d, 3*testBlock, filled(2, testBlock))
		ctx := t.Context()
		if err := d.TrimAtContext(ctx, 4*testBlock+512, 3*testBlock); err != nil {
			t.Fatal(err)
		}
		if n := d.Stats().Written; n != 3 {
			t.Errorf("%d blocks are written, want 3: a trim leaves out what would have to wait", n)
		}
		if err := d.FastZeroAtContext(ctx, 8*testBlock, 512, true); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("a fast zero of a part of a block said %v", err)
		}
		if len(src.needed()) != 0 {
			t.Errorf("%v were asked for", src.needed())
		}
		done := run(func() { mustWrite(t, d, 9*testBlock+512, filled(2, 2*testBlock)) })
		synctest.Wait()
		if ended(done) || d.Stats().Waiting != 1 {
			t.Errorf("a write beyond the bound does not wait, or cannot be seen: %+v", d.Stats())
		}
		mustWrite(t, s, 9*testBlock, filled(1, testBlock))
		synctest.Wait()
		if ended(done) {
			t.Error("its other edge does not wait")
		}
		mustWrite(t, s, 11*testBlock, filled(1, testBlock))
		<-done
		mustRead(t, d, 9*testBlock, slices.Concat(filled(1, 512), filled(2, 2*testBlock), filled(1, testBlock-512)))
		mustWrite(t, s, 0, filled(1, 2*testBlock)) // and there is room again
		mustWrite(t, d, 12*testBlock, filled(2, 512))
		if got := disk.b[testBlock : testBlock+2048]; !slices.Equal(got, slices.Concat(filled(2, 512), filled(1, 512), filled(2, 512), filled(1, 512))) {
			t.Errorf("block 1 begins with %x", got)
		}
	})
}

// A map may hold more masks than are taken into memory: what was written to the other
// blocks is ours all the same, when they arrive, when the log is laid over them, and
// after a kill. (fault F16)
func TestMasksOfAMapAreBoundedAtAStart(t *testing.T) {
	for _, mirrored := range []bool{false, true} {
		a := newLogged(t, 8, Options{})
		for i := range int64(6) {
			mustWrite(t, a.d, i*testBlock, filled(2, 512))
			mustWrite(t, a.d, i*testBlock+2048, filled(3, 512))
		}
		if err := a.s.Flush(); err != nil {
			t.Fatal(err)
		}
		a.put(5*testBlock+1024, filled(4, 512)) // it is laid over a block without a mask in memory
		a.o.MaskMemory = manyMasks(2)
		if mirrored {
			a.boot = new(bootMemory)
		}
		a.cut(false, false)
		if n, waiting := a.d.state.partial.n.Load(), a.d.state.partial.waiting.Load(); n+waiting != 6 || n > 3 {
			t.Errorf("%d masks in memory, %d not", n, waiting)
		}
		if mirrored {
			a.restarts(2)
		}
		want := slices.Concat(filled(2, 512), filled(1, 1536), filled(3, 512), filled(1, testBlock-2560))
		for i := range int64(6) {
			mustWrite(t, a.s, i*testBlock, filled(1, testBlock))
			if i < 5 {
				mustRead(t, a.d, i*testBlock, want)
			}
		}
		mustRead(t, a.d, 5*testBlock, slices.Concat(filled(2, 512), filled(1, 512), filled(4, 512), filled(1, 512), filled(3, 512), filled(1, testBlock-2560)))
		if !a.d.state.partial.none() {
			t.Error("masks of blocks that are here are held")
		}
	}
}

// A mask costs no more than is counted for it. (fault F16)
func TestAMaskCostsWhatIsCounted(t *testing.T) {
	for _, words := range []int{1, 2, 32} {
		const n = 1 << 15
		var t0, t1 runtime.MemStats
		table := new(maskTable)
		table.limit = n
		runtime.GC()
		runtime.ReadMemStats(&t0)
		for i := range int64(n) {
			table.add(i, 0, 1, int64(words)*64)
		}
		runtime.GC()
		runtime.ReadMemStats(&t1)
		if got, want := int64(t1.HeapAlloc-t0.HeapAlloc)/n, maskCost(words); got > want {
			t.Errorf("a mask of %d words takes %d bytes, and %d are counted", words, got, want)
		}
		runtime.KeepAlive(table)
	}
}

// trimDisk is a disk that is told of what is not needed.
type trimDisk struct {
	*memDisk
	trims [][2]int64
	hook  func() // called after each
}

func (d *trimDisk) TrimAt(off, length int64) error {
	d.trims = append(d.trims, [2]int64{off, length})
	if d.hook != nil {
		d.hook()
	}
	return nil
}

// completed is a device on a disk of so many bytes, complete.
func completed(t *testing.T, disk *trimDisk) *Device {
	t.Helper()
	d := newDeviceOn(t, disk, Options{KnownZero: true})
	if err := d.Attach(&asks{}).ZeroAt(0, int64(disk.Size()), true); err != nil {
		t.Fatal(err)
	}
	if err := d.Complete(); err != nil {
		t.Fatal(err)
	}
	return d
}

// A trim of a complete disk is a discard, and writes no zeroes. Before it is complete
// it is zeroes, which a bit rests on. (fault F15, trap L8)
func TestATrimOfACompleteDiskIsADiscard(t *testing.T) {
	disk := &trimDisk{memDisk: newMemDisk(4 * DefaultBlockSize)}
	d := completed(t, disk)
	disk.memDisk.hook = func(op string, off, length int64) error {
		t.Errorf("a trim does %s %d+%d", op, off, length)
		return nil
	}
	if err := d.TrimAtContext(t.Context(), 100, DefaultBlockSize); err != nil {
		t.Fatal(err)
	}
	if want := [][2]int64{{512, DefaultBlockSize - 512}}; !slices.Equal(disk.trims, want) {
		t.Errorf("trims %v, want %v", disk.trims, want)
	}
	disk.memDisk.hook = nil
}

// A long trim, and zeroes of gigabytes, end when their client has gone or the device is
// closed, and not when they are done. (fault F15)
func TestALongTrimCanBeInterrupted(t *testing.T) {
	const size = 5 * zeroChunk
	for _, trim := range []bool{true, false} {
		for _, complete := range []bool{true, false} {
			disk := &trimDisk{memDisk: newMemDisk(size)}
			var d *Device
			if complete {
				d = completed(t, disk)
			} else {
				d = newDeviceOn(t, disk, Options{})
			}
			gone := errors.New("the client has gone")
			ctx, cancel := context.WithCancelCause(t.Context())
			n := 0
			stop := func() {
				if n++; n == 2 {
					cancel(gone)
				}
			}
			disk.hook = stop
			disk.memDisk.done = func(op string, _, _ int64) {
				if op == "zero" {
					stop()
				}
			}
			var err error
			if trim {
				err = d.TrimAtContext(ctx, 0, size)
			} else {
				err = d.ZeroAtContext(ctx, 0, size, true)
			}
			if !errors.Is(err, gone) || n != 2 {
				t.Errorf("trim %t, complete %t: %v after %d pieces", trim, complete, err, n)
			}
			cancel(nil)
		}
	}
}
