package lazy

import (
	"path/filepath"
	"testing"
)

// newMapped is a device of 1 TiB on a disk that costs nothing, with a map or
// without.
func newMapped(tb testing.TB, mapped bool) *Device {
	var o Options
	if mapped {
		m, err := CreateMap(filepath.Join(tb.TempDir(), "map"), Identity{Size: 1 << 40, BlockSize: DefaultBlockSize})
		if err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() { _ = m.Close() }) // nothing to learn from it
		o.Map = m
	}
	d, err := New(vast{1 << 40}, o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = d.Close() }) // nothing to learn from it
	return d
}

func BenchmarkMap(b *testing.B) {
	for _, mapped := range []bool{false, true} {
		name := "memory/"
		if mapped {
			name = "map/"
		}
		b.Run(name+"arrival", func(b *testing.B) {
			s := newMapped(b, mapped).Attach(&asks{})
			p := make([]byte, 64<<10)
			b.ReportAllocs()
			off := int64(0)
			for b.Loop() {
				if _, err := s.WriteAt(p, off%(1<<40)); err != nil {
					b.Fatal(err)
				}
				off += 64 << 10
			}
		})
		for _, what := range []string{"write", "write and flush"} {
			b.Run(name+what, func(b *testing.B) {
				d := newMapped(b, mapped)
				p := make([]byte, 4096)
				b.ReportAllocs()
				off := int64(0)
				for b.Loop() {
					if _, err := d.WriteAt(p, off%(1<<40)); err != nil {
						b.Fatal(err)
					}
					if what != "write" {
						if err := d.Sync(); err != nil {
							b.Fatal(err)
						}
					}
					off += 17*(64<<10) + 4096
				}
			})
		}
	}
}

// A block that arrives costs no allocation with a map, either.
func TestArrivalWithMapAllocatesNothing(t *testing.T) {
	s := newMapped(t, true).Attach(&asks{})
	p := make([]byte, 64<<10)
	off := int64(0)
	n := testing.AllocsPerRun(200, func() {
		if _, err := s.WriteAt(p, off); err != nil {
			t.Error(err)
		}
		off += 64 << 10
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}
