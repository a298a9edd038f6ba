package lazy

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
)

const (
	// MaxStamp is how long a stamp may be, in bytes.
	MaxStamp = 1022
	// maxSamples is how many samples a witness has at most.
	maxSamples = 32
	// sampleSize is how much of a block a sample covers, in bytes, if it has so much.
	sampleSize = 4096
	// enoughSamples is how many samples are worth to take the place of those that there
	// are.
	enoughSamples = 4
)

// Mark is what stands at a disk and in its map, so that neither is taken for that of
// another one, or for another state of it. It is drawn anew at each start and at each
// clean end.
type Mark [16]byte

func (m Mark) String() string { return hex.EncodeToString(m[:]) }

// Backing is the disk that a map belongs to, as far as it is not read.
type Backing interface {
	// Stamp names the disk, and what can be seen of its state, at most MaxStamp
	// bytes. With final nothing is written any more, and what can be seen must be the
	// same after a power cut.
	Stamp(final bool) ([]byte, error)
	// SetMark has the disk bear the mark of a map that says state, durably after the
	// next Sync. The error is errors.ErrUnsupported if a disk of this kind cannot bear one.
	SetMark(mark Mark, state MapState) error
	// Sync makes the mark durable. It may write all that is in the disk's cache.
	Sync() error
}

// Binding is what a map knows of its disk.
type Binding struct {
	// Stamp is what Backing.Stamp has returned when the map was bound, or, if Clean,
	// after the last write of the last process. Empty: the map was never bound.
	Stamp []byte
	Clean bool
	// Mark stands at the disk; zero: it cannot bear one. If a process was killed while
	// it was about to be changed (Unsettled), it may also be Before; zero: none.
	Mark, Before Mark
	Unsettled    bool

	witness []sample
}

// sample is the contents of the beginning of a block.
type sample struct {
	block int64
	sum   [16]byte // the first half of SHA-256
}

// bond is a Binding as a header holds it.
type bond struct {
	flags   uint32
	mark    Mark
	before  Mark
	stamp   string
	count   int // of samples
	samples [maxSamples]sample
}

const (
	bondClean   = 1 << 0 // the stamp was taken after the last write
	bondCompare = 1 << 1 // what was fetched is to be compared with the source's
	bondMarking = 1 << 2 // the disk may still bear the mark before
	bondFlags   = bondClean | bondCompare | bondMarking
)

// append adds the bytes that docs/MAP.md describes.
func (k *bond) append(b []byte) []byte {
	begin := len(b)
	b = binary.LittleEndian.AppendUint32(b, k.flags)
	b = binary.LittleEndian.AppendUint32(b, uint32(k.count))
	b = append(b, k.mark[:]...)
	b = append(b, k.before[:]...)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(k.stamp)))
	b = append(b, k.stamp...)
	b = append(b, zeroes[:begin+samplesAt-bondAt-len(b)]...)
	for _, s := range k.samples[:k.count] {
		b = binary.LittleEndian.AppendUint64(b, uint64(s.block))
		b = append(b, s.sum[:]...)
	}
	return b
}

// decodeBond reads what append has written, of a disk of so many blocks.
func decodeBond(b []byte, blocks int64) (k bond, err error) {
	le := binary.LittleEndian
	k.flags = le.Uint32(b)
	count, length := le.Uint32(b[4:]), le.Uint16(b[40:])
	switch {
	case k.flags&^bondFlags != 0:
		return k, fmt.Errorf("%w: its binding has flags %#x", ErrMapNewer, k.flags)
	case count > maxSamples:
		return k, fmt.Errorf("%w: a witness of %d samples", ErrMapDamaged, count)
	case length > MaxStamp:
		return k, fmt.Errorf("%w: a stamp of %d bytes", ErrMapDamaged, length)
	}
	k.count = int(count)
	copy(k.mark[:], b[8:])
	copy(k.before[:], b[24:])
	k.stamp = string(b[42 : 42+int(length)])
	for i := range k.samples[:k.count] {
		at := b[samplesAt-bondAt+24*i:]
		s := sample{block: int64(le.Uint64(at))}
		copy(s.sum[:], at[8:])
		if s.block < 0 || s.block >= blocks {
			return k, fmt.Errorf("%w: a witness of block %d of %d", ErrMapDamaged, s.block, blocks)
		}
		k.samples[i] = s
	}
	return k, nil
}

// Binding returns what the map knows of its disk.
func (m *Map) Binding() Binding {
	h := m.header()
	return h.binding()
}

func (h *header) binding() Binding {
	k := &h.bond
	b := Binding{
		Stamp: []byte(k.stamp), Clean: k.flags&bondClean != 0,
		Mark: k.mark, Before: k.before, Unsettled: k.flags&bondMarking != 0,
	}
	if h.flags&flagFailed == 0 {
		b.witness = slices.Clone(k.samples[:k.count])
	}
	return b
}

