package lazy

import "encoding/binary"

// recallMask takes the mask of the block into memory, if that was put off at the
// start. The block is claimed.
func (d *Device) recallMask(block int64) error {
	if !d.state.partial.isPostponed(block) {
		return nil
	}
	words, err := d.epoch.m.readMask(block)
	if err != nil {
		return err
	}
	off, end := d.extent(block)
	_, _, count := d.sectors(block, off, end)
	d.state.partial.load(block, words, count)
	return nil
}

// readMask reads the mask of the block from the map. Nobody writes it meanwhile but
// with what it is.
func (m *Map) readMask(block int64) (mask, error) {
	l := m.layout
	first := block * l.sectors // in bits from the beginning of the masks
	b := make([]byte, 8*l.maskWords())
	if err := readFull(m.file, b, l.masks+first/64*8); err != nil {
		return nil, m.error("read", err)
	}
	words := make(mask, l.maskWords())
	for w := range words {
		words[w] = binary.LittleEndian.Uint64(b[8*w:])
	}
	if l.sectors < 64 { // a mask that is smaller than a word lies inside one
		words[0] = words[0] >> (first % 64) & wordMask(0, 0, l.sectors)
	}
	return words, nil
}

// recallEdges does so for the blocks at the edges of [off, end), to which sectors may
// be added. Only the log is laid over such a block.
func (d *Device) recallEdges(off, end int64) error {
	if d.state.partial.waiting.Load() == 0 {
		return nil
	}
	lo, hi := d.span(off, end)
	for _, block := range [...]int64{lo, hi - 1} {
		if err := d.recallMask(block); err != nil {
			return err
		}
	}
	return nil
}
