package lazy

import (
	"encoding/binary"
	"hash/crc32"
)

// A flush needs two syncs, the disk's and the map's. So that a small one needs
// but one, what clients have written since the last flush is written to a log in
// the map instead; after a crash it is written to the disk anew. A record is
// there whole or not at all. All that lie side by side from the beginning of the
// log make an epoch.
//
// An ordinary flush ends the epoch. It syncs the disk, and the sync of the map
// makes durable the bits and a mark: the data of the epoch's records is on the
// disk. Either may survive a power cut without the other, so such an epoch has
// still to be read for which sectors were written, until a record of the next
// one, which exists only if the sync has ended, is written over it.
const (
	logMagic  = "silo-log"
	markMagic = "silo-mrk"

	logAlign  = 4096 // bytes: no record shares a sector with another, however large sectors are
	recordLen = 64   // bytes of a record's header
	rangeLen  = 16   // bytes of a range in a record
	markLen   = 36   // bytes
	markPages = 2 * pageSize

	minLog = markPages + 2*logAlign // bytes
	maxLog = 1 << 30                // bytes

	// logAhead is how much is zeroed at once where no record has been yet, in
	// bytes: a sync of what had no place in the file before takes longer.
	logAhead = 256 << 10
)

// logSize is the size of the log of a new map, in bytes.
func logSize(disk int64) int64 {
	return min(max(64<<10, disk/256&^(logAlign-1)), 4<<20)
}

// redo is the log of a map. It is touched by the holder of the map's turn only.
type redo struct {
	file   mapFile
	device UUID
	size   int64 // of the disk, in bytes

	marks, begin, end int64 // of the marks and the records, in bytes

	epoch    uint64 // of the next record
	index    uint32 // of the next record in its epoch
	next     int64  // where it goes
	has      bool   // there is a record of the epoch, or part of one
	closed   bool   // the epoch takes no more
	prepared int64  // up to here the file has a place for what is written
}

// newRedo is the log of a new map, or nil if it has none.
func newRedo(file mapFile, h header) *redo {
	if h.log == 0 {
		return nil
	}
	l := h.layout()
	begin := l.end + markPages
	return &redo{
		file: file, device: h.id.Device, size: h.id.Size,
		marks: l.end, begin: begin, end: l.end + h.log,
		epoch: 1, next: begin, prepared: begin,
	}
}

// used says whether the epoch has to be ended before anything becomes durable
// by other means.
func (l *redo) used() bool { return l != nil && l.has }

// fits says whether there is room for a batch.
func (l *redo) fits(b *batch) bool {
	return l != nil && !l.closed && b.recordSize() <= l.end-l.next
}

// append makes a batch durable.
func (l *redo) append(b *batch) error {
	rec := b.encode(l.device, l.epoch, l.index)
	end := l.next + int64(len(rec))
	l.has, l.closed = true, true // if it fails nobody knows what is there
	if err := writeFull(l.file, rec, l.next); err != nil {
		return err
	}
	if end > l.prepared {
		l.prepared = min(end+logAhead, l.end)
		if err := writeFull(l.file, zeroes[:l.prepared-end], end); err != nil {
			return err
		}
	}
	if err := l.file.Sync(); err != nil {
		return &finalError{err}
	}
	l.next, l.closed = end, false
	l.index++
	return nil
}

// settle writes the mark that the data of the epoch is on the disk, which has
// been synced. It lies in one of two pages in turn, in each twice: one that is
// torn is not yet true, and the one before it is whole.
func (l *redo) settle() error {
	l.closed = true
	page := make([]byte, pageSize)
	b := append(page[:0], markMagic...)
	b = append(b, l.device[:]...)
	b = binary.LittleEndian.AppendUint64(b, l.epoch)
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	copy(page[pageSize/2:], b)
	return writeFull(l.file, page, l.marks+int64(l.epoch&1)*pageSize)
}

