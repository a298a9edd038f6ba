package firstblocks

import (
	"bytes"
	"context"
	"math/bits"
)

// Features that matter here.
const (
	compatSparseSuper2 = 0x200
	incompatRecover    = 0x4
	incompatMetaBG     = 0x10
	incompat64Bit      = 0x80
	roCompatSparse     = 0x1
	roCompatGDTSum     = 0x10
	roCompatMetaSum    = 0x400
)

// Flags of a group.
const (
	groupNoInodes = 0x1
	groupNoBlocks = 0x2
)

// volume is an ext2, ext3 or ext4 file system.
type volume struct {
	*scan
	off       int64 // where it lies on the disk
	blockSize int64
	blocks    uint64 // that are on the disk

	first     uint64 // the block in which group 0 begins
	groupSize uint64 // blocks
	groups    uint64
	perGroup  uint32 // inodes
	inodeSize int64
	descSize  int64
	metaFrom  uint64 // the first descriptor block that lies in its groups; if there is none, the number of all
	sums      bool   // the descriptors say how much of the inode tables is used
	sparse    bool
	backups   []uint32 // with sparse_super2: the groups that have a superblock; nil: it is without
	journal   uint64   // inode of the journal; 0: it is not read when this is mounted
	wide      bool     // descriptors have upper halves
	lot       []byte   // what is read of an inode table at a time
}

// fileSystem looks for a file system at p.
func (s *scan) fileSystem(ctx context.Context, p extent) error {
	super := make([]byte, 1024)
	if p.length < 2048 {
		return nil
	}
	if ok, err := s.read(ctx, super, p.off+1024); !ok || err != nil {
		return err
	}
	v := s.volume(p, super)
	if v == nil {
		return nil
	}
	s.layout.add(p.off+1024, 1024)
	return v.groupsOf(ctx)
}

// volume returns what a superblock describes, or nil if it is none, or none that can be.
func (s *scan) volume(p extent, super []byte) *volume {
	u32 := func(at int) uint32 { return little.Uint32(super[at:]) }
	if little.Uint16(super[0x38:]) != 0xEF53 || u32(0x18) > 6 {
		return nil
	}
	compat, incompat, roCompat := u32(0x5C), u32(0x60), u32(0x64)
	v := &volume{
		scan: s, off: p.off, blockSize: 1024 << u32(0x18), blocks: uint64(u32(0x04)), first: uint64(u32(0x14)),
		groupSize: uint64(u32(0x20)), perGroup: u32(0x28), inodeSize: 128, descSize: 32,
		sums: roCompat&(roCompatGDTSum|roCompatMetaSum) != 0, sparse: roCompat&roCompatSparse != 0,
	}
	if u32(0x4C) > 0 {
		v.inodeSize = int64(little.Uint16(super[0x58:]))
	}
	if incompat&incompat64Bit != 0 {
		v.descSize, v.wide = int64(little.Uint16(super[0xFE:])), true
		v.blocks |= uint64(u32(0x150)) << 32
	}
	if compat&compatSparseSuper2 != 0 {
		v.backups = []uint32{u32(0x24C), u32(0x250)}
	}
	if incompat&incompatRecover != 0 {
		v.journal = uint64(u32(0xE0))
	}
	v.blocks = min(v.blocks, uint64(p.length/v.blockSize))
	if !power(v.inodeSize, 128, v.blockSize) || !power(v.descSize, 32, v.blockSize) || v.wide && v.descSize < 64 ||
		v.groupSize == 0 || v.perGroup == 0 || int64(v.perGroup) > 8*v.blockSize || v.first > 1 || v.blocks <= v.first {
		return nil
	}
	v.groups = (v.blocks-v.first-1)/v.groupSize + 1
	v.metaFrom = v.groups
	if incompat&incompatMetaBG != 0 {
		v.metaFrom = uint64(u32(0x104))
	}
	v.lot = make([]byte, max(256<<10, v.blockSize))
	return v
}

// power says whether n is a power of two from least to most.
func power(n, least, most int64) bool {
	return n >= least && n <= most && n&(n-1) == 0
}

// bytes is where count blocks from block on lie on the disk. It is false if they do not lie in the file system.
func (v *volume) bytes(block, count uint64) (extent, bool) {
	if block == 0 && v.first > 0 || count == 0 || block >= v.blocks || count > v.blocks-block {
		return extent{}, false
	}
	return extent{v.off + int64(block)*v.blockSize, int64(count) * v.blockSize}, true
}

