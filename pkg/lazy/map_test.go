package lazy

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

var testID = Identity{Size: 40*testBlock + 700, BlockSize: testBlock, Device: UUID{1}, Source: UUID{2, 3}, Generation: 9}

// onDisk makes a map file, lets f use a device on it, and returns its path.
func onDisk(t *testing.T, id Identity, o Options, f func(d *Device)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.silo-nbd")
	m, err := CreateMap(path, id)
	if err != nil {
		t.Fatal(err)
	}
	useMap(t, m, o, f)
	return path
}

// useMap lets f use a device on the map, and closes both.
func useMap(t *testing.T, m *Map, o Options, f func(d *Device)) {
	t.Helper()
	o.Map = m
	d := newDeviceOn(t, newMemDisk(m.Identity().Size), o)
	if f != nil {
		f(d)
	}
	if err := errors.Join(d.Close(), m.Close()); err != nil {
		t.Fatal(err)
	}
}

// The bytes of docs/MAP.md.
func TestMapHeaderBytes(t *testing.T) {
	h := header{version: 2, seq: 7, flags: flagRevocable, state: MapLive, id: testID, epoch: epochs{now: 3, before: 4, steps: 5, beforesSteps: 6, drawn: [maxDrawn]drawnEpoch{{7, 8}, {9, 10}}}}
	b := h.encode()
	want := "73696c6f2d6d6170" + "02000000" + "01000000" + "0700000000000000" + // magic, version, flags, sequence
		"bc82020000000000" + "00100000" + "02000000" + // size, block size, state
		"01000000000000000000000000000000" + "02030000000000000000000000000000" + "0900000000000000"
	if got := hex.EncodeToString(b[:80]); got != want || len(b) != slotSize {
		t.Errorf("%d bytes, %s, want %s", len(b), got, want)
	}
	if got := hex.EncodeToString(b[2048:2072]); got != "0300000000000000"+"0400000000000000"+"05000000"+"06000000" {
		t.Errorf("epoch %s", got)
	}
	if got, err := decodeSlot(b); err != nil || got != h {
		t.Errorf("%+v, %v", got, err)
	}
	// 1 TiB in blocks of 64 KiB: 2 MiB of each bit, 256 MiB of masks.
	l := Identity{Size: 1 << 40, BlockSize: 64 << 10}.layout()
	if l.page(0) != 8192 || l.page(l.pages) != 8192+2<<20 || l.masks != 8192+4<<20 || l.end != 8192+260<<20 {
		t.Errorf("%+v", l)
	}
}

func TestMapGoesOnWhereItWas(t *testing.T) {
	path := onDisk(t, testID, Options{Standby: true}, func(d *Device) {
		mustWrite(t, d.Attach(&asks{}), 3*testBlock, filled(1, 2*testBlock))
	})
	m, err := OpenMap(path, testID)
	if err != nil {
		t.Fatal(err)
	}
	if m.Identity() != testID || m.State() != MapStandby {
		t.Errorf("%+v, %v", m.Identity(), m.State())
	}
	useMap(t, m, Options{Standby: true}, func(d *Device) {
		if st := d.Stats(); st.Live || st.Fetched != 2 {
			t.Errorf("%+v", st)
		}
		mustGoLive(t, d)
		mustWrite(t, d, 10*testBlock, filled(2, testBlock))
		mustWrite(t, d, 40*testBlock+512, filled(2, 188)) // in the short last block
		if _, err := New(newMemDisk(testID.Size), Options{Map: m}); err == nil {
			t.Error("two devices on one map")
		}
	})
	i, err := Inspect(path)
	if err != nil {
		t.Fatal(err)
	}
	var missing [][2]int64
	i.EachMissing(func(off, length int64) bool { missing = append(missing, [2]int64{off, length}); return true })
	if i.InUse || i.State != MapLive || i.Identity != testID || i.Blocks != 41 || i.Fetched != 2 || i.Written != 1 || i.Missing != 38 || i.Partial != 1 ||
		i.BytesLocal != 3*testBlock || !slices.Equal(missing, [][2]int64{{0, 3 * testBlock}, {5 * testBlock, 5 * testBlock}, {11 * testBlock, 29*testBlock + 700}}) {
		t.Errorf("%+v, missing %v", i, missing)
	}
	if m, err = OpenMap(path, Identity{}); err != nil {
		t.Fatal(err)
	}
	useMap(t, m, Options{Standby: true}, func(d *Device) { // live all the same
		s := d.Attach(&asks{})
		mustWrite(t, s, 0, filled(1, testID.Size))
		if i, err := Inspect(path); err != nil || !i.InUse || i.Missing != 38 {
			t.Errorf("in use: %+v, %v", i, err)
		}
		if err := d.Complete(); err != nil {
			t.Fatal(err)
		}
	})
	info, err := os.Stat(path)
	if err != nil || info.Size() != headerSize {
		t.Fatalf("complete: %v, %v", info, err)
	}
	if i, err := Inspect(path); err != nil || i.State != MapComplete || i.Missing != 0 || i.BytesLocal != testID.Size {
		t.Errorf("complete: %+v, %v", i, err)
	}
	if m, err = OpenMap(path, testID); err != nil {
		t.Fatal(err)
	}
	useMap(t, m, Options{}, func(d *Device) {
		if st := d.Stats(); !st.Complete || !st.Live || st.Missing != 0 || !d.direct.Load() {
			t.Errorf("complete: %+v", st)
		}
		if err := d.Complete(); err != nil {
			t.Error(err)
		}
		mustWrite(t, d, 0, filled(5, testBlock))
		if _, err := d.Attach(&asks{}).WriteAt(filled(9, testBlock), 0); !errors.Is(err, ErrComplete) {
			t.Errorf("late: %v", err)
		}
		mustRead(t, d, 0, filled(5, testBlock))
	})
}

