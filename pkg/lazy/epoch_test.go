package lazy

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
)

func mustBegin(t *testing.T, d *Device, confirmed uint64) Epoch {
	t.Helper()
	e, err := d.BeginEpoch(confirmed)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// A source knows the state that it has confirmed, with the steps that were made in
// it, also when the answer that told of the next epoch was lost; a copy that was
// taken before is another state (fault A6, trap I5).
func TestEpochTellsTheStatesOfADeviceApart(t *testing.T) {
	for _, mapped := range []bool{false, true} {
		var d *Device
		restart := func() {}
		if mapped {
			a := newAlive(t, 8, Options{Standby: true})
			d, restart = a.d, func() { a.cut(false, false); d = a.d }
		} else {
			d, _ = newTestDevice(t, 8*testBlock, Options{Standby: true, BlockSize: testBlock})
		}
		s := func() *Stream { return d.Attach(&asks{}) }
		first := mustBegin(t, d, 0)
		if first.Now == 0 || first.Before != 0 || first.Steps != 0 {
			t.Errorf("the first epoch is %+v", first)
		}
		mustWrite(t, s(), 0, filled(1, 8*testBlock))
		for _, list := range [][]uint32{{1}, {1}, {2, 3}, nil} { // nothing is taken back by the last
			if err := s().DirtyList(list); err != nil {
				t.Fatal(err)
			}
		}
		restart()
		lost := mustBegin(t, d, first.Now)
		if lost.Now == first.Now || lost.Before != first.Now || lost.Steps != 3 {
			t.Errorf("the second epoch is %+v, the first %+v", lost, first)
		}
		restart()
		second := mustBegin(t, d, first.Now) // the source never heard of lost
		if second.Now == lost.Now || second.Before != first.Now || second.Steps != 3 {
			t.Errorf("the second epoch, again, is %+v", second)
		}
		mustGoLive(t, d)
		mustGoLive(t, d)
		restart()
		if e := mustBegin(t, d, 77); e.Before != first.Now || e.Steps != 4 {
			t.Errorf("a source that knows another epoch was told %+v", e)
		}
		third := d.Epoch()
		if e := mustBegin(t, d, third.Now); e.Before != third.Now || e.Steps != 0 {
			t.Errorf("the epoch after %+v is %+v", third, e)
		}
	}
}

// A source that has confirmed an epoch after it had announced its disks on a newer
// connection, by the epoch before, knows the device all the same; not one from before
// those, nor a copy that was made before (fault A6, traps I5 and M7).
func TestAnEpochThatIsConfirmedLateIsKnown(t *testing.T) {
	a := newAlive(t, 8, Options{Standby: true})
	first := mustBegin(t, a.d, 0)
	second := mustBegin(t, a.d, first.Now)
	if err := a.d.Step(); err != nil {
		t.Fatal(err)
	}
	third := mustBegin(t, a.d, first.Now) // announced before second was confirmed
	a.cut(false, false)
	if e := mustBegin(t, a.d, second.Now); e.Before != second.Now || e.Steps != 1 {
		t.Errorf("%+v follows %+v", e, second)
	}
	for _, gone := range []Epoch{first, {Now: 77}} {
		if e := mustBegin(t, a.d, gone.Now); e.Before != second.Now {
			t.Errorf("%+v follows %+v", e, gone)
		}
	}
	if e := mustBegin(t, a.d, third.Now); e.Before != third.Now || e.Steps != 0 {
		t.Errorf("%+v follows %+v", e, third)
	}
	for range maxDrawn + 1 {
		mustBegin(t, a.d, third.Now)
	}
	if e := mustBegin(t, a.d, third.Now); e.Before != third.Now {
		t.Errorf("%+v follows %+v, of many connections before", e, third)
	}
}

// Wherever the power goes: no answer was given that the epoch does not count, and
// what is counted was at least asked for (fault A6, trap D3).
func TestStepsAreDurableBeforeTheyAreAnswered(t *testing.T) {
	for n := 0; ; n++ {
		a := newAlive(t, 8, Options{Standby: true})
		mustWrite(t, a.s, 0, filled(1, 8*testBlock))
		if err := a.s.Flush(); err != nil {
			t.Fatal(err)
		}
		confirmed := mustBegin(t, a.d, 0).Now
		a.p.r = rand.New(rand.NewPCG(uint64(n), 1))
		a.p.endAt = len(a.p.done()) + n
		asked, answered := uint32(0), uint32(0)
		try := func(err error) {
			if asked++; err == nil {
				answered++
			}
		}
		try(a.s.DirtyList([]uint32{1}))
		if asked == answered {
			try(a.s.DirtyList([]uint32{2}))
		}
		if asked == answered {
			try(a.d.GoLive())
		}
		died := a.p.isDead()
		a.losePower(a.p.r)
		a.cut(false, false)
		if e := mustBegin(t, a.d, confirmed); e.Before != confirmed || e.Steps < answered || e.Steps > asked {
			t.Fatalf("operation %d: %+v after %d of %d steps", n, e, answered, asked)
		}
		if !died {
			break
		}
	}
}

// A complete device has epochs, too: its source may not have heard that it is
// complete (fault A6).
func TestCompleteDeviceHasEpochs(t *testing.T) {
	a := newAlive(t, 8, Options{})
	confirmed := mustBegin(t, a.d, 0).Now
	mustWrite(t, a.s, 0, filled(1, 8*testBlock))
	if err := a.d.Complete(); err != nil {
		t.Fatal(err)
	}
	next := mustBegin(t, a.d, confirmed)
	if next.Before != confirmed {
		t.Errorf("%+v does not follow %d", next, confirmed)
	}
	a.cut(false, false)
	if e := mustBegin(t, a.d, next.Now); !a.d.Stats().Complete || e.Before != next.Now {
		t.Errorf("started again: %+v does not follow %+v", e, next)
	}
}

// Without room there is no new epoch, the old one stays, and there is one when
// there is room (fault F13, trap I11).
func TestEpochWithoutRoomIsTriedAgain(t *testing.T) {
	a := newAlive(t, 8, Options{Standby: true})
	was := a.d.Epoch()
	a.first("write map", func() error { return syscall.ENOSPC })
	if _, err := a.d.BeginEpoch(0); !NoRoom(err) || !MapFull(err) || a.d.Epoch() != was {
		t.Errorf("%v; the epoch is %+v, was %+v", err, a.d.Epoch(), was)
	}
	if e := mustBegin(t, a.d, was.Now); e.Before != was.Now {
		t.Errorf("%+v does not follow %+v", e, was)
	}
}

// Restart changes whose the map is, and a power cut between the two copies of that
// header is no contradiction (trap D7).
func TestRestartIsWholeAtEveryPowerCut(t *testing.T) {
	for n := 0; ; n++ {
		died := false
		for _, kept := range []span{{0, 0}, {0, slotSize}, {slotSize, headerSize}, {headerSize, 1 << 30}, {0, 1 << 30}} {
			a := newAlive(t, 8, Options{Standby: true})
			mustWrite(t, a.s, 0, filled(1, 8*testBlock))
			if err := a.s.Flush(); err != nil {
				t.Fatal(err)
			}
			a.p.r = rand.New(rand.NewPCG(uint64(n), 1))
			a.p.endAt = len(a.p.done()) + n
			err := a.d.Restart(UUID{7}, 8)
			died = a.p.isDead()
			a.file.keep(kept.lo, kept.hi)
			a.cut(false, false) // fails the test if the map cannot be opened
			id := a.d.epoch.m.Identity()
			if renamed := id.Source == (UUID{7}); err == nil && !renamed || renamed && len(a.local()) > 0 {
				t.Fatalf("operation %d, with %v: %v; the map is of %v, local %v", n, kept, err, id.Source, a.local())
			}
		}
		if !died {
			break
		}
	}
}

// keep makes durable what was written in [lo, hi), and nothing else.
func (f *crashFile) keep(lo, hi int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for u, v := range f.since {
		if at := u * f.grain; lo <= int64(at) && int64(at) < hi {
			copy(f.durable[at:], v[len(v)-1])
		}
	}
	f.since = make(map[int][][]byte)
}

// oldHeader makes version 1 of a slot.
func oldHeader(h header, name string) []byte {
	h.version, h.id.Name = 1, ""
	b := h.encode()
	binary.LittleEndian.PutUint16(b[nameAt:], uint16(len(name)))
	copy(b[nameAt+2:], name)
	binary.LittleEndian.PutUint32(b[crcAt:], crc32.Checksum(b[:crcAt], castagnoli))
	return b
}

// A map of version 1 is read, and becomes one of the present version when a device
// has it; until then it is not touched.
func TestMapOfVersion1IsUpgraded(t *testing.T) {
	m := newMachine(testID, 0)
	h, _, err := readHeader(crashMap{handle{f: m.file, p: newProcess(nil, -1), name: "map"}})
	if err != nil {
		t.Fatal(err)
	}
	old := oldHeader(h, "vm")
	copy(m.file.now, append(old, old...))
	copy(m.file.durable, m.file.now)
	d, err := m.start(newProcess(nil, -1), Options{Standby: true})
	if err != nil {
		t.Fatal(err)
	}
	if h := d.epoch.m.header(); h.version != mapVersion || h.id.Name != "vm" || h.epoch.now == 0 {
		t.Errorf("upgraded to %+v", h)
	}
	e := mustBegin(t, d, d.Epoch().Now)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d, err = m.start(newProcess(nil, -1), Options{Standby: true})
	if err != nil {
		t.Fatal(err)
	}
	if got := d.Epoch(); got.Now != e.Now || got.Before != e.Before {
		t.Errorf("epoch %+v, want %+v", got, e)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}

	long := oldHeader(h, strings.Repeat("n", maxMapName+1))
	if _, err := decodeSlot(long); err == nil || errors.Is(err, ErrMapDamaged) || !strings.Contains(err.Error(), "finish with the program that made it") {
		t.Errorf("a name that does not fit any more: %v", err)
	}
}
