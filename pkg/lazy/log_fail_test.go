package lazy

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
)

// Whatever byte of the log is not what it was: what lies before it is laid over
// the disk, what comes behind it is not, and nothing else is changed.
func TestEveryCorruptionOfTheLog(t *testing.T) {
	a := newLogged(t, 8, Options{})
	for i := range byte(5) { // of a time that is over
		a.put(testBlock, filled(0x10+i, 1024))
	}
	if err := a.s.Flush(); err != nil {
		t.Fatal(err)
	}
	states := [][]byte{a.disk.bytes()}
	want := a.disk.bytes()
	for i := range byte(3) {
		off := testBlock + 512*int64(i)
		a.put(off, filled(0x20+i, 700&^511+512))
		copy(want[off:], filled(0x20+i, 1024))
		states = append(states, bytes.Clone(want))
	}
	a.p.kill() // else the log ends by itself
	_ = a.d.Close()
	l, good, disk := a.d.saver.m.log, a.file.durable, a.disk.durable
	open := func(b []byte) []byte {
		m := &machine{disk: crashFileOf(disk, sectorSize), file: crashFileOf(b, 64), boots: a.boots + 1}
		d, err := m.start(newProcess(nil, -1), a.o)
		if err != nil {
			t.Fatal(err)
		}
		_ = d.Close() // looked at
		return m.disk.bytes()
	}
	if !bytes.Equal(open(good), states[3]) {
		t.Fatal("what was logged is not laid over the disk")
	}
	for at := l.marks; at < l.next+logAlign; at++ {
		if at < l.begin && (at-l.marks)%(pageSize/2) > markLen {
			continue // zeroes that mean nothing
		}
		n, in := 3, (at-l.begin)%logAlign
		switch {
		case at < l.begin:
		case in < recordLen+1024+rangeLen:
			n = min(3, int(at-l.begin)/logAlign)
			if in > recordLen && in < recordLen+1024 && at%37 != 0 {
				continue // of the data some are enough
			}
		case at%101 != 0: // not of a record
			continue
		}
		for _, flip := range []byte{1, 0x80} {
			b := bytes.Clone(good)
			b[at] ^= flip
			if !bytes.Equal(open(b), states[n]) {
				t.Fatalf("byte %d of the log ^ %#x: want the first %d records", at-l.begin, flip, n)
			}
		}
	}
	// Records that are cut off, and that lie where another was.
	for n := range 3 {
		b := bytes.Clone(good)
		at := l.begin + int64(n)*logAlign
		clear(b[at+recordLen+512 : at+logAlign])
		if !bytes.Equal(open(b), states[n]) {
			t.Errorf("record %d is cut off", n)
		}
		b = bytes.Clone(good)
		copy(b[at:at+logAlign], good[at+logAlign:])
		if !bytes.Equal(open(b), states[n]) {
			t.Errorf("record %d is another one", n)
		}
	}
	// Of another device.
	other := newBatch()
	if !other.add(filled(9, 512), 0) {
		t.Fatal("no room")
	}
	b := bytes.Clone(good)
	copy(b[l.begin:], other.encode(UUID{9}, 2, 0))
	if !bytes.Equal(open(b), states[0]) {
		t.Error("the log of another device was laid over the disk")
	}
}

// A mark that is torn, in all of its page, is none: the one before it is whole.
func TestTornMark(t *testing.T) {
	a := newLogged(t, 8, Options{})
	for i := range 4 {
		v := byte(2 + i)
		a.put(testBlock, filled(v, 512))
		if i == 3 {
			a.p.hook = func(what string) error {
				if what == "sync map" {
					a.p.kill()
				}
				return nil
			}
		}
		if err := a.s.Flush(); (err == nil) != (i < 3) {
			t.Fatal(err)
		}
	}
	l := a.d.saver.m.log
	a.file.mu.Lock()
	copy(a.file.durable[l.marks+int64(l.epoch&1)*pageSize:][:pageSize], filled(0xff, pageSize))
	a.file.mu.Unlock()
	clear(a.disk.durable)
	a.cut(false, false)
	if !a.d.readable(testBlock, testBlock+512) {
		t.Fatal("the log is forgotten")
	}
	mustRead(t, a.d, testBlock, filled(5, 512))
}