// What a map holds after random changes is what the next device has, whatever
// the block size.
func TestMapHoldsEveryBlockSize(t *testing.T) {
	r := rand.New(rand.NewPCG(8, 8))
	for _, bs := range []int64{512, 1024, 2048, 4096, 16 << 10, 32 << 10, 64 << 10, 1 << 20, 32 << 20, 64 << 20} {
		for _, revocable := range []bool{false, true} {
			id := Identity{Size: bs*(3+r.Int64N(9)) + 5*512 + 3 + r.Int64N(2)<<26, BlockSize: bs}
			m := &machine{disk: newCrashFile(0, sectorSize), file: newCrashFile(0, sectorSize)}
			file := crashMap{handle{f: m.file, p: newProcess(nil, -1), name: "map"}}
			if _, err := newMap(file, id, 0); err != nil {
				t.Fatal(err)
			}
			o := Options{Revocable: revocable}
			open := func() *Device {
				o.Map = must(t)(openMap(file, Identity{}))
				return newDeviceOn(t, vast{uint64(id.Size)}, o)
			}
			d := open()
			for range 5 {
				s := d.Attach(&asks{})
				for range 20 {
					off := r.Int64N(id.Size) / 512 * 512
					n := min(512*(1+r.Int64N(40)), id.Size-off)
					switch r.IntN(4) {
					case 0:
						b := off / bs * bs
						if err := s.ZeroAt(b, min(bs*(1+r.Int64N(3)), id.Size-b), true); err != nil {
							t.Fatal(err)
						}
					case 1:
						b := off / bs * bs
						if err := d.ZeroAtContext(t.Context(), b, min(bs, id.Size-b), true); err != nil {
							t.Fatal(err)
						}
					default:
						if err := d.ZeroAtContext(t.Context(), off, n, true); err != nil {
							t.Fatal(err)
						}
					}
				}
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
				e := open()
				for b := range d.state.blocks {
					full := e.state.written.get(b) // all sectors one by one: written, without a bit
					if e.state.isLocal(b) != d.state.isLocal(b) || full != d.state.written.get(b) {
						t.Fatalf("blocks of %d: block %d is not what it was", bs, b)
					}
					was, is := d.state.partial.get(b), e.state.partial.get(b)
					if !slices.Equal(was, is) {
						t.Fatalf("blocks of %d: the mask of block %d is %x, was %x", bs, b, is, was)
					}
				}
				if d.Stats().Fetched != e.Stats().Fetched || d.Stats().Partial != e.Stats().Partial {
					t.Fatalf("blocks of %d: %+v, was %+v", bs, e.Stats(), d.Stats())
				}
				d = e
			}
		}
	}
}

