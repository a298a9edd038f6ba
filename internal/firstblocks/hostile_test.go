package firstblocks

import (
	"bytes"
	"encoding/binary"
	"math"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

// harmless looks at a disk that may be made to harm, and checks what must hold of any.
func harmless(t testing.TB, d *disk) []migrate.Range {
	t.Helper()
	found, err := Find(t.Context(), d)
	require.NoError(t, err)
	size := int64(len(d.data))
	require.LessOrEqual(t, d.bytes, int64(maxTables+(maxReads+8+2*maxEntries)*(64<<10)))
	require.LessOrEqual(t, len(found), 4*maxRanges)
	var total int64
	for _, r := range found {
		require.True(t, r.Off >= 0 && r.Length > 0 && r.Off < size && r.Length <= size-r.Off, "%+v of %d", r, size)
		total += r.Length
	}
	require.LessOrEqual(t, total, 4*size, "nothing twice, in each of four kinds")
	return found
}

func le16(v uint16) []byte { return binary.LittleEndian.AppendUint16(nil, v) }

func le32(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }

// A superblock's numbers, each as large and as small as can be, alone and together.
func TestASuperblockThatLiesDoesNoHarm(t *testing.T) {
	fields := []int64{0x0, 0x4, 0x14, 0x18, 0x1C, 0x20, 0x24, 0x28, 0x4C, 0x58, 0x5C, 0x60, 0x64, 0xE0, 0xFC, 0x104, 0x150, 0x24C, 0x250}
	for _, name := range []string{"metabg", "recover"} {
		data := image(t, name)
		for _, v := range []uint32{0, 1, 2, 6, 64, 128, 256, 1024, 1 << 16, math.MaxInt32, math.MaxUint32} {
			for _, at := range fields {
				d := &disk{data: data}
				d.put(1024+at, le32(v))
				harmless(t, d)
				d.put(1024+0x20, le32(1)) // a block a group
				d.put(1024+0x150, le32(math.MaxUint32))
				harmless(t, d)
			}
		}
	}
}

func TestADiskThatWasCutShortDoesNoHarm(t *testing.T) {
	for _, name := range images {
		data := image(t, name)
		for size := len(data); size > 0; size -= len(data)/7 + 1 {
			harmless(t, &disk{data: data[:size]})
		}
	}
}

// A tree that leads to itself is not followed for ever.
func TestATreeThatLeadsToItselfEnds(t *testing.T) {
	data := make([]byte, 32<<20)
	copy(data, image(t, "ext4"))
	const block, node = 4096, 2000 // what is in it leads to itself
	header := func(depth uint16) []byte {
		return bytes.Join([][]byte{le16(0xF30A), le16(340), le16(340), le16(depth), le32(0)}, nil)
	}
	child := bytes.Join([][]byte{le32(0), le32(node), le32(0)}, nil)
	copy(data[node*block:], append(header(4), bytes.Repeat(child, 340)...))
	root := rootInode(t, data)
	copy(data[root+0x28:], append(header(5), bytes.Repeat(child, 4)...))
	d := &disk{data: data}
	require.NotEmpty(t, harmless(t, d))
	require.Less(t, d.reads, int64(2*maxReads))

	copy(data[root+0x20:], le32(0)) // no extents: pointers
	copy(data[root+0x28:], bytes.Repeat(le32(node), 15))
	copy(data[node*block:], bytes.Repeat(le32(node), block/4))
	d = &disk{data: data}
	require.NotEmpty(t, harmless(t, d))
	require.GreaterOrEqual(t, d.reads, int64(maxReads), "it was followed as far as that goes")
	require.Less(t, d.reads, int64(2*maxReads))
}

// rootInode is where the inode of the root directory lies in an image of blocks of 4 KiB.
func rootInode(t testing.TB, data []byte) int64 {
	t.Helper()
	at := int64(binary.LittleEndian.Uint32(data[4096+8:]))*4096 + 256
	require.Equal(t, uint16(kindDirectory), binary.LittleEndian.Uint16(data[at:])&kindMask)
	return at
}

// FuzzFind changes bytes of the metadata of real file systems: each 10 bytes of the input are where, and eight bytes to
// put there.
func FuzzFind(f *testing.F) {
	all := make([][]byte, len(images))
	where := make([][]migrate.Range, len(images))
	for i, name := range images {
		all[i], where[i] = image(f, name), metadata(f, name)
		f.Add(byte(i), []byte{})
		f.Add(byte(i), []byte("\x00\x20\xff\xff\xff\xff\xff\xff\xff\xff\x00\x60\x00\x00\x00\x00\x00\x00\x00\x80"))
	}
	f.Fuzz(func(t *testing.T, which byte, changes []byte) {
		i := int(which) % len(all)
		d := &disk{data: all[i]}
		for ; len(changes) >= 10 && len(d.changed) < 400; changes = changes[10:] {
			d.put(place(where[i], int64(binary.LittleEndian.Uint16(changes))*4), changes[2:10])
		}
		harmless(t, d)
	})
}

// place is the n-th byte of ranges, which begin again at their end.
func place(all []migrate.Range, n int64) int64 {
	for {
		for _, r := range all {
			if n < r.Length {
				return r.Off + n
			}
			n -= r.Length
		}
	}
}
