package lazy

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
)

// newBound is a device in standby on a disk of 64 blocks that its map is bound to. Each
// of the blocks is here, and durable.
func newBound(t *testing.T) *alive {
	t.Helper()
	a := newAlive(t, 64, Options{Standby: true})
	if err := a.d.Close(); err != nil {
		t.Fatal(err)
	}
	a.mark = newCrashFile(int64(len(Mark{})), len(Mark{}))
	a.start(newProcess(nil, -1))
	for i := range int64(64) {
		mustWrite(t, a.s, i*testBlock, filled(byte(i+1), testBlock))
	}
	if err := a.s.Flush(); err != nil {
		t.Fatal(err)
	}
	return a
}

// opened is the map of a machine that nobody has.
func (a *alive) opened(t *testing.T) *Map {
	t.Helper()
	return must(t)(openMap(crashMap{handle{f: a.file, p: newProcess(nil, -1), name: "map"}}, Identity{}))
}

// Wherever the power goes or an operation fails while a map is bound, it knows its disk
// afterwards, and no other one (fault F1, trap I6).
func TestMapKnowsItsDiskWhereverBindingEnds(t *testing.T) {
	for _, kill := range []bool{true, false} {
		for n := 0; ; n++ {
			a := newBound(t)
			_ = a.d.Close() // clean
			p := newProcess(rand.New(rand.NewPCG(uint64(n), 1)), -1)
			if kill {
				p.endAt = n
			} else {
				p.failAt = n
			}
			a.p = p
			d, err := a.machine.start(p, a.o)
			if err == nil {
				err = d.Close()
			}
			fired := p.isDead() || p.failed != ""
			if err != nil && !errors.Is(err, errDead) && !errors.Is(err, errInjected) {
				t.Errorf("operation %d: %v", n, err)
			}
			if n%2 == 0 {
				a.losePower(p.r)
			}
			m := a.opened(t)
			if err := a.wrongDisk(m, newProcess(nil, -1)); err != nil {
				t.Errorf("operation %d: %v", n, err)
			}
			if m.Binding().Bears(Mark{1}) || m.Binding().Bears(Mark{}) {
				t.Errorf("operation %d: any disk will do: %+v", n, m.Binding())
			}
			if !fired {
				break
			}
		}
	}
}

// How many samples of a disk differ tells another disk, and an older state of it, from
// the right one (fault F1).
func TestWitnessTellsAnotherDisk(t *testing.T) {
	a := newBound(t)
	a.renew()
	m := a.opened(t)
	k := m.Binding()
	if len(k.witness) != maxSamples || k.Clean {
		t.Fatalf("%d samples, clean %t", len(k.witness), k.Clean)
	}
	good := a.disk.bytes()
	older := bytes.Clone(good)
	clear(older[k.witness[3].block*testBlock:][:testBlock])
	for _, c := range []struct {
		what string
		disk []byte
		want int
	}{
		{"the disk", good, 0},
		{"an older state", older, 1},
		{"another disk", bytes.Repeat([]byte{0xaa}, len(good)), maxSamples},
		{"zeroes", make([]byte, len(good)), maxSamples},
	} {
		if differ, n, err := k.Witness(bytes.NewReader(c.disk), m.Identity()); differ != c.want || n != maxSamples || err != nil {
			t.Errorf("%s: %d of %d samples differ (%v), want %d", c.what, differ, n, err, c.want)
		}
	}
	if _, _, err := k.Witness(bytes.NewReader(good[:100]), m.Identity()); err == nil {
		t.Error("a disk that cannot be read")
	}
	// After a sync that failed nobody knows what the disk has.
	if err := m.update(func(h *header) { h.flags |= flagFailed }); err != nil {
		t.Fatal(err)
	}
	if _, n, err := m.Binding().Witness(bytes.NewReader(good), m.Identity()); n != 0 || err != nil {
		t.Errorf("%d samples after a failed sync, %v", n, err)
	}
}

// renew has samples taken now.
func (a *alive) renew() {
	a.t.Helper()
	if err := a.d.renewWitness(a.t.Context(), true); err != nil {
		a.t.Fatal(err)
	}
}