func must(t *testing.T) func(m *Map, err error) *Map {
	return func(m *Map, err error) *Map {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
}

// D7, D8: a map that belongs to something else is refused, names what differs,
// and is not touched; nor is the disk.
func TestD7ForeignMapsAreRefused(t *testing.T) {
	path := onDisk(t, testID, Options{}, nil)
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for what, want := range map[string]Identity{
		"its size":               {Size: testID.Size + 1},
		"its block size":         {BlockSize: 512},
		"its device":             {Device: UUID{9}},
		"its source disk":        {Source: UUID{9}},
		"its source's generatio": {Source: testID.Source, Generation: 10},
	} {
		if _, err := OpenMap(path, want); !errors.Is(err, ErrMapMismatch) || !strings.Contains(err.Error(), what) || !strings.HasPrefix(err.Error(), path) {
			t.Errorf("%s: %v", what, err)
		}
	}
	m := must(t)(OpenMap(path, Identity{}))
	for _, size := range []int64{0, testID.Size - 1, testID.Size + 1} { // the disk has shrunk or grown
		if _, err := New(newMemDisk(size), Options{Map: m}); !errors.Is(err, ErrMapMismatch) {
			t.Errorf("a disk of %d bytes: %v", size, err)
		}
	}
	if _, err := New(newMemDisk(testID.Size), Options{Map: m, BlockSize: 512}); !errors.Is(err, ErrMapMismatch) {
		t.Errorf("blocks of 512: %v", err)
	}
	if _, err := New(newMemDisk(testID.Size), Options{Map: m, Revocable: true}); !errors.Is(err, ErrMapMismatch) {
		t.Errorf("revocable, and live before without: %v", err)
	}
	// D10: a second process on the disk.
	if _, err := OpenMap(path, Identity{}); !errors.Is(err, ErrMapInUse) {
		t.Errorf("opened twice: %v", err)
	}
	if _, err := CreateMap(path, testID); !errors.Is(err, os.ErrExist) {
		t.Errorf("created over a map: %v", err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
		t.Errorf("a refused map was changed: %v", err)
	}
	if names, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".*")); len(names) != 0 {
		t.Errorf("left behind: %v", names)
	}
}

// D7: each byte of the header, in one copy and in both: the map is what it was,
// or it is refused and not touched.
func TestD7EveryCorruptionOfTheHeader(t *testing.T) {
	id := testID
	m := newMachine(id, 0)
	p := newProcess(nil, -1)
	d, err := m.start(p, Options{})
	if err != nil {
		t.Fatal(err)
	}
	mustWrite(t, d, 0, filled(1, testBlock))
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	good := m.file.bytes()
	open := func(b []byte) (*Map, []byte, error) {
		f := crashFileOf(b, sectorSize)
		on, err := openMap(crashMap{handle{f: f, p: newProcess(nil, -1), name: "map"}}, Identity{})
		return on, f.bytes(), err
	}
	for i := range slotSize {
		for _, flip := range []byte{1, 0x80, 0xff} {
			for slot := range 2 {
				b := bytes.Clone(good)
				b[slot*slotSize+i] ^= flip
				on, after, err := open(b)
				if err != nil || on.Identity() != id || on.State() != MapLive || !bytes.Equal(after, good) {
					t.Fatalf("byte %d of copy %d: %v", i, slot, err)
				}
			}
			b := bytes.Clone(good)
			b[i] ^= flip
			b[slotSize+i] ^= flip
			_, after, err := open(b)
			if want := errors.Is(err, ErrMapDamaged) || i < len(mapMagic) && errors.Is(err, ErrNotMap); !want || !bytes.Equal(after, b) {
				t.Fatalf("byte %d of both copies: %v, touched %t", i, err, !bytes.Equal(after, b))
			}
		}
	}
	// Truncated, and longer than it should be.
	for n := range len(good) + 10 {
		b := append(bytes.Clone(good), make([]byte, 10)...)[:n]
		_, after, err := open(b)
		switch {
		case n == len(good) && err == nil:
		case n < len(mapMagic) && errors.Is(err, ErrNotMap): // who knows
		case !errors.Is(err, ErrMapDamaged) || !bytes.Equal(after, b):
			t.Fatalf("%d of %d bytes: %v", n, len(good), err)
		}
	}
	// A later version, another flag, and what is no state, with a good checksum.
	for at, want := range map[int]error{8: ErrMapNewer, 12: ErrMapNewer, 36: ErrMapDamaged, 32: ErrMapDamaged, 31: ErrMapDamaged} {
		for _, slots := range [][]int{{0}, {1}, {0, 1}} {
			b := bytes.Clone(good)
			for _, slot := range slots {
				s := b[slot*slotSize:][:slotSize]
				s[at] += 0x82
				binary.LittleEndian.PutUint32(s[crcAt:], crc32.Checksum(s[:crcAt], castagnoli))
			}
			_, after, err := open(b)
			if len(slots) == 1 && want == ErrMapDamaged && err == nil {
				continue // the other copy is good
			}
			if !errors.Is(err, want) || !bytes.Equal(after, b) {
				t.Errorf("byte %d in copies %v: %v", at, slots, err)
			}
		}
	}
	// Something else altogether.
	for _, b := range [][]byte{nil, []byte("QFI\xfb"), bytes.Repeat([]byte("foreign "), 5000), make([]byte, 100<<10)} {
		if _, after, err := open(b); !errors.Is(err, ErrNotMap) || !bytes.Equal(after, b) {
			t.Errorf("%.10q: %v", b, err)
		}
	}
	// Bits of blocks and sectors that the disk does not have.
	l := id.layout()
	for _, off := range []int64{l.page(0) + 5, l.page(0) + 4000, l.page(1) + 6, l.masks + 41, l.end - 1} {
		b := bytes.Clone(good)
		b[off] |= 0x40
		on, _, err := open(b)
		if err != nil {
			t.Fatal(err)
		}
		disk := newMemDisk(id.Size)
		disk.hook = func(string, int64, int64) error { t.Error("the disk was touched"); return nil }
		if _, err := New(disk, Options{Map: on}); !errors.Is(err, ErrMapDamaged) {
			t.Errorf("a bit too far, in byte %d: %v", off, err)
		}
	}
}

