package lazy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

const (
	mapVersion = 2 // 1 has no epoch; it is read, and becomes 2 when a device has the map
	mapMagic   = "silo-map"

	slotSize   = 4096         // bytes of one of the two copies of the header
	headerSize = 2 * slotSize // bytes
	crcAt      = slotSize - 4 // in a slot
	nameAt     = 80           // in a slot: u16 length, then the name
	logAt      = crcAt - 4    // in a slot
	saveAt     = logAt - 8    // in a slot
	epochAt    = 2048         // in a slot
	bondAt     = epochAt + 24 // in a slot
	samplesAt  = bondAt + 42 + MaxStamp
	drawnAt    = saveAt - 12*maxDrawn // in a slot
	bootAt     = drawnAt - 16         // in a slot
	maxMapName = epochAt - nameAt - 2
	maxOldName = logAt - nameAt - 2 // in a header of version 1

	flagRevocable = 1 << 0 // all that was written here is known, also in fetched blocks
	flagLog       = 1 << 1 // the map has a log
	flagFailed    = 1 << 2 // a sync of the disk or the map has failed: what only the cache has does not count
)

// MapState is how far the device of a map is, as far as that is durable.
type MapState uint32

// The states, in the order in which a device goes through them.
const (
	MapStandby  MapState = 1 // the source may still change any block
	MapLive     MapState = 2 // the source has handed over
	MapComplete MapState = 3 // every block is here: the disk needs no map any more
)

func (s MapState) String() string {
	switch s {
	case MapStandby:
		return "standby"
	case MapLive:
		return "live"
	case MapComplete:
		return "complete"
	}
	return fmt.Sprintf("state %d", uint32(s))
}

// UUID names a device or a source. All zeroes is none.
type UUID [16]byte

func (u UUID) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// Identity says which disk a map belongs to, and where its contents come from.
type Identity struct {
	Size       int64  // bytes
	BlockSize  int64  // bytes
	Device     UUID   // of the device that the map belongs to
	Source     UUID   // of the source's disk; zero if it has none
	Generation uint64 // of the source's disk; another means other contents
	Name       string // what the source calls its disk; at most maxMapName bytes
}

// header is what a slot holds. docs/MAP.md has its bytes.
type header struct {
	version uint32
	seq     uint64
	flags   uint32
	state   MapState
	id      Identity
	log     int64 // size of the log, in bytes; 0: none
	epoch   epochs
	bond    bond
	save    uint64 // tells the saves of a map apart, for its mirror
	boot    UUID   // see cacheName; zero: not known, or the last process ended in order
}

// encode returns the slot.
func (h header) encode() []byte {
	b := make([]byte, 0, slotSize)
	b = append(b, mapMagic...)
	b = binary.LittleEndian.AppendUint32(b, h.version)
	b = binary.LittleEndian.AppendUint32(b, h.flags)
	b = binary.LittleEndian.AppendUint64(b, h.seq)
	b = binary.LittleEndian.AppendUint64(b, uint64(h.id.Size))
	b = binary.LittleEndian.AppendUint32(b, uint32(h.id.BlockSize))
	b = binary.LittleEndian.AppendUint32(b, uint32(h.state))
	b = append(b, h.id.Device[:]...)
	b = append(b, h.id.Source[:]...)
	b = binary.LittleEndian.AppendUint64(b, h.id.Generation)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(h.id.Name)))
	b = append(b, h.id.Name...)
	if h.version > 1 {
		b = append(b, zeroes[:epochAt-len(b)]...)
		b = h.epoch.append(b)
		b = h.bond.append(b)
		b = append(b, zeroes[:bootAt-len(b)]...)
		b = append(b, h.boot[:]...)
		b = h.epoch.appendDrawn(b)
		b = binary.LittleEndian.AppendUint64(b, h.save)
	}
	b = append(b, zeroes[:logAt-len(b)]...)
	b = binary.LittleEndian.AppendUint32(b, uint32(h.log))
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// decodeSlot reads a slot. The errors are ErrNotMap, ErrMapNewer, ErrMapDamaged.
func decodeSlot(b []byte) (h header, err error) {
	if string(b[:len(mapMagic)]) != mapMagic {
		return h, ErrNotMap
	}
	if crc32.Checksum(b[:crcAt], castagnoli) != binary.LittleEndian.Uint32(b[crcAt:]) {
		return h, fmt.Errorf("%w: its header has a wrong checksum", ErrMapDamaged)
	}
	le := binary.LittleEndian
	if h.version = le.Uint32(b[8:]); h.version == 0 || h.version > mapVersion {
		return h, fmt.Errorf("%w: it has version %d, and this program knows versions up to %d", ErrMapNewer, h.version, mapVersion)
	}
	h.flags = le.Uint32(b[12:])
	h.seq = le.Uint64(b[16:])
	h.id.Size = int64(le.Uint64(b[24:]))
	h.id.BlockSize = int64(le.Uint32(b[32:]))
	h.state = MapState(le.Uint32(b[36:]))
	copy(h.id.Device[:], b[40:])
	copy(h.id.Source[:], b[56:])
	h.id.Generation = le.Uint64(b[72:])
	h.log = int64(le.Uint32(b[logAt:]))
	if h.version > 1 {
		h.epoch = decodeEpochs(b[epochAt:], b[drawnAt:])
		h.save = le.Uint64(b[saveAt:])
		copy(h.boot[:], b[bootAt:])
	}
	name := int64(le.Uint16(b[nameAt:]))
	switch {
	case h.version == 1 && name > maxMapName && name <= maxOldName:
		return h, fmt.Errorf("the map of a disk with a name of %d bytes, of which version %d holds %d: finish with the program that made it, or remove it and begin anew",
			name, mapVersion, maxMapName)
	case name > maxMapName:
		return h, fmt.Errorf("%w: a name of %d bytes", ErrMapDamaged, name)
	case h.flags&^(flagRevocable|flagLog|flagFailed) != 0:
		return h, fmt.Errorf("%w: it has flags %#x", ErrMapNewer, h.flags)
	case h.state < MapStandby || h.state > MapComplete:
		return h, fmt.Errorf("%w: its state is %d", ErrMapDamaged, uint32(h.state))
	case h.log != 0 != (h.flags&flagLog != 0) || h.log != 0 && (h.log < minLog || h.log > maxLog || h.log%logAlign != 0):
		return h, fmt.Errorf("%w: a log of %d bytes, flags %#x", ErrMapDamaged, h.log, h.flags)
	}
	h.id.Name = string(b[nameAt+2 : nameAt+2+name])
	if err := h.id.check(); err != nil {
		return h, fmt.Errorf("%w: %w", ErrMapDamaged, err)
	}
	if h.version > 1 {
		h.bond, err = decodeBond(b[bondAt:], blocksOf(h.id.Size, h.id.BlockSize))
	}
	return h, err
}

