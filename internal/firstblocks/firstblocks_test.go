package firstblocks

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// disk is some bytes, of which some may be changed, and counts what is read of them.
type disk struct {
	storage.StorageProvider // nil: nothing else is asked of it
	data                    []byte
	changed                 map[int64]byte
	broken                  int64         // reads from here on fail; 0: none
	slow                    time.Duration // each read takes so long
	reads, bytes            int64
}

func (d *disk) Size() uint64 { return uint64(len(d.data)) }

var errBroken = errors.New("broken sector")

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	d.reads++
	d.bytes += int64(len(p))
	if d.slow > 0 {
		<-time.After(d.slow)
	}
	if off < 0 || off > int64(len(d.data)) {
		return 0, fmt.Errorf("read at %d", off)
	}
	if d.broken > 0 && off+int64(len(p)) > d.broken {
		return 0, errBroken
	}
	n := copy(p, d.data[off:])
	for at, b := range d.changed {
		if at >= off && at < off+int64(n) {
			p[at-off] = b
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// put changes the bytes at off to v.
func (d *disk) put(off int64, v []byte) {
	if d.changed == nil {
		d.changed = make(map[int64]byte)
	}
	for i, b := range v {
		d.changed[off+int64(i)] = b
	}
}

func image(t testing.TB, name string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name+".img.gz"))
	require.NoError(t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	require.NoError(t, err)
	data, err := io.ReadAll(z)
	require.NoError(t, err)
	return data
}

// metadata is what e2image says of an image (testdata/make).
func metadata(t testing.TB, name string) (all []migrate.Range) {
	t.Helper()
	list, err := os.ReadFile(filepath.Join("testdata", name+".meta"))
	require.NoError(t, err)
	for line := range strings.Lines(string(list)) {
		var from, to int64
		_, err := fmt.Sscan(line, &from, &to)
		require.NoError(t, err)
		all = append(all, migrate.Range{Off: from, Length: to - from})
	}
	return all
}

// pieces are the parts of 1 KiB that ranges touch and that hold something, ascending.
func pieces(data []byte, all []migrate.Range) (out []int64) {
	for _, r := range all {
		for at := r.Off / 1024; at*1024 < r.Off+r.Length; at++ {
			if !isZero(data[at*1024:][:1024]) {
				out = append(out, at)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

var images = []string{
	"ext2", "ext3", "ext4", "deep", "groups", "old", "metabg", "super2", "inline", "bigalloc", "bigalloc1k", "large", "recover",
}

func TestWhatIsFoundIsWhatE2imageFinds(t *testing.T) {
	more := map[string][]int64{ // that e2image was not asked for: the journal's indirect block, and its log
		"ext3": {288, 289, 290, 291}, "recover": {8322, 8324},
	}
	for _, name := range images {
		d := &disk{data: image(t, name)}
		s, err := look(t.Context(), d)
		require.NoError(t, err)
		found := slices.Concat(s.layout.merged(), s.inodes.merged(), s.paths.merged())
		got := pieces(d.data, found)
		for _, p := range more[name] {
			at := slices.Index(got, p)
			require.GreaterOrEqual(t, at, 0, "%s: %d", name, p)
			got = slices.Delete(got, at, at+1)
		}
		require.Equal(t, pieces(d.data, metadata(t, name)), got, name)
		var bytes int64
		for _, r := range found {
			bytes += r.Length
		}
		require.LessOrEqual(t, bytes, int64(len(got)+2048)*1024+maxReplay, "%s: hardly more than what holds something", name)
		t.Logf("%-10s %4d KiB in %3d ranges, %d reads of %d KiB", name, bytes>>10, len(found), d.reads, d.bytes>>10)
	}
}

// The files of the images are known by how they begin, and none of them is large.
func TestSmallFilesAreFound(t *testing.T) {
	for _, name := range images {
		d := &disk{data: image(t, name)}
		s, err := look(t.Context(), d)
		require.NoError(t, err)
		var want []int64
		for at := int64(0); at < int64(len(d.data)); at += 1024 {
			if p := d.data[at:]; bytes.HasPrefix(p, []byte("y\n\x00")) || bytes.HasPrefix(p, []byte("file ")) || bytes.HasPrefix(p, []byte("xxx")) {
				want = append(want, at/1024)
			}
		}
		require.Greater(t, len(want), 40)
		require.Equal(t, want, pieces(d.data, s.small), name)
	}
}

// The superblock goes before the inodes, the inodes before the directories, and these before files; each kind ascending.
func TestTheMostUsefulGoesFirst(t *testing.T) {
	found, err := Find(t.Context(), &disk{data: image(t, "ext4")})
	require.NoError(t, err)
	require.Equal(t, int64(1024), found[0].Off)
	turns := 0
	for i, r := range found[1:] {
		if r.Off < found[i].Off {
			turns++
		}
	}
	require.LessOrEqual(t, turns, 3)
}

func TestAnUnknownDiskCostsAFewReads(t *testing.T) {
	for name, data := range map[string][]byte{
		"nothing": make([]byte, 8<<20), "short": make([]byte, 100), "noise": bytes.Repeat([]byte{0xA5, 0x5A, 0xEE}, 1<<20),
		"half a superblock": make([]byte, 1500), "an empty one": nil,
	} {
		d := &disk{data: data}
		found, err := Find(t.Context(), d)
		require.NoError(t, err, name)
		require.Empty(t, found, name)
		require.LessOrEqual(t, d.reads, int64(3), name)
	}
}

// partitioned is a disk with a file system at off, of count sectors.
func partitioned(fs []byte, off int64, table func(disk []byte, from, count uint64)) []byte {
	data := make([]byte, off+int64(len(fs))+1<<20)
	copy(data[off:], fs)
	data[510], data[511] = 0x55, 0xAA
	table(data, uint64(off/512), uint64(len(fs)/512))
	return data
}

func TestFileSystemsAreFoundInPartitions(t *testing.T) {
	fs := image(t, "groups")
	want, err := Find(t.Context(), &disk{data: fs})
	require.NoError(t, err)
	gpt := func(unit uint64) func([]byte, uint64, uint64) {
		return func(d []byte, from, count uint64) {
			d[446+4] = 0xEE
			header, entry := d[unit:], d[2*unit+128:] // the second entry
			copy(header, "EFI PART")
			binary.LittleEndian.PutUint64(header[72:], 2)
			binary.LittleEndian.PutUint32(header[80:], 128)
			binary.LittleEndian.PutUint32(header[84:], 128)
			binary.LittleEndian.PutUint64(entry[32:], from*512/unit)
			binary.LittleEndian.PutUint64(entry[40:], (from+count)*512/unit-1)
		}
	}
	for name, table := range map[string]func([]byte, uint64, uint64){
		"mbr": func(d []byte, from, count uint64) {
			entry := d[446+32:] // the third
			entry[4] = 0x83
			binary.LittleEndian.PutUint32(entry[8:], uint32(from))
			binary.LittleEndian.PutUint32(entry[12:], uint32(count))
		},
		"gpt": gpt(512), "gpt with sectors of 4 KiB": gpt(4096),
	} {
		const off = 1 << 20
		got, err := Find(t.Context(), &disk{data: partitioned(fs, off, table)})
		require.NoError(t, err, name)
		shifted := slices.Clone(want)
		for i := range shifted {
			shifted[i].Off += off
		}
		require.Equal(t, shifted, got, name)
	}
}

func TestALookThatIsGivenUpReadsNoMore(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errBroken)
	d := &disk{data: image(t, "ext4")}
	found, err := Find(ctx, d)
	require.ErrorIs(t, err, errBroken)
	require.Empty(t, found)
	require.Zero(t, d.reads)
}

func TestABadSectorLeavesWhatWasFound(t *testing.T) {
	data := image(t, "groups")
	all, err := Find(t.Context(), &disk{data: data})
	require.NoError(t, err)
	found, err := Find(t.Context(), &disk{data: data, broken: 2 << 20})
	require.ErrorIs(t, err, errBroken)
	require.NotEmpty(t, found)
	require.Less(t, len(found), len(all))
}

func TestASlowDiskIsLookedAtForSomeTimeOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &disk{data: image(t, "deep"), slow: 3 * time.Second}
		began := time.Now()
		found, err := Find(t.Context(), d)
		require.ErrorIs(t, err, errTime)
		require.NotEmpty(t, found)
		require.Less(t, time.Since(began), maxTime+2*d.slow)
	})
}
