package lazy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"testing"
	"testing/synctest"
)

const testBlock = 4096

var errInjected = errors.New("injected")

// stopper stops operations of a disk: each waits at its start and, once let go,
// at its end.
type stopper struct {
	at   chan string   // an operation has come so far
	goOn chan struct{} // let it go
}

// stopAt makes the disk's operations of a kind stop before and after they touch
// the bytes, until the test lets them go on.
func stopAt(disk *memDisk, kind string) *stopper {
	s := &stopper{at: make(chan string), goOn: make(chan struct{})}
	stop := func(op, when string) {
		if op == kind {
			s.at <- when
			<-s.goOn
		}
	}
	disk.hook = func(op string, _, _ int64) error { stop(op, "before"); return nil }
	disk.done = func(op string, _, _ int64) { stop(op, "after") }
	return s
}

// run starts f and returns a channel that is closed when it has ended.
func run(f func()) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	return done
}

func ended(done <-chan struct{}) bool {
	synctest.Wait()
	select {
	case <-done:
		return true
	default:
		return false
	}
}

// L1: "is it written here?" and the disk write are one step, at every step of
// either. An arrival that looks at the bits, then writes without the claim, fails
// this at "arrival stopped before its disk write"; one that takes the claim but
// looked before it fails at "write stopped".
func TestL1ArrivalNeverOverwritesLocalWrite(t *testing.T) {
	whole := filled(0xaa, testBlock)
	sector := filled(0xaa, sectorSize)
	for _, c := range []struct {
		name  string
		first string // who comes first and is stopped
		when  string // before or after its bytes are on the disk
		p     []byte // what is written here
	}{
		{"arrival stopped before its disk write, then a sector", "arrival", "before", sector},
		{"arrival stopped before its disk write, then the block", "arrival", "before", whole},
		{"arrival stopped after its disk write, then a sector", "arrival", "after", sector},
		{"arrival stopped after its disk write, then the block", "arrival", "after", whole},
		{"write of a sector stopped before, then arrival", "write", "before", sector},
		{"write of the block stopped before, then arrival", "write", "before", whole},
		{"write of a sector stopped after, then arrival", "write", "after", sector},
		{"write of the block stopped after, then arrival", "write", "after", whole},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d, disk := newTestDevice(t, 4*testBlock, Options{BlockSize: testBlock})
				s := d.Attach(&asks{})
				arrive := func() { mustWrite(t, s, testBlock, filled(1, testBlock)) }
				write := func() { mustWrite(t, d, testBlock+sectorSize*int64(boolInt(len(c.p) == sectorSize)), c.p) }
				first, second := arrive, write
				if c.first == "write" {
					first, second = write, arrive
				}
				stop := stopAt(disk, "write")
				done1 := run(first)
				for when := range stop.at {
					if when == c.when {
						break
					}
					stop.goOn <- struct{}{}
				}
				done2 := run(second)
				if ended(done2) {
					t.Error("the second did not wait for the first, whose claim it needs")
				}
				// From here on all go on as they come.
				release := run(func() {
					stop.goOn <- struct{}{}
					for range stop.at {
						stop.goOn <- struct{}{}
					}
				})
				<-done1
				<-done2
				close(stop.at)
				<-release
				disk.hook, disk.done = nil, nil
				want := filled(1, testBlock)
				copy(want[sectorSize*boolInt(len(c.p) == sectorSize):], c.p)
				mustRead(t, d, testBlock, want)
			})
		})
	}
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// L2: what was written here of a missing block stays when the block arrives, is
// sent again, or arrives twice. Dropping the mask before the block is published,
// or laying duplicates down, fails it.
func TestL2PartialWriteSurvivesArrivalAndResend(t *testing.T) {
	for _, revocable := range []bool{false, true} {
		d, _ := newTestDevice(t, 4*testBlock, Options{BlockSize: testBlock, Revocable: revocable})
		s := d.Attach(&asks{})
		mustWrite(t, d, testBlock+512, filled(0xaa, 1024))
		mustWrite(t, d, testBlock+3584, filled(0xbb, 512))
		want := filled(1, testBlock)
		copy(want[512:], filled(0xaa, 1024))
		copy(want[3584:], filled(0xbb, 512))
		for v := range byte(3) {
			mustWrite(t, s, testBlock, filled(v+1, testBlock))
			mustRead(t, d, testBlock, want)
		}
		mustWrite(t, d, testBlock, filled(0xcc, 512))
		copy(want, filled(0xcc, 512))
		mustWrite(t, s, 0, filled(9, 4*testBlock))
		mustRead(t, d, testBlock, want)
		if revocable {
			if err := s.DirtyList([]uint32{1}); err != nil {
				t.Fatal(err)
			}
			mustRead(t, d, testBlock+512, want[512:1536]) // at once, from what is here
			mustWrite(t, s, testBlock, filled(5, testBlock))
			for i := range want {
				if want[i] == 1 {
					want[i] = 5
				}
			}
			mustRead(t, d, testBlock, want)
		}
	}
}

