// Package firstblocks finds what a machine that uses a disk will ask for first: what its file systems consist of, but
// for the contents of files, and then small files, of which each costs a round trip for little. It knows ext2, ext3 and ext4, on the whole disk or in the partitions of a GPT or MBR.
//
// What is on the disk is a guest's and may be made to harm: every number is held against the disk, and the work is
// bounded. What comes out is an order and nothing else: a wrong one costs time.
//
// The format is that of the kernel's Documentation/filesystems/ext4.
package firstblocks

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

const (
	// maxTables is how many bytes of inode tables are read of a disk: those of some 260,000 files.
	maxTables = 64 << 20
	// maxReads bounds the other reads of a disk, which are of one file system block each.
	maxReads = 4 << 10
	// maxRanges bounds the ranges of each kind.
	maxRanges = 1 << 16
	// maxSmall is the size of a small file, in bytes.
	maxSmall = 16 << 10
	// maxTime bounds it all, on a disk that is slow.
	maxTime = 20 * time.Second
)

var little = binary.LittleEndian

// Find returns what goes first of disk, the most useful first: what describes its file systems, their inodes, what
// leads to files, and small files. It is empty for a disk of which nothing is known, which costs a few reads. Beside an error is what had
// been found until then.
func Find(ctx context.Context, disk storage.StorageProvider) ([]migrate.Range, error) {
	s, err := look(ctx, disk)
	var all []migrate.Range
	for _, kind := range []*ranges{&s.layout, &s.inodes, &s.paths, &s.small} {
		all = append(all, kind.merged()...)
	}
	return all, err
}

// look is Find before its ranges are in order.
func look(ctx context.Context, disk storage.StorageProvider) (*scan, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, maxTime, errTime)
	defer cancel()
	size := int64(min(disk.Size(), 1<<62))
	s := &scan{disk: disk, size: size, tables: maxTables, reads: maxReads}
	var err error
	for _, p := range append([]extent{{0, size}}, s.partitions(ctx)...) {
		if err = s.fileSystem(ctx, p); err != nil {
			break
		}
	}
	if errors.Is(err, errEnough) {
		err = nil
	}
	return s, err
}

var (
	errTime   = fmt.Errorf("firstblocks: not done after %v", maxTime)
	errEnough = errors.New("firstblocks: enough was read")
)

// scan is one look at a disk.
type scan struct {
	disk   io.ReaderAt
	size   int64
	tables int64 // bytes of inode tables that may still be read
	reads  int   // other reads that may still be made

	layout ranges // superblocks, descriptors, bitmaps
	inodes ranges
	paths  ranges // directories, and where files lie
	small  ranges // files
}

// extent is a part of the disk, in bytes.
type extent struct{ off, length int64 }

// read fills p from off. It is false, with no error, where the disk has no such bytes.
func (s *scan) read(ctx context.Context, p []byte, off int64) (bool, error) {
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	if off < 0 || off > s.size || int64(len(p)) > s.size-off {
		return false, nil
	}
	if n, err := s.disk.ReadAt(p, off); n < len(p) {
		return false, fmt.Errorf("firstblocks: read %d bytes at %d: %w", len(p), off, err)
	}
	return true, nil
}

// one is read for one of the reads that are counted.
func (s *scan) one(ctx context.Context, p []byte, off int64) (bool, error) {
	if s.reads == 0 {
		return false, errEnough
	}
	s.reads--
	return s.read(ctx, p, off)
}

// ranges are of the disk.
type ranges []migrate.Range

// add adds a range, if there is room. Those that follow one another become one.
func (r *ranges) add(off, length int64) {
	if n := len(*r); n > 0 && (*r)[n-1].Off+(*r)[n-1].Length == off {
		(*r)[n-1].Length += length
		return
	}
	if len(*r) < maxRanges {
		*r = append(*r, migrate.Range{Off: off, Length: length})
	}
}

// merged returns them ascending, with nothing twice.
func (r *ranges) merged() []migrate.Range {
	slices.SortFunc(*r, func(a, b migrate.Range) int { return int(min(max(a.Off-b.Off, -1), 1)) })
	var out []migrate.Range
	for _, x := range *r {
		if n := len(out); n > 0 && x.Off <= out[n-1].Off+out[n-1].Length {
			out[n-1].Length = max(out[n-1].Length, x.Off+x.Length-out[n-1].Off)
			continue
		}
		out = append(out, x)
	}
	return out
}
