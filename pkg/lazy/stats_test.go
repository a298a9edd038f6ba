package lazy

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"time"
)

// holes is a disk that knows its holes: every other 1000 bytes.
type holes struct{ *memDisk }

func (h holes) ExtentAt(off int64) (end int64, hole bool, err error) {
	return off/1000*1000 + 1000, off/1000%2 == 1, nil
}

func statusOf(t *testing.T, d *Device, name string, off, length int64) (runs [][2]int64) {
	t.Helper()
	err := d.BlockStatus(t.Context(), name, off, length, func(length int64, flags uint32) bool {
		runs = append(runs, [2]int64{length, int64(flags)})
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	return runs
}

func TestBlockStatus(t *testing.T) {
	d := newDeviceOn(t, holes{newMemDisk(10*testBlock + 5)}, Options{BlockSize: testBlock})
	s := d.Attach(&asks{})
	mustWrite(t, s, testBlock, filled(1, 2*testBlock))
	mustWrite(t, d, 3*testBlock, filled(1, testBlock))
	mustWrite(t, d, 5*testBlock, filled(1, 512)) // partly written is missing
	const b = testBlock
	if got, want := statusOf(t, d, ContextState, 0, 10*b+5), [][2]int64{{b, 0}, {2 * b, 1}, {b, 2}, {6*b + 5, 0}}; !slices.Equal(got, want) {
		t.Errorf("state: %v, want %v", got, want)
	}
	if got, want := statusOf(t, d, ContextState, b+7, 2*b), [][2]int64{{2*b - 7, 1}, {7, 2}}; !slices.Equal(got, want) {
		t.Errorf("state inside blocks: %v, want %v", got, want)
	}
	// Missing is data; here from 4096 on: data to 5000, hole to 6000 ...
	if got, want := statusOf(t, d, ContextAllocation, 10, 6490), [][2]int64{{4990, 0}, {1000, 3}, {500, 0}}; !slices.Equal(got, want) {
		t.Errorf("allocation: %v, want %v", got, want)
	}
	if got, want := statusOf(t, d, ContextAllocation, 4*b, 6*b+5), [][2]int64{{6*b + 5, 0}}; !slices.Equal(got, want) {
		t.Errorf("allocation of missing blocks: %v, want %v", got, want)
	}
	n := 0
	if err := d.BlockStatus(t.Context(), ContextState, 0, 4*b, func(int64, uint32) bool { n++; return false }); err != nil || n != 1 {
		t.Errorf("went on after false: %d, %v", n, err)
	}
	if err := d.BlockStatus(t.Context(), "base:nothing", 0, 1, nil); err == nil {
		t.Error("an unknown context was answered")
	}
}

func TestEachLocalAndMissing(t *testing.T) {
	d, _ := newTestDevice(t, 10*testBlock+5, Options{BlockSize: testBlock})
	s := d.Attach(&asks{})
	mustWrite(t, s, 8*testBlock, filled(1, 2*testBlock+5))
	mustWrite(t, d, 0, filled(1, testBlock))
	var local, missing [][2]int64
	d.EachLocal(func(off, length int64) bool { local = append(local, [2]int64{off, length}); return true })
	d.EachMissing(func(off, length int64) bool { missing = append(missing, [2]int64{off, length}); return true })
	if want := [][2]int64{{0, testBlock}, {8 * testBlock, 2*testBlock + 5}}; !slices.Equal(local, want) {
		t.Errorf("local %v, want %v", local, want)
	}
	if want := [][2]int64{{testBlock, 7 * testBlock}}; !slices.Equal(missing, want) {
		t.Errorf("missing %v, want %v", missing, want)
	}
	n := 0
	d.EachLocal(func(int64, int64) bool { n++; return false })
	if n != 1 {
		t.Errorf("went on after false: %d", n)
	}
}

// vast is a disk of any size that holds nothing.
type vast struct{ size uint64 }

func (v vast) ReadAt(p []byte, _ int64) (int, error)  { return len(p), nil }
func (v vast) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (v vast) ZeroAt(_, _ int64, _ bool) error        { return nil }
func (v vast) Size() uint64                           { return v.size }
func (v vast) Flush() error                           { return nil }
func (v vast) Close() error                           { return nil }

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// A 1 TiB disk costs its bits, whatever happens to it, and is made at once.
func TestMemoryOfATerabyte(t *testing.T) {
	const size = 1 << 40
	before := heap()
	begin := time.Now()
	d := newDeviceOn(t, vast{size}, Options{})
	took := time.Since(begin)
	if took > 100*time.Millisecond {
		t.Errorf("made in %v", took)
	}
	check := func(what string, limit int64) {
		t.Helper()
		used := heap() - before
		t.Logf("%s: %d KiB", what, used>>10)
		if used > limit {
			t.Errorf("%s: %d KiB, want at most %d", what, used>>10, limit>>10)
		}
	}
	check("new", 8<<20)

	// A trim of all while no source takes what it is told, and all of it prefetched.
	if err := d.Prefetch(0, size); err != nil {
		t.Fatal(err)
	}
	check("all to be asked for", 12<<20)
	src := &asks{}
	s := d.Attach(src)
	if err := s.ZeroAt(0, size/2, true); err != nil {
		t.Fatal(err)
	}
	_ = s.Close() // always nil
	if err := d.TrimAtContext(t.Context(), size/2, size/2); err != nil {
		t.Fatal(err)
	}
	check("all trimmed, none of it told", 12<<20)
	if err := d.Complete(); err != nil {
		t.Fatal(err)
	}
	runtime.KeepAlive(d)
}

func TestNewRefusesOddBlockSizes(t *testing.T) {
	for _, bs := range []int64{-1, 1, 256, 511, 1000, 65537, 1 << 31} {
		if d, err := New(newMemDisk(1), Options{BlockSize: bs}); err == nil {
			_ = d.Close() // it should not be there at all
			t.Errorf("blocks of %d bytes were taken", bs)
		}
	}
	d, _ := newTestDevice(t, 0, Options{})
	if size, err := d.Size(); size != 0 || err != nil || d.BlockSize() != DefaultBlockSize {
		t.Errorf("an empty disk: %d, %v, blocks of %d", size, err, d.BlockSize())
	}
	if err := d.Complete(); err != nil {
		t.Errorf("nothing is missing of an empty disk, but %v", err)
	}
}

// ready is a device of the size, all of it here; complete or not.
func ready(b *testing.B, size int64, complete bool, o Options) (*Device, *memDisk) {
	disk := newMemDisk(size)
	d, err := New(disk, o)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = d.Close() }) // nothing to learn from it
	if _, err := d.Attach(&asks{}).WriteAt(make([]byte, size-o.BlockSize), 0); err != nil {
		b.Fatal(err)
	}
	if complete {
		if _, err := d.WriteAt(make([]byte, o.BlockSize), size-o.BlockSize); err != nil {
			b.Fatal(err)
		}
		if err := d.Complete(); err != nil {
			b.Fatal(err)
		}
	}
	return d, disk
}

