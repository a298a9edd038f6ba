package soak

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"sync"
)

// sector is the unit of which a disk keeps all or nothing, in bytes.
const sector = 512

// Two contents of a sector that are no records.
const (
	theSource uint32 = 0 // what the source's disk has
	zeroes    uint32 = 1 // zeroed or trimmed
	// From here on it is the number of a record.
	firstRecord uint32 = 2
)

// value is one content that a sector had: number says which, and id tells apart
// two writes of the same.
type value struct {
	number uint32
	id     uint64
}

// cell is what is known of a sector that was written to.
type cell struct {
	// may is what the sector may hold after a kill, the oldest first: what was known to
	// be there, and all that was written since.
	may []value
	// now is the index of what a read must return; -1: any of may, since the
	// destination has died after the last write.
	now  int
	busy bool // somebody reads or writes it, or did when the destination died
}

// model is what must be on a disk, and what may be.
type model struct {
	seed uint64      // makes the records of this disk unlike those of all others
	base io.ReaderAt // the source's disk
	size int64       // bytes

	mu sync.Mutex // never held over I/O
	// Guarded by mu:
	cells   map[int64]*cell // by number of the sector
	open    map[int64]*cell // those of which more than one thing is possible
	numbers uint32          // the last record
	ids     uint64          // the last write
}

func newModel(seed uint64, base io.ReaderAt, size int64) *model {
	return &model{
		seed: seed, base: base, size: size,
		cells: make(map[int64]*cell), open: make(map[int64]*cell), numbers: firstRecord - 1,
	}
}

// span is the sectors of [off, off+length), the last of which may be short.
func span(off, length int64) (lo, hi int64) {
	return off / sector, (off + length + sector - 1) / sector
}

// bounds is where a sector lies, in bytes.
func (m *model) bounds(s int64) (off, end int64) { return s * sector, min((s+1)*sector, m.size) }

// ours says whether the clients write to sectors: to a third of the disk, in pieces,
// so that the source always has something to send.
func (m *model) ours(lo, hi int64) bool {
	const piece = 512 * kib / sector
	for at := lo / piece; at <= (hi-1)/piece; at++ {
		if (uint64(at)+m.seed)%3 != 0 {
			return false
		}
	}
	return true
}

// lock takes sectors for a read or a write, unless somebody has one of them.
func (m *model) lock(lo, hi int64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for s := lo; s < hi; s++ {
		if c := m.cells[s]; c != nil && c.busy {
			return false
		}
	}
	for s := lo; s < hi; s++ {
		m.cellLocked(s).busy = true
	}
	return true
}

func (m *model) cellLocked(s int64) *cell {
	c := m.cells[s]
	if c == nil {
		c = &cell{may: []value{{theSource, 0}}}
		m.cells[s] = c
	}
	return c
}

func (m *model) unlock(lo, hi int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for s := lo; s < hi; s++ {
		m.cells[s].busy = false
	}
}

// write begins a write of sectors that the caller has locked, and returns what to
// write. of is zeroes, or firstRecord for records, whose number is chosen here.
func (m *model) write(lo, hi int64, of uint32) []byte {
	m.mu.Lock()
	if of != zeroes {
		m.numbers++
		of = m.numbers
	}
	m.ids++
	for s := lo; s < hi; s++ {
		c := m.cells[s]
		c.may = append(c.may, value{of, m.ids})
		m.open[s] = c
	}
	m.mu.Unlock()
	if of == zeroes {
		return nil
	}
	_, end := m.bounds(hi - 1)
	p := make([]byte, 0, end-lo*sector)
	for s := lo; s < hi; s++ {
		p = m.record(p, s, of)
	}
	return p
}

// wrote ends a write that was answered, and gives the sectors back. It returns
// what flushed wants if the write went through to the disk.
func (m *model) wrote(lo, hi int64) map[int64]uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	covers := make(map[int64]uint64, hi-lo)
	for s := lo; s < hi; s++ {
		c := m.cells[s]
		c.now = len(c.may) - 1
		c.busy = false
		covers[s] = c.may[c.now].id
	}
	return covers
}

// flushing notes what a flush that begins now covers; flushed takes that for
// durable when it was answered.
func (m *model) flushing() map[int64]uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	covers := make(map[int64]uint64, len(m.open))
	for s, c := range m.open {
		if c.now > 0 {
			covers[s] = c.may[c.now].id
		}
	}
	return covers
}

func (m *model) flushed(covers map[int64]uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for s, id := range covers {
		c := m.cells[s]
		at := slices.IndexFunc(c.may, func(v value) bool { return v.id == id })
		if at <= 0 {
			continue // a later flush was answered before
		}
		c.may = slices.Delete(c.may, 0, at)
		if c.now >= 0 {
			c.now -= at
		}
		if len(c.may) == 1 {
			delete(m.open, s)
		}
	}
}

// died is told that the destination's process was killed: of each sector what was
// answered last is there, flushed or not, or what was about to be written. Only a
// power cut undoes what was answered.
func (m *model) died() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for s, c := range m.cells {
		c.busy = false
		if c.now > 0 {
			c.may = slices.Delete(c.may, 0, c.now)
			c.now = 0
		}
		if len(c.may) > 1 {
			c.now = -1
		} else {
			delete(m.open, s)
		}
	}
}