// L3: every wait has been asked for: also after a partial write found the block
// missing before, also by the second reader when the first has gone.
func TestL3EveryWaitIsAskedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, _ := newTestDevice(t, 64*testBlock, Options{BlockSize: testBlock})
		src := &asks{}
		s := d.Attach(src)
		mustWrite(t, d, 10*testBlock, filled(0xaa, 512))
		ctx, cancel := context.WithCancel(t.Context())
		first := run(func() {
			if _, err := d.ReadAtContext(ctx, make([]byte, testBlock), 10*testBlock); !errors.Is(err, context.Canceled) {
				t.Errorf("cancelled reader: %v", err)
			}
		})
		synctest.Wait()
		if want := [][2]int64{{10 * testBlock, testBlock}}; !slices.Equal(src.needed(), want) {
			t.Fatalf("after the first reader: asked for %v", src.needed())
		}
		second := run(func() { mustRead(t, d, 10*testBlock+512, filled(1, 512)) })
		synctest.Wait()
		cancel()
		<-first
		// The write of part of a sector of another block waits, so it asks, too.
		third := run(func() { mustWrite(t, d, 20*testBlock+5, filled(2, 10)) })
		synctest.Wait()
		if want := [][2]int64{{10 * testBlock, testBlock}, {20 * testBlock, testBlock}}; !slices.Equal(src.needed(), want) {
			t.Fatalf("asked for %v, want %v", src.needed(), want)
		}
		// A reader who comes when all others have gone asks again.
		if ended(second) || ended(third) {
			t.Fatal("a wait ended before anything arrived")
		}
		mustWrite(t, s, 10*testBlock, filled(1, testBlock))
		mustWrite(t, s, 20*testBlock, filled(1, testBlock))
		<-second
		<-third
		mustRead(t, d, 20*testBlock, append(append(filled(1, 5), filled(2, 10)...), 1))
	})
}

// L3: any number of readers of a block share one request.
func TestL3ReadersShareOneRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, _ := newTestDevice(t, 64*testBlock, Options{BlockSize: testBlock})
		src := &asks{}
		s := d.Attach(src)
		var all []<-chan struct{}
		for i := range int64(50) {
			all = append(all, run(func() { mustRead(t, d, 7*testBlock+i, filled(3, 9)) }))
		}
		synctest.Wait()
		if want := [][2]int64{{7 * testBlock, testBlock}}; !slices.Equal(src.needed(), want) {
			t.Errorf("asked for %v, want %v", src.needed(), want)
		}
		if st := d.Stats(); st.Waiting != 50 {
			t.Errorf("%d waiting, want 50", st.Waiting)
		}
		mustWrite(t, s, 7*testBlock, filled(3, testBlock))
		for _, done := range all {
			<-done
		}
	})
}

// L4: a read is of one age, though a block is invalidated and arrives anew
// between its check and its disk read. Without the second look it fails.
func TestL4ReadOverInvalidatedBlockIsOfOneAge(t *testing.T) {
	for _, when := range []string{"before", "after"} {
		synctest.Test(t, func(t *testing.T) {
			d, disk := newTestDevice(t, 4*testBlock, Options{BlockSize: testBlock, Revocable: true})
			s := d.Attach(&asks{})
			mustWrite(t, s, 0, filled(1, 4*testBlock))
			stop := stopAt(disk, "read")
			got := make([]byte, 2*testBlock)
			done := run(func() {
				if _, err := d.ReadAt(got, 0); err != nil {
					t.Error(err)
				}
			})
			for w := range stop.at {
				if w == when {
					break
				}
				stop.goOn <- struct{}{}
			}
			// Block 1 becomes new, block 0 only missing: a read that goes on may
			// not mix the old block 0 with the new block 1.
			if err := s.DirtyList([]uint32{1, 0}); err != nil {
				t.Fatal(err)
			}
			mustWrite(t, s, testBlock, filled(2, testBlock))
			stop.goOn <- struct{}{}
			if when == "before" {
				<-stop.at
				stop.goOn <- struct{}{}
			}
			if ended(done) {
				t.Fatal("the read did not look again")
			}
			mustWrite(t, s, 0, filled(2, testBlock))
			for range 2 {
				<-stop.at
				stop.goOn <- struct{}{}
			}
			<-done
			if !bytes.Equal(got, filled(2, 2*testBlock)) {
				t.Errorf("read %#x and %#x of two ages", got[0], got[testBlock])
			}
			disk.hook, disk.done = nil, nil
		})
	}
}

// L4: a block is not taken back under the hands of an arrival: what was on its
// way when the dirty list came does not count as the new contents. A dirty list
// that takes no claim fails it.
func TestL4DirtyListWaitsForArrivalInProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, disk := newTestDevice(t, 4*testBlock, Options{BlockSize: testBlock, Revocable: true})
		s := d.Attach(&asks{})
		stop := stopAt(disk, "write")
		old := run(func() { mustWrite(t, s, testBlock, filled(1, testBlock)) })
		<-stop.at
		dirty := run(func() {
			if err := s.DirtyList([]uint32{1}); err != nil {
				t.Error(err)
			}
		})
		if ended(dirty) {
			t.Error("answered while an old packet was being written")
		}
		stop.goOn <- struct{}{}
		<-stop.at
		stop.goOn <- struct{}{}
		<-old
		<-dirty
		disk.hook, disk.done = nil, nil
		mustWrite(t, s, testBlock, filled(2, testBlock))
		mustRead(t, d, testBlock, filled(2, testBlock))
	})
}