// Bind ties the map to its disk, from here on. mark is the one that the disk was
// found to bear; zero: none. It must be called before there is a device, once the
// caller knows that the disk is the right one. An error leaves a map that is bound to
// what it was bound to before.
func (m *Map) Bind(b Backing, mark Mark) error {
	stamp, err := b.Stamp(false)
	if err != nil {
		return err
	}
	if len(stamp) > MaxStamp {
		return fmt.Errorf("%s: a stamp of %d bytes: at most %d fit", m.path, len(stamp), MaxStamp)
	}
	m.backing, m.borne = b, mark
	change := func(h *header) {
		h.bond.stamp = string(stamp)
		h.bond.flags &^= bondClean
	}
	if k := m.Binding(); k.Unsettled && k.Bears(mark) {
		err = m.markAgain(mark, change)
	} else {
		if !k.Bears(mark) { // an operator vouches for the disk
			err = b.Sync()
		}
		if err == nil {
			err = m.mark(change)
		}
	}
	if err == nil && mark == (Mark{}) {
		err = m.settleMark() // by any name of it the disk says from now on that it is not whole
	}
	if err != nil {
		m.backing = nil
	}
	return err
}

// markAgain goes on with a mark that the process before could not settle: which of the
// two the disk bears durably is not known, so that there cannot be a third one.
func (m *Map) markAgain(found Mark, change func(h *header)) error {
	if err := m.update(change); err != nil {
		return err
	}
	h := m.header()
	if found == h.bond.mark {
		return nil
	}
	err := m.backing.SetMark(h.bond.mark, h.state)
	if errors.Is(err, errors.ErrUnsupported) {
		return m.settled(Mark{})
	}
	if err == nil {
		m.borne = h.bond.mark
	}
	return err
}

// mark gives the disk a new mark, with the state, and makes another change of the
// header. The header has the mark first, with the one before, so that the map knows its
// disk wherever the power goes, until settleMark.
func (m *Map) mark(change func(h *header)) error {
	if err := m.settleMark(); err != nil { // of the two that it may bear before there is a third
		return err
	}
	var mark Mark
	before := m.borne
	rand.Read(mark[:]) // never fails
	err := m.update(func(h *header) {
		change(h)
		h.bond.mark, h.bond.before = mark, before
		h.bond.flags |= bondMarking
	})
	if err != nil {
		return err
	}
	switch err := m.backing.SetMark(mark, m.header().state); {
	case errors.Is(err, errors.ErrUnsupported):
		return m.settled(Mark{})
	case err != nil && before != (Mark{}):
		return nil // it bears the mark before, which still counts
	case err != nil:
		return err
	}
	m.borne = mark
	return nil
}

// settleMark makes the mark of the disk durable, and then the one before void.
func (m *Map) settleMark() error {
	mark := m.borne
	if k := m.header().bond; k.flags&bondMarking == 0 || k.mark != mark {
		return nil
	}
	if err := m.backing.Sync(); err != nil {
		return err
	}
	return m.settled(mark)
}

// settled has the map know its disk by one mark only.
func (m *Map) settled(mark Mark) error {
	return m.update(func(h *header) {
		h.bond.mark, h.bond.before = mark, Mark{}
		h.bond.flags &^= bondMarking
	})
}

// markLoop settles the mark that the disk got when the map was bound. That may take as
// long as it takes to write the disk's cache, which nobody waits for.
func (d *Device) markLoop() {
	m := d.epoch.m
	mark := m.header().bond.mark
	if err := m.backing.Sync(); err != nil {
		d.log.Warn("the mark of the disk could not be made durable; the one before counts as well", "map", m.path, "error", err)
		return
	}
	_ = d.flush.alone(d, func() error { // who writes next hears of the error
		if k := m.header().bond; k.flags&bondMarking == 0 || k.mark != mark || m.borne != mark {
			return nil
		}
		return mayRetry(m.settled(mark))
	})
}

// Bears reports whether the disk of the map can be one that bears mark; zero: none.
func (k Binding) Bears(mark Mark) bool {
	return mark == k.Mark || k.Unsettled && mark == k.Before
}

// Compare reports whether what was fetched has yet to be compared with what the
// source has: the disk was moved, and only an operator has vouched for it.
func (m *Map) Compare() bool { return m.header().bond.flags&bondCompare != 0 }

// SetCompare makes durable what Compare reports.
func (m *Map) SetCompare(on bool) error {
	return m.update(func(h *header) {
		h.bond.flags &^= bondCompare
		if on {
			h.bond.flags |= bondCompare
		}
	})
}

// Witness compares the disk with samples of blocks that were durable at the last save
// and that nobody has written since, and returns how many of how many differ. After a
// sync that failed it is not known what the disk has, and there are none.
func (k Binding) Witness(disk io.ReaderAt, id Identity) (differ, of int, err error) {
	for _, s := range k.witness {
		sum, _, err := sampleAt(disk, id, s.block)
		if err != nil {
			return 0, 0, err
		}
		if sum != s.sum {
			differ++
		}
	}
	return differ, len(k.witness), nil
}

// sampleAt is the sample of a block. zero says that there are only zeroes.
func sampleAt(disk io.ReaderAt, id Identity, block int64) (sum [16]byte, zero bool, err error) {
	off := block * id.BlockSize
	b := make([]byte, min(sampleSize, id.BlockSize, id.Size-off))
	if err := readFull(disk, b, off); err != nil {
		return sum, false, ioError("read", int64(len(b)), off, err)
	}
	full := sha256.Sum256(b)
	return [16]byte(full[:16]), string(b) == string(zeroes[:len(b)]), nil
}