// read holds what was read from sectors that the caller has locked against what
// they may be. What is found where several things were possible is what every
// later read has to find.
func (m *model) read(lo, hi int64, p []byte) error {
	return m.compare(lo, hi, p, true)
}

// compare is read; without settle it leaves open what is open.
func (m *model) compare(lo, hi int64, p []byte, settle bool) error {
	base := make([]byte, len(p))
	if _, err := m.base.ReadAt(base, lo*sector); err != nil && err != io.EOF {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for s := lo; s < hi; s++ {
		off, end := m.bounds(s)
		got, want := p[off-lo*sector:end-lo*sector], base[off-lo*sector:end-lo*sector]
		c := m.cells[s]
		if c == nil {
			if !bytes.Equal(got, want) {
				return fmt.Errorf("sector %d holds %s, but was never written to", s, m.what(s, got, want))
			}
			continue
		}
		if c.now >= 0 {
			if !m.is(s, c.may[c.now].number, got, want) {
				return fmt.Errorf("sector %d holds %s: want %s", s, m.what(s, got, want), name(c.may[c.now].number))
			}
			continue
		}
		at := len(c.may) - 1
		for at >= 0 && !m.is(s, c.may[at].number, got, want) {
			at--
		}
		switch {
		case at < 0:
			return fmt.Errorf("sector %d holds %s: want %s, which was flushed, or one of %d written later",
				s, m.what(s, got, want), name(c.may[0].number), len(c.may)-1)
		case settle:
			m.ids++
			c.may = append(c.may, value{c.may[at].number, m.ids})
			c.now = len(c.may) - 1
		}
	}
	return nil
}

// flushedRuns are the sectors of which a record or zeroes were flushed: they have
// to be there when the destination is back, whatever has become of the source.
func (m *model) flushedRuns() (runs [][2]int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []int64
	for s, c := range m.cells {
		if c.may[0].number != theSource {
			all = append(all, s)
		}
	}
	slices.Sort(all)
	for _, s := range all {
		if n := len(runs); n > 0 && runs[n-1][1] == s && s-runs[n-1][0] < 1<<20/sector {
			runs[n-1][1]++
		} else {
			runs = append(runs, [2]int64{s, s + 1})
		}
	}
	return runs
}

// exact says whether one content only is possible of each sector.
func (m *model) exact() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range m.open {
		if c.now < 0 {
			return false
		}
	}
	return true
}

// apply lays what the sectors of [off, off+len(p)) have to be over p, which holds
// what the source has. Of what is open it takes what was written last.
func (m *model) apply(p []byte, off int64) {
	lo, hi := span(off, int64(len(p)))
	m.mu.Lock()
	defer m.mu.Unlock()
	for s := lo; s < hi; s++ {
		c := m.cells[s]
		if c == nil {
			continue
		}
		at := c.now
		if at < 0 {
			at = len(c.may) - 1
		}
		from, end := m.bounds(s)
		switch number := c.may[at].number; number {
		case theSource:
		case zeroes:
			clear(p[from-off : end-off])
		default:
			copy(p[from-off:end-off], m.record(nil, s, number))
		}
	}
}

// record appends the content of a sector: a header, noise, and a checksum.
func (m *model) record(p []byte, s int64, number uint32) []byte {
	begin := len(p)
	off, end := m.bounds(s)
	noise := m.seed ^ uint64(s)*0x9e3779b97f4a7c15 ^ uint64(number)<<32
	p = append(p, "soak"...)
	p = binary.LittleEndian.AppendUint32(p, number)
	p = binary.LittleEndian.AppendUint64(p, uint64(s))
	p = binary.LittleEndian.AppendUint64(p, m.seed)
	for len(p)-begin < sector-4 {
		noise ^= noise << 13 // xorshift64
		noise ^= noise >> 7
		noise ^= noise << 17
		p = binary.LittleEndian.AppendUint64(p, noise)
	}
	p = p[:begin+sector-4]
	p = binary.LittleEndian.AppendUint32(p, crc32.ChecksumIEEE(p[begin:]))
	return p[:begin+int(end-off)]
}

// is says whether got is the content of a number.
func (m *model) is(s int64, number uint32, got, base []byte) bool {
	switch number {
	case theSource:
		return bytes.Equal(got, base)
	case zeroes:
		return allZero(got)
	}
	return bytes.Equal(got, m.record(nil, s, number))
}

// what describes what was found in a sector.
func (m *model) what(s int64, got, base []byte) string {
	switch {
	case bytes.Equal(got, base):
		return name(theSource)
	case allZero(got):
		return name(zeroes)
	case len(got) >= 24 && string(got[:4]) == "soak":
		number, of, seed := binary.LittleEndian.Uint32(got[4:]), binary.LittleEndian.Uint64(got[8:]), binary.LittleEndian.Uint64(got[16:])
		if of == uint64(s) && seed == m.seed && m.is(s, number, got, base) {
			return name(number)
		}
		return fmt.Sprintf("what looks like record %d of sector %d (seed %d), and is not whole", number, of, seed)
	}
	return fmt.Sprintf("something else (%x...)", got[:min(16, len(got))])
}

func name(number uint32) string {
	switch number {
	case theSource:
		return "the source's bytes"
	case zeroes:
		return "zeroes"
	}
	return fmt.Sprintf("record %d", number)
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}