// restart begins the next epoch, when the mark of the last one is durable with
// the bits.
func (l *redo) restart() {
	l.epoch++
	l.index, l.next = 0, l.begin
	l.has, l.closed = false, false
}

// settled is the last epoch that has its mark; 0 is none.
func (l *redo) settled() (epoch uint64, err error) {
	b := make([]byte, markPages)
	if err := readFull(l.file, b, l.marks); err != nil {
		return 0, err
	}
	for ; len(b) > 0; b = b[pageSize/2:] {
		crc := binary.LittleEndian.Uint32(b[markLen-4:])
		if string(b[:8]) == markMagic && UUID(b[8:24]) == l.device && crc32.Checksum(b[:markLen-4], castagnoli) == crc {
			epoch = max(epoch, binary.LittleEndian.Uint64(b[24:]))
		}
	}
	return epoch, nil
}

// record is what was written between two flushes.
type record struct {
	epoch  uint64
	index  uint32
	ranges []span // bytes of the disk
	data   []byte // of these ranges, one after the other
}

// replay reads the log of a map that was opened, once: it calls do for each
// record, in order. laid says that its data is on the disk. What comes behind a
// record that is not whole, or is not of the epoch, is of another time.
func (l *redo) replay(do func(r record, laid bool) error) error {
	last, err := l.settled()
	if err != nil {
		return err
	}
	l.epoch = last + 1
	epoch := uint64(0)
	for at, index := l.begin, uint32(0); ; index++ {
		r, size, ok, err := l.read(at)
		if err != nil {
			return err
		}
		if ok && index == 0 {
			epoch = r.epoch
		}
		if !ok || r.index != index || r.epoch != epoch || epoch != last && epoch != last+1 {
			return nil
		}
		if epoch > last {
			l.has, l.closed = true, true // nothing is added to it, but it has to be ended
		}
		if err := do(r, epoch == last); err != nil {
			return err
		}
		at += size
	}
}

// read reads the record at at, and says whether there is one, and how much of
// the log it takes.
func (l *redo) read(at int64) (r record, size int64, ok bool, err error) {
	if l.end-at < recordLen {
		return r, 0, false, nil
	}
	b := make([]byte, recordLen)
	if err := readFull(l.file, b, at); err != nil {
		return r, 0, false, err
	}
	length := int64(binary.LittleEndian.Uint32(b[12:]))
	if string(b[:8]) != logMagic || length < recordLen || length > l.end-at {
		return r, 0, false, nil
	}
	b = append(b, make([]byte, length-recordLen)...)
	if err := readFull(l.file, b[recordLen:], at+recordLen); err != nil {
		return r, 0, false, err
	}
	if crc32.Checksum(b[12:], castagnoli) != binary.LittleEndian.Uint32(b[8:]) || UUID(b[16:32]) != l.device {
		return r, 0, false, nil
	}
	r, ok = decodeRecord(b, l.size)
	return r, aligned(length), ok, nil
}

// aligned is the room that a record of so many bytes takes.
func aligned(length int64) int64 { return (length + logAlign - 1) &^ (logAlign - 1) }

// decodeRecord reads a record of a disk of so many bytes whose checksum is right.
func decodeRecord(b []byte, disk int64) (r record, ok bool) {
	le := binary.LittleEndian
	r.epoch, r.index = le.Uint64(b[32:]), le.Uint32(b[40:])
	count := int64(le.Uint32(b[44:]))
	rest := int64(len(b)) - recordLen - count*rangeLen
	if rest < 0 {
		return r, false
	}
	table := b[int64(len(b))-count*rangeLen:]
	r.data = b[recordLen : recordLen+rest]
	for ; len(table) > 0; table = table[rangeLen:] {
		s := span{int64(le.Uint64(table)), int64(le.Uint64(table[8:]))}
		if s.lo < 0 || s.lo >= s.hi || s.hi > disk || s.hi-s.lo > rest {
			return r, false
		}
		rest -= s.hi - s.lo
		r.ranges = append(r.ranges, s)
	}
	return r, rest == 0
}
