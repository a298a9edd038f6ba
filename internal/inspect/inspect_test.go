package inspect

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/internal/identity"
	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

const (
	blockSize = 4096
	blocks    = 64
	size      = blocks*blockSize - 1000 // the last block is a short one
)

// noSource is asked for nothing here.
type noSource struct{}

func (noSource) NeedAt(int64, int64)     {}
func (noSource) DontNeedAt(int64, int64) {}

// receive makes a disk and its map, and receives what fill gives, until the
// device is closed.
func receive(t *testing.T, fill func(d *lazy.Device, s *lazy.Stream)) (disk, where string) {
	t.Helper()
	disk = filepath.Join(t.TempDir(), "b.raw")
	where = disk + ".map"
	f, err := sources.OpenFile(disk, sources.FileOptions{Create: true, Size: size})
	require.NoError(t, err)
	m, err := lazy.CreateMap(where, lazy.Identity{
		Size: size, BlockSize: blockSize, Source: lazy.UUID{1, 2, 3}, Generation: 7, Name: "vm",
	})
	require.NoError(t, err)
	d, err := lazy.New(f, lazy.Options{BlockSize: blockSize, Map: m})
	require.NoError(t, err)
	require.NoError(t, d.GoLive())
	s := d.Attach(noSource{})
	fill(d, s)
	require.NoError(t, s.Close())
	require.NoError(t, d.Close())
	require.NoError(t, m.Close())
	require.NoError(t, f.Close())
	return disk, where
}

func text(t *testing.T, r *Report) string {
	t.Helper()
	var b strings.Builder
	require.NoError(t, r.WriteText(&b))
	return b.String()
}

// arrive lets n blocks come from the source, from a block on.
func arrive(t *testing.T, s *lazy.Stream, block, n int64) {
	t.Helper()
	p := make([]byte, min(n*blockSize, size-block*blockSize))
	_, err := s.WriteAt(p, block*blockSize)
	require.NoError(t, err)
}

func TestReportOfAPartSaysWhatIsMissing(t *testing.T) {
	disk, where := receive(t, func(d *lazy.Device, s *lazy.Stream) {
		arrive(t, s, 0, 3)
		for _, w := range []struct{ off, n int64 }{{10 * blockSize, 2 * blockSize}, {20 * blockSize, 512}} {
			_, err := d.WriteAt(make([]byte, w.n), w.off)
			require.NoError(t, err)
		}
	})
	before, err := os.ReadFile(where)
	require.NoError(t, err)
	r, err := Of(disk, where)
	require.NoError(t, err)
	after, err := os.ReadFile(where)
	require.NoError(t, err)
	require.Equal(t, before, after, "looking changes nothing")

	require.Equal(t, "live", r.State)
	require.False(t, r.Safe)
	require.False(t, r.InUse)
	require.Equal(t, []int64{3, 2, 59, 1}, []int64{r.Fetched, r.Written, r.Missing, r.Partial})
	require.Equal(t, []Run{{3 * blockSize, 7 * blockSize}, {12 * blockSize, size - 12*blockSize}}, r.Runs)
	require.Equal(t, "vm", r.Name)
	require.EqualValues(t, 7, r.Generation)
	require.Equal(t, "01020300-0000-0000-0000-000000000000", r.Source)
	words := text(t, r)
	require.Contains(t, words, "blocks: 3 fetched, 2 written here, 59 missing (1 of them partly written)")
	require.Contains(t, words, "missing: 28672 bytes at 12288\n")
	require.Contains(t, words, "not safe: the disk is not whole")

	var b bytes.Buffer
	require.NoError(t, r.WriteJSON(&b))
	var back Report
	require.NoError(t, json.Unmarshal(b.Bytes(), &back))
	require.Equal(t, *r, back)
	require.Contains(t, b.String(), `"missing_runs"`)
}

func TestReportOfACompleteDisk(t *testing.T) {
	disk, where := receive(t, func(d *lazy.Device, s *lazy.Stream) {
		arrive(t, s, 0, blocks)
		require.NoError(t, d.Complete())
	})
	r, err := Of(disk, where)
	require.NoError(t, err)
	require.Equal(t, "complete", r.State)
	require.True(t, r.Safe)
	require.Zero(t, r.Missing)
	require.Contains(t, text(t, r), "safe: the disk is complete and can be used without silo-nbd")
	var b strings.Builder
	require.NoError(t, r.WriteJSON(&b))
	require.Contains(t, b.String(), `"missing_runs": []`)

	// A complete map vouches for its disk, and for no other.
	for name, spoil := range map[string]func() error{
		"shrunk": func() error { return os.Truncate(disk, size-1) },
		"grown":  func() error { return os.Truncate(disk, size+1) },
		"gone":   func() error { return os.Remove(disk) },
	} {
		t.Run(name, func(t *testing.T) {
			require.NoError(t, os.WriteFile(disk, nil, 0o600))
			require.NoError(t, os.Truncate(disk, size))
			require.NoError(t, spoil())
			r, err := Of(disk, where)
			require.NoError(t, err)
			require.False(t, r.Safe)
			require.NotEmpty(t, r.Problem)
			require.Contains(t, text(t, r), "not safe: ")
		})
	}
}