// D7: the same of files: what is no map, and what cannot be opened.
func TestD7FilesThatAreNoMaps(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "foreign")
	if err := os.WriteFile(path, bytes.Repeat([]byte("foreign "), 5000), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path string
		want error
	}{{path, ErrNotMap}, {dir, ErrNotMap}, {filepath.Join(dir, "none"), os.ErrNotExist}} {
		_, ierr := Inspect(c.path)
		if !errors.Is(ierr, c.want) || !strings.HasPrefix(ierr.Error(), c.path) {
			t.Errorf("inspect %s: %v", c.path, ierr)
		}
		if _, err := OpenMap(c.path, Identity{}); err == nil || c.path != dir && !errors.Is(err, c.want) {
			t.Errorf("open %s: %v", c.path, err)
		}
	}
	if _, err := CreateMap(filepath.Join(dir, "a", "b"), testID); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("created in no directory: %v", err)
	}
	if _, err := CreateMap(filepath.Join(dir, "c"), Identity{Size: 5, BlockSize: 5}); err == nil {
		t.Error("blocks of 5 bytes")
	}
	m := must(t)(CreateMap(filepath.Join(dir, "c"), Identity{Size: 5, BlockSize: 512}))
	if m.Identity().Device == (UUID{}) || m.Path() != filepath.Join(dir, "c") {
		t.Errorf("%+v at %s", m.Identity(), m.Path())
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// A power cut at any moment of a change of the header leaves the old or the new.
func TestTornHeaderIsSurvived(t *testing.T) {
	for n := range 400 {
		r := rand.New(rand.NewPCG(uint64(n), 4))
		m := newMachine(testID, 0)
		state := MapStandby
		for state < MapComplete {
			p := newProcess(r, r.IntN(9))
			on, err := openMap(crashMap{handle{f: m.file, p: p, name: "map"}}, testID)
			if err == nil {
				if on.State() < state {
					t.Fatalf("round %d: %v, and it was %v", n, on.State(), state)
				}
				state = on.State()
				for range r.IntN(4) { // one after the other, with no other sync between
					_ = on.update(func(h *header) { h.flags ^= flagRevocable }) // the next fails, too
				}
				if on.update(func(h *header) { h.state++ }) == nil {
					state++
				}
			} else if !errors.Is(err, errDead) {
				t.Fatalf("round %d: %v", n, err)
			}
			if p.kill(); r.IntN(2) == 0 {
				m.losePower(r)
			}
		}
	}
}

// countedMap counts the bytes that are read of a map.
type countedMap struct {
	mapFile
	read int64
}

func (c *countedMap) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.mapFile.ReadAt(p, off)
	c.read += int64(n)
	return n, err
}