func BenchmarkRead4K(b *testing.B) {
	const size, block = 16 << 20, 64 << 10
	complete, disk := ready(b, size, true, Options{BlockSize: block})
	fetched, _ := ready(b, size, false, Options{BlockSize: block})
	revocable, _ := ready(b, size, false, Options{BlockSize: block, Revocable: true})
	for _, c := range []struct {
		name string
		r    interface {
			ReadAt(p []byte, off int64) (int, error)
		}
	}{{"store", disk}, {"complete", complete}, {"fetched", fetched}, {"revocable", revocable}} {
		b.Run(c.name, func(b *testing.B) {
			p := make([]byte, 4096)
			r := rand.New(rand.NewPCG(1, 1))
			b.ReportAllocs()
			b.SetBytes(4096)
			for b.Loop() {
				if _, err := c.r.ReadAt(p, r.Int64N(size-block-4096)&^4095); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkWrite4K(b *testing.B) {
	const size, block = 16 << 20, 64 << 10
	complete, disk := ready(b, size, true, Options{BlockSize: block})
	fetched, _ := ready(b, size, false, Options{BlockSize: block})
	revocable, _ := ready(b, size, false, Options{BlockSize: block, Revocable: true})
	missing, err := New(vast{1 << 40}, Options{BlockSize: block})
	if err != nil {
		b.Fatal(err)
	}
	defer missing.Close()
	for _, c := range []struct {
		name string
		size int64
		w    interface {
			WriteAt(p []byte, off int64) (int, error)
		}
	}{{"store", size, disk}, {"complete", size, complete}, {"fetched", size, fetched}, {"revocable", size, revocable}, {"missing", 1 << 40, missing}} {
		b.Run(c.name, func(b *testing.B) {
			p := make([]byte, 4096)
			r := rand.New(rand.NewPCG(1, 1))
			b.ReportAllocs()
			b.SetBytes(4096)
			for b.Loop() {
				if _, err := c.w.WriteAt(p, r.Int64N(c.size-block-4096)&^4095); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// newArrivals is a stream into a device on a disk that costs nothing, so that
// what is measured is ours alone.
func newArrivals(tb testing.TB) *Stream {
	d, err := New(vast{1 << 40}, Options{Standby: true})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = d.Close() }) // nothing to learn from it
	return d.Attach(&asks{})
}

func BenchmarkStreamWrite(b *testing.B) {
	for _, length := range []int64{64 << 10, 1 << 20} {
		b.Run(fmt.Sprintf("%dKiB", length>>10), func(b *testing.B) {
			s := newArrivals(b)
			p := make([]byte, length)
			b.ReportAllocs()
			b.SetBytes(length)
			off := int64(0)
			for b.Loop() {
				if _, err := s.WriteAt(p, off); err != nil {
					b.Fatal(err)
				}
				if off += length; off == 1<<40 {
					off = 0
					s.d.state.clearFetched(0, s.d.state.blocks)
				}
			}
		})
	}
}

func BenchmarkClaim(b *testing.B) {
	for _, blocks := range []int64{1, 16, 16384} {
		for _, others := range []int64{0, 64} {
			b.Run(fmt.Sprintf("blocks=%d/others=%d", blocks, others), func(b *testing.B) {
				var c claims
				for i := range others {
					c.acquire(1<<20+i, 1<<20+i+1)
				}
				b.ReportAllocs()
				for b.Loop() {
					c.release(c.acquire(0, blocks))
				}
			})
		}
	}
}

func TestSteadyStateAllocatesNothing(t *testing.T) {
	s := newArrivals(t)
	mustGoLive(t, s.d)
	ctx := context.Background()
	p := make([]byte, 1<<20)
	off := int64(0)
	for name, f := range map[string]func() error{
		"arrival of 64 KiB":    func() error { _, err := s.WriteAt(p[:64<<10], off); off += 64 << 10; return err },
		"arrival of 1 MiB":     func() error { _, err := s.WriteAt(p, off); off += 1 << 20; return err },
		"arrival of zeroes":    func() error { err := s.ZeroAt(off, 1<<30, true); off += 1 << 30; return err },
		"read of what is here": func() error { _, err := s.d.ReadAtContext(ctx, p[:4096], 0); return err },
		"write to what is here": func() error {
			_, err := s.d.WriteAtContext(ctx, p[:4096], 0)
			return err
		},
	} {
		if _, err := s.WriteAt(p, 0); err != nil {
			t.Fatal(err)
		}
		n := testing.AllocsPerRun(50, func() {
			if err := f(); err != nil {
				t.Error(err)
			}
		})
		if n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}