func TestReportOfADiskInUse(t *testing.T) {
	disk, where := receive(t, func(*lazy.Device, *lazy.Stream) {})
	m, err := lazy.OpenMap(where, lazy.Identity{})
	require.NoError(t, err)
	r, err := Of(disk, where)
	require.NoError(t, err)
	require.True(t, r.InUse)
	require.False(t, r.Safe)
	words := text(t, r)
	require.Contains(t, words, "in use: ")
	require.NotContains(t, words, "log: ")
	r.Logged = 512
	require.Contains(t, text(t, r), "log: 512 bytes of flushed writes that the disk may not have yet")
	require.NoError(t, m.Close())
}

func TestManyRunsAreListedInJSONOnly(t *testing.T) {
	disk, where := receive(t, func(_ *lazy.Device, s *lazy.Stream) {
		for b := int64(0); b < blocks; b += 2 {
			arrive(t, s, b, 1)
		}
	})
	r, err := Of(disk, where)
	require.NoError(t, err)
	require.Len(t, r.Runs, blocks/2)
	words := text(t, r)
	require.Equal(t, maxRuns, strings.Count(words, "  missing: "))
	require.Contains(t, words, "and 12 more runs: --json lists all")
}

func TestWhatIsNoMapIsRefused(t *testing.T) {
	dir := t.TempDir()
	_, err := Of(dir+"/b.raw", dir+"/b.raw.silo-nbd")
	require.ErrorIs(t, err, os.ErrNotExist)
	require.ErrorContains(t, err, "--map")
	require.NoError(t, os.WriteFile(dir+"/b.raw.silo-nbd", []byte("somebody's"), 0o600))
	_, err = Of(dir+"/b.raw", dir+"/b.raw.silo-nbd")
	require.ErrorIs(t, err, lazy.ErrNotMap)
}

// A disk that was handed off is not safe to use, whatever its map says (fault A2).
func TestDiskThatWasHandedOffIsNotSafe(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "vm.raw")
	require.NoError(t, os.WriteFile(disk, make([]byte, 8192), 0o600))
	_, err := Disk(disk, disk+".silo-nbd", "")
	require.ErrorIs(t, err, os.ErrNotExist, "nothing is known of it")

	f, err := sources.OpenFile(disk, sources.FileOptions{})
	require.NoError(t, err)
	defer f.Close()
	l, err := identity.Open([]identity.Spec{{Disk: f, Name: "vm"}}, identity.Options{Live: true})
	require.NoError(t, err)
	require.NoError(t, l.Prepare(map[string]migrate.Owner{"vm": {Device: migrate.Device{7}}}))
	require.NoError(t, l.HandOff())
	require.NoError(t, l.Taken())
	require.NoError(t, l.Close())

	says := func() (*Report, string) {
		r, err := Disk(disk, disk+".silo-nbd", "")
		require.NoError(t, err)
		require.False(t, r.Safe)
		require.Equal(t, "07000000000000000000000000000000", r.HandedOff.Device)
		require.True(t, r.HandedOff.Taken)
		var b strings.Builder
		require.NoError(t, r.WriteText(&b))
		require.Contains(t, b.String(), "not safe: it was handed off: ")
		require.Contains(t, b.String(), "belongs to device 07000000000000000000000000000000, which is live")
		require.NotContains(t, b.String(), "can be used")
		return r, b.String()
	}
	_, text := says()
	require.Contains(t, text, "no map")

	m, err := lazy.CreateMap(disk+".silo-nbd", lazy.Identity{Size: 8192, BlockSize: 4096})
	require.NoError(t, err)
	require.NoError(t, m.Close())
	r, _ := says()
	require.Equal(t, "standby", r.State)

	require.NoError(t, os.WriteFile(disk+identity.Suffix, []byte("damaged"), 0o600))
	r, err = Disk(disk, disk+".silo-nbd", "")
	require.NoError(t, err)
	require.Contains(t, r.Problem, "damaged")
	require.NoError(t, os.Remove(disk+".silo-nbd"))
	_, err = Disk(disk, disk+".silo-nbd", "")
	require.ErrorContains(t, err, "damaged")
}