// check says what is wrong with a size or a block size.
func (id Identity) check() error {
	if id.Size < 0 {
		return fmt.Errorf("a disk of %d bytes", id.Size)
	}
	if len(id.Name) > maxMapName {
		return fmt.Errorf("a disk with a name of %d bytes: at most %d fit", len(id.Name), maxMapName)
	}
	return checkBlockSize(id.BlockSize)
}

func checkBlockSize(n int64) error {
	if n < sectorSize || n > maxBlockSize || n&(n-1) != 0 {
		return fmt.Errorf("block size %d: want a power of two from %d to %d", n, sectorSize, maxBlockSize)
	}
	return nil
}

// decodeHeader chooses among the two slots. They are the same, but for a crash
// while they were written: then stale is the one to be mended, else it is -1.
func decodeHeader(slots [2][]byte) (h header, stale int64, err error) {
	var hs [2]header
	var errs [2]error
	for i := range slots {
		hs[i], errs[i] = decodeSlot(slots[i])
		if errors.Is(errs[i], ErrMapNewer) {
			return h, 0, errs[i]
		}
	}
	switch {
	case errs[0] == nil && errs[1] == nil:
		switch {
		case hs[0] == hs[1]:
			return hs[0], -1, nil
		case !hs[0].sameDevice(hs[1]) || hs[0].seq == hs[1].seq:
			return h, 0, fmt.Errorf("%w: its two headers contradict each other", ErrMapDamaged)
		case hs[0].seq > hs[1].seq:
			return hs[0], 1, nil
		}
		return hs[1], 0, nil
	case errs[0] == nil:
		return hs[0], 1, nil
	case errs[1] == nil:
		return hs[1], 0, nil
	case errors.Is(errs[0], ErrNotMap):
		return h, 0, errs[1]
	}
	return h, 0, errs[0]
}

// sameDevice reports whether two headers can be those of one map. What the source
// is and how it calls its disk may change.
func (h header) sameDevice(o header) bool {
	return h.id.Size == o.id.Size && h.id.BlockSize == o.id.BlockSize && h.id.Device == o.id.Device && h.log == o.log
}

// layout is where the regions of a map lie. docs/MAP.md has it, too.
type layout struct {
	blocks  int64
	pages   int64 // of the bits of one region
	sectors int64 // of a block
	masks   int64 // offset of the masks, in bytes
	end     int64 // of the masks, in bytes: here begins the log
	size    int64 // of the map, in bytes
}

// pageSize is the unit in which a map is written, in bytes.
const pageSize = 4096

func bitPages(bits int64) int64 { return (bits + pageBits - 1) / pageBits }

func (id Identity) layout() layout {
	l := layout{blocks: blocksOf(id.Size, id.BlockSize), sectors: id.BlockSize / sectorSize}
	l.pages = bitPages(l.blocks)
	l.masks = headerSize + 2*l.pages*pageSize
	l.end = l.masks + bitPages(blocksOf(id.Size, sectorSize))*pageSize
	l.size = l.end
	return l
}

func (h header) layout() layout {
	l := h.id.layout()
	l.size += h.log
	return l
}

// page is where a page of bits lies, those of written counted after those of
// fetched.
func (l layout) page(n int64) int64 { return headerSize + n*pageSize }

// maskWords is the words that the mask of a whole block takes in memory.
func (l layout) maskWords() int { return int((l.sectors + 63) / 64) }
