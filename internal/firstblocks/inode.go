package firstblocks

import (
	"context"
	"encoding/binary"
)

// Kinds and flags of inodes.
const (
	kindMask      = 0xF000
	kindDirectory = 0x4000
	kindFile      = 0x8000
	kindLink      = 0xA000

	flagExtents = 0x80000
	flagInline  = 0x10000000
)

const (
	inodeRoot   = 60 // bytes of an inode in which the tree of its blocks begins, or a short link is
	resizeInode = 7  // names descriptors for a larger file system
)

// maxDepth is how deep a tree of extents can be.
const maxDepth = 5

// maxReplay is how much of a journal goes first, in bytes.
const maxReplay = 8 << 20

// inodesOf looks at the inodes of a block, of which the first has the given number.
func (v *volume) inodesOf(ctx context.Context, b []byte, number uint64) error {
	for ; len(b) > 0; b, number = b[v.inodeSize:], number+1 {
		inode := b[:v.inodeSize]
		if err := v.inodeOf(ctx, inode, number); err != nil {
			return err
		}
	}
	return nil
}

// inodeOf notes what has to be read to use an inode: all of a directory, of a long symbolic link and of a small file,
// and of another file what says where it lies.
func (v *volume) inodeOf(ctx context.Context, inode []byte, number uint64) error {
	if little.Uint16(inode[0x1A:]) == 0 || number == resizeInode { // no link leads to it
		return nil
	}
	t := tree{volume: v}
	switch kind := little.Uint16(inode) & kindMask; {
	case number == v.journal:
		t.blocks = new(ranges)
	case kind == kindDirectory, kind == kindLink && little.Uint32(inode[4:]) >= inodeRoot:
		t.blocks = &v.paths
	case kind != kindFile:
		return nil
	case little.Uint32(inode[4:]) <= maxSmall && little.Uint32(inode[0x6C:]) == 0:
		t.blocks = &v.small
	}
	v.note(&v.paths, uint64(little.Uint32(inode[0x68:]))|uint64(little.Uint16(inode[0x76:]))<<32, 1) // attributes
	flags, root := little.Uint32(inode[0x20:]), inode[0x28:0x28+inodeRoot]
	if flags&flagInline != 0 {
		return nil
	}
	var err error
	if flags&flagExtents != 0 {
		err = t.extents(ctx, root, maxDepth)
	} else {
		err = t.pointers(ctx, root)
	}
	if err != nil || number != v.journal {
		return err
	}
	return v.replay(ctx, *t.blocks)
}

// tree is what leads to the blocks of an inode.
type tree struct {
	*volume
	blocks *ranges // gets the blocks themselves; nil: only what the inode itself names is noted
}

// extents notes what a node leads to that may be so deep.
func (t tree) extents(ctx context.Context, node []byte, deepest int) error {
	depth := int(little.Uint16(node[6:]))
	if little.Uint16(node) != 0xF30A || depth > deepest {
		return nil
	}
	entries := node[12:]
	for range min(int(little.Uint16(node[2:])), len(entries)/12) {
		e := entries[:12]
		entries = entries[12:]
		if depth == 0 {
			count := uint64(little.Uint16(e[4:]))
			if count > 1<<15 {
				count -= 1 << 15 // allocated, and not written yet
			}
			if t.blocks != nil {
				t.note(t.blocks, uint64(little.Uint16(e[6:]))<<32|uint64(little.Uint32(e[8:])), count)
			}
			continue
		}
		child := uint64(little.Uint16(e[8:]))<<32 | uint64(little.Uint32(e[4:]))
		t.note(&t.paths, child, 1)
		if t.blocks == nil {
			continue
		}
		b, err := t.block(ctx, child)
		switch {
		case err != nil:
			return err
		case b == nil:
			continue
		}
		if err := t.extents(ctx, b, depth-1); err != nil {
			return err
		}
	}
	return nil
}

// pointers notes what the 15 pointers of an inode lead to: 12 to blocks, and one each to blocks of pointers, of
// pointers to such, and of pointers to those.
func (t tree) pointers(ctx context.Context, where []byte) error {
	for i := range 15 {
		if err := t.pointer(ctx, uint64(little.Uint32(where[4*i:])), max(0, i-11)); err != nil {
			return err
		}
	}
	return nil
}

// pointer notes a block, and what it leads to if it is one of pointers, of the given level.
func (t tree) pointer(ctx context.Context, block uint64, level int) error {
	switch {
	case block == 0:
		return nil
	case level > 0:
		t.note(&t.paths, block, 1)
	case t.blocks != nil:
		t.note(t.blocks, block, 1)
	}
	if level == 0 || t.blocks == nil {
		return nil
	}
	b, err := t.block(ctx, block)
	if err != nil {
		return err
	}
	for ; len(b) > 0; b = b[4:] {
		if err := t.pointer(ctx, uint64(little.Uint32(b)), level-1); err != nil {
			return err
		}
	}
	return nil
}

// replay notes what is read first of a journal, whose blocks are given in their order, when it is replayed: its
// superblock, and what follows the start of the log.
func (v *volume) replay(ctx context.Context, blocks ranges) error {
	if len(blocks) == 0 {
		return nil
	}
	super := make([]byte, 1024)
	if ok, err := v.one(ctx, super, blocks[0].Off); !ok || err != nil {
		return err
	}
	start := int64(binary.BigEndian.Uint32(super[0x1C:]))
	if binary.BigEndian.Uint32(super) != 0xC03B3998 || start == 0 {
		return nil
	}
	v.layout.add(blocks[0].Off, v.blockSize)
	left := int64(maxReplay)
	skip := start * v.blockSize
	for range 2 { // from the start to the end, and then what precedes it
		for _, b := range blocks {
			over := min(skip, b.Length)
			skip -= over
			if n := min(b.Length-over, left); n > 0 {
				v.layout.add(b.Off+over, n)
				left -= n
			}
		}
	}
	return nil
}