// The power goes at each moment of a start that lays the log over the disk, and
// of the one after it.
func TestPowerCutWhileTheLogIsLaidOverTheDisk(t *testing.T) {
	died := 0
	for n := range 40 {
		r := rand.New(rand.NewPCG(uint64(n), 9))
		a := newLogged(t, 8, Options{})
		a.put(testBlock, filled(2, testBlock))
		a.put(testBlock+512, filled(3, 512))
		a.put(3*testBlock, filled(4, 512))
		a.p.kill()
		_ = a.d.Close() // it is dead
		for _, at := range []int{n, n * 7 % 20} {
			a.losePower(r)
			p := newProcess(r, at)
			d, err := a.machine.start(p, a.o)
			if err == nil {
				p.kill()
				_ = d.Close() // it is dead
			} else if !errors.Is(err, errDead) {
				t.Fatal(err)
			} else {
				died++
			}
		}
		a.losePower(r)
		a.start(newProcess(nil, -1))
		mustRead(t, a.d, testBlock, slices.Concat(filled(2, 512), filled(3, 512), filled(2, testBlock-1024)))
		mustRead(t, a.d, 3*testBlock, filled(4, 512))
	}
	if died < 20 {
		t.Errorf("it died %d times", died)
	}
}

// L12: the log finds no room: the flush says so, and the next is an ordinary one.
func TestL12NoRoomForTheLog(t *testing.T) {
	for _, more := range []bool{false, true} { // is written before the next flush
		a := newLogged(t, 8, Options{})
		a.put(0, filled(1, 512))
		mustWrite(t, a.d, testBlock, filled(2, 512))
		a.first("write map", func() error { return syscall.ENOSPC })
		if err := a.d.Sync(); !errors.Is(err, syscall.ENOSPC) || !MapFull(err) {
			t.Errorf("the flush said %v", err)
		}
		if more {
			mustWrite(t, a.d, testBlock+1024, filled(3, 512))
		}
		if log := a.did(a.sync); !slices.Contains(log, "sync disk") {
			t.Errorf("the next flush did %v", log)
		}
		a.put(testBlock+2048, filled(4, 512))
		a.cut(false, false)
		mustRead(t, a.d, testBlock, filled(2, 512))
		mustRead(t, a.d, testBlock+2048, filled(4, 512))
		if more {
			mustRead(t, a.d, testBlock+1024, filled(3, 512))
		}
	}
}

// L12: what ends the log finds no room: it is not added to any more, and is
// ended by the next flush.
func TestL12NoRoomToEndTheLog(t *testing.T) {
	for which := range 4 { // the bits, the mark; and something is written before the next flush
		a := newLogged(t, 20, Options{})
		a.put(0, filled(1, 512))
		if err := a.d.TrimAtContext(t.Context(), 2*testBlock, testBlock); err != nil { // not logged
			t.Fatal(err)
		}
		n := 0
		a.p.hook = func(what string) error {
			if what == "write map" {
				if n++; n == which%2+1 {
					return syscall.ENOSPC
				}
			}
			return nil
		}
		if err := a.d.Sync(); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("the flush said %v", err)
		}
		a.p.hook = nil
		want := byte(1)
		if which >= 2 {
			want = 3
			mustWrite(t, a.d, 0, filled(3, 512))
		}
		if log := a.did(a.sync); !slices.Contains(log, "sync disk") || a.d.saver.m.log.used() {
			t.Fatalf("the next flush did %v", log)
		}
		a.put(512, filled(4, 512))
		a.cut(false, false)
		mustRead(t, a.d, 0, slices.Concat(filled(want, 512), filled(4, 512)))
		mustRead(t, a.d, 2*testBlock, make([]byte, testBlock))
	}
}