// A client's write to a block of which there is a sample: the map has dropped that
// before the disk is written, so that the right disk is never refused (fault F1).
func TestSampleIsDroppedBeforeItsBlockIsWritten(t *testing.T) {
	for n := 0; ; n++ {
		a := newBound(t)
		mustGoLive(t, a.d)
		a.renew()
		a.p.r = rand.New(rand.NewPCG(uint64(n), 1))
		a.p.endAt = len(a.p.done()) + n
		block := a.opened(t).Binding().witness[5].block
		_, err := a.d.WriteAt(filled(0xee, 512), block*testBlock)
		if err == nil {
			_, err = a.d.WriteAt(filled(0xee, 3*testBlock), (block+2)*testBlock)
		}
		died := a.p.isDead()
		a.cut(true, false) // fails the test if the disk is refused
		if err == nil && a.samples() >= maxSamples {
			t.Errorf("%d samples", a.samples())
		}
		if !died {
			break
		}
	}
}

// A write that was under way when samples were taken anew is in them, or their block
// has none (fault F1).
func TestWriteUnderWayWhileSamplesAreTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newBound(t)
		mustGoLive(t, a.d)
		goOn := a.hold("write disk")
		wrote := make(chan struct{})
		go func() {
			defer close(wrote)
			_, _ = a.d.WriteAt(filled(0xee, 64*testBlock), 0) // fails if the process is killed before
		}()
		synctest.Wait()
		renewed := make(chan struct{})
		go func() { defer close(renewed); a.renew() }()
		synctest.Wait()
		if ended(renewed) {
			t.Error("samples were taken of what is being written")
		}
		close(goOn)
		<-wrote
		<-renewed
		a.cut(true, false)
	})
}

// The same for a write that began while the samples before were taken (fault F1).
func TestWriteUnderWaySinceTheSamplesBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newBound(t)
		mustGoLive(t, a.d)
		holds := map[string]chan struct{}{"sync disk": make(chan struct{}), "write disk": make(chan struct{})}
		a.p.hook = func(op string) error {
			if c := holds[op]; c != nil {
				<-c
			}
			return nil
		}
		first := make(chan struct{})
		go func() { defer close(first); a.renew() }()
		synctest.Wait() // it flushes the disk
		wrote := make(chan struct{})
		go func() {
			defer close(wrote)
			_, _ = a.d.WriteAt(filled(0xee, 64*testBlock), 0) // fails if the process is killed before
		}()
		synctest.Wait()
		close(holds["sync disk"])
		if !ended(first) {
			t.Fatal("samples wait for a write to blocks of which they are not")
		}
		second := make(chan struct{})
		go func() { defer close(second); a.renew() }()
		if ended(second) {
			t.Error("samples were taken of what is being written")
		}
		close(holds["write disk"])
		<-wrote
		<-second
		a.cut(true, false)
	})
}

// What was taken back comes anew, with other contents: the witness does not stand for it
// any more (fault F1).
func TestWitnessForgetsWhatIsTakenBack(t *testing.T) {
	a := newBound(t)
	a.renew()
	var list []uint32
	for b := range uint32(64) {
		if b != 40 && b != 41 {
			list = append(list, b)
		}
	}
	if err := a.s.DirtyList(list); err != nil {
		t.Fatal(err)
	}
	for _, s := range a.opened(t).Binding().witness {
		if s.block != 40 && s.block != 41 {
			t.Errorf("block %d was taken back", s.block)
		}
	}
	if err := a.d.Restart(UUID{7}, 8); err != nil {
		t.Fatal(err)
	}
	if n := len(a.opened(t).Binding().witness); n > 0 {
		t.Errorf("%d samples after a restart", n)
	}
}

// A dirty list that ends half-way, whatever of it is in the map, leaves no sample of a block
// that comes anew (fault F1).
func TestWitnessForgetsWhatWasTakenBackHalfWay(t *testing.T) {
	for n := 0; ; n++ {
		died := false
		for _, kept := range []span{{0, 0}, {0, headerSize}, {headerSize, 1 << 30}, {0, 1 << 30}} {
			a := newBound(t)
			a.renew()
			a.p.r = rand.New(rand.NewPCG(uint64(n), 1))
			a.p.endAt = len(a.p.done()) + n
			_ = a.s.DirtyList([]uint32{0, 1, 2, 3, 4, 5, 6, 7}) // fails where the process dies of it
			died = a.p.isDead()
			a.file.keep(kept.lo, kept.hi)
			a.cut(false, false)
			for b := range int64(8) {
				if !a.d.state.isLocal(b) {
					mustWrite(t, a.s, b*testBlock, filled(0xee, testBlock))
				}
			}
			a.cut(true, false) // fails the test if the disk is refused
		}
		if !died {
			break
		}
	}
}

