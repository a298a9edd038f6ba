package lazy

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"
)

// chunk is the most that is read or written of a map at once, in bytes, unless a
// single mask is larger.
const chunk = 1 << 20

// save writes a snapshot, and makes it durable. The disk has been synced: if the
// log has an epoch, it ends with that.
func (m *Map) save(n *snapshot) error {
	ends := m.log.used()
	if n.empty() && !ends {
		return nil
	}
	b := n.bits
	first, count := int64(0), int64(0) // of pages that lie side by side
	flush := func() error {
		if count == 0 {
			return nil
		}
		length := count * pageSize
		if err := writeFull(m.file, b[:length], m.layout.page(first)); err != nil {
			return m.error("write", err)
		}
		b = b[length:]
		return nil
	}
	var err error
	n.each(func(page int64) {
		if err != nil {
			return
		}
		if count == 0 || page != first+count {
			err = flush()
			first, count = page, 0
		}
		count++
	})
	if err == nil {
		err = flush()
	}
	if err == nil {
		err = m.saveMasks(n)
	}
	if err != nil {
		return err
	}
	if ends {
		if err := m.log.settle(); err != nil {
			return m.error("write the log of", err)
		}
	}
	if m.mirror != nil {
		err = m.replaceHeader(m.header()) // the mirror belongs to this save of the map, and to no other
	} else if err = m.file.Sync(); err != nil {
		err = &finalError{m.error("sync", err)}
	}
	if err == nil && ends {
		m.log.restart()
	}
	return err
}

// finalError is a failure after which nobody can tell what is durable.
type finalError struct{ error }

func (e *finalError) Unwrap() error { return e.error }

// saveMasks adds the masks of a snapshot to those in the file, some of which are
// of blocks that have become local, and which must stay until the bits of these
// blocks are durable.
func (m *Map) saveMasks(n *snapshot) error {
	words := m.layout.maskWords()
	order := make([]int, len(n.blocks)) // ascending by block
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return int(n.blocks[a] - n.blocks[b]) })
	for len(order) > 0 {
		lo, hi := m.layout.maskPages(n.blocks[order[0]])
		k := 1 // of order are in [lo, hi)
		for ; k < len(order); k++ {
			from, to := m.layout.maskPages(n.blocks[order[k]])
			if from > hi || to-lo > chunk {
				break
			}
			hi = to
		}
		b := make([]byte, hi-lo)
		if err := readFull(m.file, b, m.layout.masks+lo); err != nil {
			return &finalError{m.error("read", err)}
		}
		for _, i := range order[:k] {
			m.layout.putMask(b, lo, n.blocks[i], n.words[i*words:(i+1)*words])
		}
		if err := writeFull(m.file, b, m.layout.masks+lo); err != nil {
			return m.error("write", err)
		}
		order = order[k:]
	}
	return nil
}

// maskPages is the pages in which the mask of the block lies, in bytes from the
// beginning of the masks.
func (l layout) maskPages(block int64) (lo, hi int64) {
	first, last := block*l.sectors, (block+1)*l.sectors
	return first / pageBits * pageSize, bitPages(last) * pageSize
}

// putMask adds the mask of the block to b, which begins lo bytes into the masks.
func (l layout) putMask(b []byte, lo, block int64, words []uint64) {
	first := block*l.sectors - lo*8 // the first sector, in bits from the beginning of b
	if l.sectors >= 64 {
		for i, v := range words {
			at := b[first/8+int64(i)*8:]
			binary.LittleEndian.PutUint64(at, binary.LittleEndian.Uint64(at)|v)
		}
		return
	}
	at := b[first/64*8:] // a mask that is smaller than a word lies inside one
	binary.LittleEndian.PutUint64(at, binary.LittleEndian.Uint64(at)|words[0]<<(first%64))
}

// forget clears the fetched bits of the blocks in spans, and makes that durable
// together with a change of the header. It needs no flush of the disk, since it
// changes nothing else: it works on the pages as they are in the file. spans are
// sorted and do not touch.
func (m *Map) forget(spans []span, change func(h *header)) error {
	b := make([]byte, pageSize)
	for page, i := int64(0), 0; i < len(spans); page++ {
		page = max(page, spans[i].lo/pageBits)
		off := m.layout.page(page)
		if err := readFull(m.file, b, off); err != nil {
			return m.error("read", err)
		}
		base, changed := page*pageBits, false
		for k := i; k < len(spans) && spans[k].lo < base+pageBits; k++ {
			lo, hi := max(spans[k].lo, base)-base, min(spans[k].hi-base, pageBits)
			for w := lo >> 6; w<<6 < hi; w++ {
				old := binary.LittleEndian.Uint64(b[w*8:])
				if v := old &^ wordMask(w, lo, hi); v != old {
					binary.LittleEndian.PutUint64(b[w*8:], v)
					changed = true
				}
			}
		}
		for i < len(spans) && spans[i].hi <= base+pageBits {
			i++
		}
		if !changed {
			continue
		}
		if err := writeFull(m.file, b, off); err != nil {
			return m.error("write", err)
		}
	}
	h := m.header()
	change(&h)
	return m.replaceHeader(h) // also if it did not change: that syncs the pages
}