// A device of 1 TiB with a map full of bits is there at once, and a flush costs
// what has changed.
func TestTerabyteIsThereAtOnce(t *testing.T) {
	id := Identity{Size: 1 << 40, BlockSize: 64 << 10}
	path := filepath.Join(t.TempDir(), "map")
	m := must(t)(CreateMap(path, id))
	d := newDeviceOn(t, vast{1 << 40}, Options{Map: m})
	if err := d.Attach(&asks{}).ZeroAt(0, id.Size/2, true); err != nil {
		t.Fatal(err)
	}
	if err := d.TrimAtContext(t.Context(), id.Size/2, id.Size/2-(1<<30)); err != nil {
		t.Fatal(err)
	}
	for i := range int64(1000) { // in 64 pages of masks
		mustWrite(t, d, id.Size-1<<30+i<<20+4096, make([]byte, 4096))
	}
	begin := time.Now()
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	t.Logf("first flush, of all bits and 1000 masks: %v", time.Since(begin))
	begin = time.Now()
	for i := range int64(100) {
		mustWrite(t, d, id.Size-1<<30+i<<20+64<<10, make([]byte, 4096))
		if err := d.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("flush after a write: %v", time.Since(begin)/100)
	if err := errors.Join(d.Close(), m.Close()); err != nil {
		t.Fatal(err)
	}
	before := heap()
	begin = time.Now()
	m = must(t)(OpenMap(path, id))
	counted := &countedMap{mapFile: m.file}
	m.file = counted
	d = newDeviceOn(t, vast{1 << 40}, Options{Map: m})
	took := time.Since(begin)
	st, kept := d.Stats(), heap()-before
	t.Logf("opened in %v, %d KiB, %d KiB read: %+v", took, kept>>10, counted.read>>10, st)
	// Both regions of bits, and the pages of the masks that there are, of 264 MiB.
	if most := 2*m.layout.pages*pageSize + 128*pageSize; counted.read > most || kept > 2*most {
		t.Errorf("to open it %d KiB were read and %d KiB kept: want at most %d", counted.read>>10, kept>>10, most>>10)
	}
	if st.Missing != 1<<14 || st.Partial != 1100 {
		t.Errorf("opened: %+v", st)
	}
	if err := errors.Join(d.Close(), m.Close()); err != nil {
		t.Fatal(err)
	}
}

// All sectors of a block were saved, and the power went before its written bit
// was: it is written, and nothing that arrives is laid over it.
func TestFullMaskIsAWrittenBlock(t *testing.T) {
	a := newAlive(t, 8, Options{})
	for off := int64(0); off < testBlock; off += 512 {
		mustWrite(t, a.d, 2*testBlock+off, filled(2, 512))
		a.sync() // each sector, and at last the bit
	}
	a.cut(false, false)
	mustWrite(t, a.d, 5*testBlock, filled(3, testBlock-512))
	a.sync()
	a.p.kill()
	m := Identity{Size: 8 * testBlock, BlockSize: testBlock}.layout()
	a.file.mu.Lock()
	a.file.durable[m.masks+5] = 0xff // the mask of block 5
	a.file.mu.Unlock()
	copy(a.disk.durable[6*testBlock-512:], filled(3, 512))
	a.cut(false, false)
	if st := a.d.Stats(); st.Written != 2 || st.Partial != 0 {
		t.Fatalf("%+v", st)
	}
	mustWrite(t, a.s, 0, filled(1, 8*testBlock))
	mustRead(t, a.d, 2*testBlock, filled(2, testBlock))
	mustRead(t, a.d, 5*testBlock, filled(3, testBlock))
}

// M8: from the moment that live is being written, no block is taken back.
func TestM8NothingIsTakenBackWhileGoingLive(t *testing.T) {
	a := newAlive(t, 8, Options{Standby: true})
	mustWrite(t, a.s, 0, filled(1, testBlock))
	looked := false
	a.p.hook = func(what string) error {
		if what == "sync map" && !looked {
			looked = true
			if err := a.s.DirtyList([]uint32{0}); !errors.Is(err, ErrLive) {
				t.Errorf("taken back while going live: %v", err)
			}
		}
		return nil
	}
	mustGoLive(t, a.d)
	if !looked || a.d.Stats().Fetched != 1 {
		t.Errorf("%+v", a.d.Stats())
	}
}