// L5: of data that is not aligned the whole blocks are taken, the edges are not,
// whatever the blocks beside hold. Rounding the wrong way fails it.
func TestL5UnalignedArrivalPublishesWholeBlocksOnly(t *testing.T) {
	const size = 8*testBlock + 100
	for off := int64(0); off <= size; off += 300 {
		for end := off; end <= size; end += 500 {
			d, _ := newTestDevice(t, size, Options{BlockSize: testBlock})
			s := d.Attach(&asks{})
			mustWrite(t, d, 2*testBlock+512, filled(0xaa, 512)) // partly here
			mustWrite(t, d, 5*testBlock, filled(0xaa, testBlock))
			for _, e := range []int64{end, size} {
				mustWrite(t, s, off, filled(1, e-off))
				for b := range d.state.blocks {
					from, to := d.extent(b)
					whole := off <= from && to <= e
					if got := d.state.fetched.get(b); got != (whole && b != 5) {
						t.Fatalf("%d+%d: block %d fetched: %t", off, e-off, b, got)
					}
				}
			}
			mustRead(t, d, 2*testBlock+512, filled(0xaa, 512))
			mustRead(t, d, 5*testBlock, filled(0xaa, testBlock))
			if off <= 2*testBlock {
				mustRead(t, d, 2*testBlock, append(filled(1, 512), 0xaa))
			}
		}
	}
}

// L6: the last block is short, the disk smaller than a block, the size no
// multiple of a sector.
func TestL6ShortLastBlock(t *testing.T) {
	for _, size := range []int64{1, 511, 512, 513, 4095, 4096, 4097, 8191, 12800, 12801} {
		d, disk := newTestDevice(t, size, Options{BlockSize: testBlock})
		s := d.Attach(&asks{})
		last := (size - 1) / testBlock * testBlock
		// A write of the whole short last block waits for nobody.
		mustWrite(t, d, last, filled(0xaa, size-last))
		if st := d.Stats(); st.Written != 1 || st.BytesLocal != size-last {
			t.Errorf("size %d: %+v", size, st)
		}
		mustWrite(t, s, 0, filled(1, size))
		mustRead(t, d, last, filled(0xaa, size-last))
		if _, err := d.ReadAt(make([]byte, 2), size-1); err != io.EOF {
			t.Errorf("size %d: read past the end: %v", size, err)
		}
		if err := d.Complete(); err != nil {
			t.Errorf("size %d: %v", size, err)
		}
		if st := d.Stats(); st.BytesLocal != size || int64(len(disk.b)) != size {
			t.Errorf("size %d: %+v", size, st)
		}

		// Sector by sector, the last sector is short.
		d2, _ := newTestDevice(t, size, Options{BlockSize: testBlock})
		for off := last; off < size; off += sectorSize {
			mustWrite(t, d2, off, filled(2, min(sectorSize, size-off)))
		}
		mustRead(t, d2, last, filled(2, size-last))
		if st := d2.Stats(); st.Written != 1 || st.Partial != 0 {
			t.Errorf("size %d, sector by sector: %+v", size, st)
		}
	}
}

// L7: a block is not published before its bytes are on the disk, nor after the
// disk failed. Publishing first fails it.
func TestL7PublishedOnlyWhenOnDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, disk := newTestDevice(t, 4*testBlock, Options{BlockSize: testBlock})
		s := d.Attach(&asks{})
		stop := stopAt(disk, "write")
		done := run(func() { mustWrite(t, s, 0, filled(1, 2*testBlock)) })
		reader := run(func() { mustRead(t, d, testBlock, filled(1, testBlock)) })
		for range 2 {
			<-stop.at
			if ended(reader) || d.Stats().Fetched != 0 {
				t.Fatal("published before the write had ended")
			}
			stop.goOn <- struct{}{}
		}
		<-done
		<-reader

		disk.done = nil
		disk.hook = func(op string, _, _ int64) error { return errInjected }
		if _, err := s.WriteAt(filled(2, testBlock), 2*testBlock); !errors.Is(err, errInjected) {
			t.Errorf("the disk failed, but the arrival said %v", err)
		}
		if _, err := d.WriteAt(filled(2, testBlock), 2*testBlock); !errors.Is(err, errInjected) {
			t.Errorf("the disk failed, but the write said %v", err)
		}
		disk.hook = nil
		if st := d.Stats(); st.Fetched != 2 || st.Written != 0 || st.Missing != 2 || st.Partial != 0 {
			t.Errorf("after failures: %+v", st)
		}
	})
}