// merged sorts spans, and joins those that touch.
func merged(spans []span) []span {
	slices.SortFunc(spans, func(a, b span) int { return int(a.lo - b.lo) })
	out := spans[:0]
	for _, s := range spans {
		if n := len(out); n > 0 && s.lo <= out[n-1].hi {
			out[n-1].hi = max(out[n-1].hi, s.hi)
		} else {
			out = append(out, s)
		}
	}
	return out
}

// load reads the map into s, which is new. With revocable the masks of fetched
// blocks are taken, too.
func (m *Map) load(s *state, revocable bool) error {
	if m.header().state == MapComplete {
		s.setFetched(0, s.blocks) // by whom it was written, nobody knows any more
		return nil
	}
	for region, to := range []bitmap{s.fetched, s.written} {
		begin := m.layout.page(int64(region) * m.layout.pages)
		err := m.eachData(begin, begin+m.layout.pages*pageSize, func(b []byte, off int64) error {
			for i := 0; i < len(b); i += 8 {
				v := binary.LittleEndian.Uint64(b[i:])
				if v == 0 {
					continue
				}
				w := (off - begin + int64(i)) / 8
				if v&^wordMask(w, 0, max(s.blocks, w<<6)) != 0 {
					return fmt.Errorf("%w: it has bits for blocks past the end of the disk", ErrMapDamaged)
				}
				to[w].Store(v)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	var local, writes int
	for w := range s.fetched {
		written := s.written[w].Load()
		local += bits.OnesCount64(written | s.fetched[w].Load())
		writes += bits.OnesCount64(written)
	}
	s.local.Store(int64(local))
	s.writes.Store(int64(writes))
	return m.loadMasks(s, revocable)
}

func (m *Map) loadMasks(s *state, revocable bool) error {
	settled := s.isLocal
	if revocable {
		settled = s.written.get
	}
	size := m.header().id.Size
	all := blocksOf(size, sectorSize)
	return m.eachData(m.layout.masks, m.layout.end, func(b []byte, off int64) error {
		for i := 0; i < len(b); i += 8 {
			v := binary.LittleEndian.Uint64(b[i:])
			if v == 0 {
				continue
			}
			sector := (off - m.layout.masks + int64(i)) * 8
			if v&^wordMask(sector>>6, 0, max(all, sector)) != 0 {
				return fmt.Errorf("%w: it has bits for sectors past the end of the disk", ErrMapDamaged)
			}
			for v != 0 {
				lo := int64(bits.TrailingZeros64(v))
				hi := lo + int64(bits.TrailingZeros64(^(v >> lo)))
				v &^= wordMask(0, lo, hi)
				m.layout.loadSectors(s, settled, sector+lo, sector+hi, all)
			}
		}
		return nil
	})
}

// loadSectors adds the sectors [lo, hi) of the disk, which has all sectors, to
// the masks of their blocks, except of those that are settled.
func (l layout) loadSectors(s *state, settled func(block int64) bool, lo, hi, all int64) {
	for lo < hi {
		block := lo / l.sectors
		first := block * l.sectors
		next := min(hi, first+l.sectors)
		if !settled(block) && !s.partial.postpone(block, s.blocks) && s.partial.add(block, lo-first, next-first, min(l.sectors, all-first)) {
			// Its written bit was not saved, but all of its sectors were.
			s.setWritten(block, block+1)
			s.partial.drop(block, block+1)
		}
		lo = next
	}
}

// eachData calls f with what lies in [off, end) of the file, but for zeroes that
// take no space, in pieces of whole words. b is valid during the call only.
func (m *Map) eachData(off, end int64, f func(b []byte, off int64) error) error {
	var buf []byte
	for off < end {
		lo, hi, err := m.file.NextData(off, end)
		if err != nil {
			return m.error("search", err)
		}
		if lo >= end {
			return nil
		}
		lo = lo &^ (pageSize - 1)
		hi = min(end, (max(lo+1, hi)+pageSize-1)&^(pageSize-1))
		for ; lo < hi; lo += int64(len(buf)) {
			buf = slices.Grow(buf[:0], int(min(chunk, hi-lo)))[:min(chunk, hi-lo)]
			if err := readFull(m.file, buf, lo); err != nil {
				return m.error("read", err)
			}
			if err := f(buf, lo); err != nil {
				return err
			}
		}
		off = hi
	}
	return nil
}