// note adds count blocks from block on to r, if they can be there.
func (v *volume) note(r *ranges, block, count uint64) {
	if e, ok := v.bytes(block, count); ok && block > 0 {
		r.add(e.off, e.length)
	}
}

// block reads one block; nil if there is none.
func (v *volume) block(ctx context.Context, block uint64) ([]byte, error) {
	e, ok := v.bytes(block, 1)
	if !ok {
		return nil, nil
	}
	b := make([]byte, e.length)
	if ok, err := v.one(ctx, b, e.off); !ok || err != nil {
		return nil, err
	}
	return b, nil
}

// groupsOf reads the descriptors of all groups, and what they lead to.
func (v *volume) groupsOf(ctx context.Context) error {
	each := uint64(v.blockSize / v.descSize)
	for i := uint64(0); i*each < v.groups; i++ {
		at := v.descriptors(i, each)
		b, err := v.block(ctx, at)
		if b == nil || err != nil {
			return err
		}
		v.note(&v.layout, at, 1)
		for n := i * each; n < v.groups && len(b) > 0; n++ {
			if err := v.group(ctx, n, b[:v.descSize]); err != nil {
				return err
			}
			b = b[v.descSize:]
		}
	}
	return nil
}

// descriptors is where block i of the descriptors lies, of which each block has so many.
func (v *volume) descriptors(i, each uint64) uint64 {
	super := uint64(1024 / v.blockSize) // its block
	if i < v.metaFrom {
		return super + 1 + i
	}
	group := i * each
	switch at := v.first + group*v.groupSize; {
	case group == 0:
		return super + 1
	case v.hasSuper(group):
		return at + 1
	default:
		return at
	}
}

// hasSuper says whether a copy of the superblock begins a group.
func (v *volume) hasSuper(group uint64) bool {
	switch {
	case group == 0:
		return true
	case v.backups != nil:
		return group == uint64(v.backups[0]) || group == uint64(v.backups[1])
	case group == 1 || !v.sparse:
		return true
	}
	for _, n := range []uint64{3, 5, 7} {
		p := n
		for p < group {
			hi, lo := bits.Mul64(p, n)
			if hi > 0 {
				break
			}
			p = lo
		}
		if p == group {
			return true
		}
	}
	return false
}

// group notes what a group consists of, and reads its inodes.
func (v *volume) group(ctx context.Context, n uint64, desc []byte) error {
	half := func(lo, hi int) uint64 {
		at := uint64(little.Uint32(desc[lo:]))
		if v.wide {
			at |= uint64(little.Uint32(desc[hi:])) << 32
		}
		return at
	}
	flags, used := little.Uint16(desc[0x12:]), int64(v.perGroup)
	if v.sums {
		unused := int64(little.Uint16(desc[0x1C:]))
		if v.wide {
			unused |= int64(little.Uint16(desc[0x32:])) << 16
		}
		if used -= unused; flags&groupNoInodes != 0 {
			used = 0
		}
	} else {
		flags = 0
	}
	if flags&groupNoBlocks == 0 {
		v.note(&v.layout, half(0x00, 0x20), 1)
	}
	if used <= 0 {
		return nil
	}
	v.note(&v.layout, half(0x04, 0x24), 1)
	return v.table(ctx, half(0x08, 0x28), used*v.inodeSize, n)
}

// table reads the first used bytes of a group's inode table.
func (v *volume) table(ctx context.Context, block uint64, used int64, group uint64) error {
	count := uint64((used + v.blockSize - 1) / v.blockSize)
	e, ok := v.bytes(block, count)
	if !ok {
		return nil
	}
	for done := int64(0); done < e.length; {
		lot := v.lot[:min(int64(len(v.lot)), e.length-done)]
		if v.tables < int64(len(lot)) {
			return errEnough
		}
		v.tables -= int64(len(lot))
		if ok, err := v.read(ctx, lot, e.off+done); !ok || err != nil {
			return err
		}
		for b := lot; len(b) > 0; b = b[v.blockSize:] {
			if !isZero(b[:v.blockSize]) {
				v.inodes.add(e.off+done, v.blockSize)
				number := group*uint64(v.perGroup) + uint64(done/v.inodeSize) + 1
				if err := v.inodesOf(ctx, b[:v.blockSize], number); err != nil {
					return err
				}
			}
			done += v.blockSize
		}
	}
	return nil
}

var zeroes [64 << 10]byte

func isZero(b []byte) bool { return bytes.Equal(b, zeroes[:len(b)]) }