// A complete disk has a mark of its own, so that its map is not taken for that of the
// disk when it was not whole (trap I6).
func TestCompleteDiskHasAnotherMark(t *testing.T) {
	a := newBound(t)
	was := a.bears()
	mustGoLive(t, a.d)
	if err := a.d.Complete(); err != nil {
		t.Fatal(err)
	}
	k := a.opened(t).Binding()
	if now := a.bears(); now == was || !k.Bears(now) || k.Bears(was) {
		t.Errorf("complete: the disk bears %v, and bore %v: %+v", now, was, k)
	}
	a.cut(false, false)
	if !a.d.Stats().Complete {
		t.Errorf("started again: %+v", a.d.Stats())
	}
}

// A map that was kept while its process ran is not that of the disk any more when the
// process has ended: it knows nothing of what was written since (trap I6).
func TestMapOfBeforeACleanEndIsRefused(t *testing.T) {
	a := newBound(t)
	mustGoLive(t, a.d)
	kept := a.opened(t).Binding()
	if !kept.Bears(a.bears()) {
		t.Fatalf("the disk bears %v, the map has %+v", a.bears(), kept)
	}
	mustWrite(t, a.d, 0, filled(9, testBlock))
	if err := a.d.Close(); err != nil {
		t.Fatal(err)
	}
	if kept.Bears(a.bears()) {
		t.Error("the map of before is taken for the present one")
	}
	if k := a.opened(t).Binding(); !k.Bears(a.bears()) || !k.Clean {
		t.Errorf("the disk bears %v, its map has %+v", a.bears(), k)
	}
}

// Without room for the note of a clean end the end was no clean one (fault F13).
func TestCleanEndWithoutRoomIsNoError(t *testing.T) {
	a := newBound(t)
	mustGoLive(t, a.d)
	mustWrite(t, a.d, 0, filled(9, testBlock))
	a.sync()
	a.first("write map", func() error { return syscall.ENOSPC })
	if err := a.d.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if a.opened(t).Binding().Clean {
		t.Error("a clean end was noted")
	}
	a.start(newProcess(nil, -1))
}

// What is accepted as a header says the same when it is written again, and nothing in
// it points outside the disk.
func FuzzHeader(f *testing.F) {
	h := header{version: 2, seq: 7, state: MapLive, id: testID, epoch: epochs{now: 1, before: 2, steps: 3, beforesSteps: 4}}
	f.Add(h.encode())
	h.bond = bond{flags: bondMarking, mark: Mark{1}, before: Mark{2}, stamp: strings.Repeat("s", MaxStamp), count: maxSamples}
	for i := range h.bond.samples {
		h.bond.samples[i] = sample{int64(i), [16]byte{byte(i)}}
	}
	f.Add(h.encode())
	f.Add(oldHeader(h, "vm"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) != slotSize {
			return
		}
		binary.LittleEndian.PutUint32(b[crcAt:], crc32.Checksum(b[:crcAt], castagnoli))
		h, err := decodeSlot(b)
		if err != nil {
			if !errors.Is(err, ErrNotMap) && !errors.Is(err, ErrMapNewer) && !errors.Is(err, ErrMapDamaged) && !strings.Contains(err.Error(), "finish with the program") {
				t.Fatalf("refused by %v", err)
			}
			return
		}
		again, err := decodeSlot(h.encode())
		if err != nil || again != h {
			t.Fatalf("accepted %+v, and written again it is %+v (%v)", h, again, err)
		}
		blocks := blocksOf(h.id.Size, h.id.BlockSize)
		for _, s := range h.binding().witness {
			if s.block < 0 || s.block >= blocks {
				t.Fatalf("a witness of block %d of %d", s.block, blocks)
			}
		}
	})
}