// Every operation of disk and map fails once, in turn: nobody hangs, what was
// flushed outlives a power cut, and who was refused is told.
func TestEveryOperationOfTheLogFailsOnce(t *testing.T) {
	for _, injected := range []error{errInjected, syscall.ENOSPC} {
		for n := 0; ; n++ {
			a := newLogged(t, 20, Options{})
			mustWrite(t, a.s, 0, filled(1, 2*testBlock))
			i, fired := 0, ""
			a.p.hook = func(what string) error {
				if i++; i-1 != n || injected != errInjected && what[:4] == "sync" {
					return nil
				}
				fired = what
				return injected
			}
			sure := make(map[int64]byte) // of sectors, as flushed
			now := make(map[int64]byte)
			said := false
			for k, step := range []func() error{
				func() error { _, err := a.d.WriteAt(filled(1, 512), 512); return err },
				func() error { _, err := a.d.WriteAt(filled(2, 512), 3*testBlock); return err },
				func() error { _, err := a.d.WriteAt(filled(3, 512), 512); return err },
				func() error { return a.d.TrimAtContext(t.Context(), 3*testBlock, testBlock) },
				func() error { _, err := a.d.WriteAt(filled(5, 512), 512); return err },
				func() error { return a.s.Flush() },
				func() error { _, err := a.d.WriteAt(filled(7, 512), 3*testBlock); return err },
			} {
				at := int64(512)
				if k == 1 || k == 3 || k == 6 {
					at = 3 * testBlock
				}
				err := step()
				if err == nil && k != 5 {
					if now[at] = byte(k + 1); k == 3 {
						now[at] = 0
					}
				} else if err != nil {
					said = true
					delete(sure, at) // who knows
					delete(now, at)
				}
				if err := a.d.Sync(); err != nil {
					said = true
				} else {
					for at, v := range now {
						sure[at] = v
					}
				}
			}
			if fired != "" && !said {
				t.Errorf("operation %d, %s, failed, and nobody said so", n, fired)
			}
			failed := a.d.flush.failure() != nil
			a.cut(false, false)
			for at, v := range sure {
				if got := a.disk.bytes()[at]; got != v && !(failed && got > v) {
					t.Errorf("operation %d, %s, failed with %v: sector %d is %d, want %d", n, fired, injected, at/512, got, v)
				}
			}
			if fired == "" && n > i {
				break
			}
		}
	}
}

// The bytes of docs/MAP.md.
func TestLogBytes(t *testing.T) {
	b := newBatch()
	if !b.add(filled(0xaa, 512), 1024) || !b.add(filled(0xbb, 512), 4096) {
		t.Fatal("no room")
	}
	rec := b.encode(UUID{1, 2}, 7, 3)
	want := "73696c6f2d6c6f67" + "26384254" + "60040000" + // magic, checksum, length
		"01020000000000000000000000000000" + "0700000000000000" + "03000000" + "02000000" + // device, epoch, index, ranges
		"00000000000000000000000000000000"
	if got := hex.EncodeToString(rec[:recordLen]); got != want || len(rec) != logAlign {
		t.Errorf("%d bytes, %s, want %s", len(rec), got, want)
	}
	want = "0004000000000000" + "0006000000000000" + "0010000000000000" + "0012000000000000"
	if got := hex.EncodeToString(rec[recordLen+1024 : 0x460]); got != want {
		t.Errorf("ranges %s, want %s", got, want)
	}
	h := header{version: 2, seq: 1, state: MapLive, id: testID, log: testLog, flags: flagLog}
	slot := h.encode()
	if got, err := decodeSlot(slot); err != nil || got != h || hex.EncodeToString(slot[4088:4092]) != "00000100" {
		t.Errorf("%+v, %v", got, err)
	}
	for disk, want := range map[int64]int64{0: 64 << 10, 64 << 20: 256 << 10, 1 << 40: 4 << 20} {
		if got := logSize(disk); got != want {
			t.Errorf("a log of %d for a disk of %d, want %d", got, disk, want)
		}
	}
}
