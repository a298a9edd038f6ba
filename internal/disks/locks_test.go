package disks

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// TestAReaderKeepsDestFromHalfADiskOnly: one that is complete is served again although
// a backup reads it; what is in half a disk is read by none (fault H1, trap I13).
func TestAReaderKeepsDestFromHalfADiskOnly(t *testing.T) {
	for complete, access := range map[bool]sources.Access{true: sources.AccessLive, false: sources.AccessPartial} {
		dir := t.TempDir()
		specs := parse(t, dir, "b.raw")
		require.NoError(t, run(t, specs, Options{}, life{lo: 0, hi: 64, complete: complete}))
		reader, err := os.Open(filepath.Join(dir, "b.raw"))
		require.NoError(t, err)
		defer reader.Close()
		const consistentRead = 100 // QEMU's lock of one that reads
		require.NoError(t, unix.FcntlFlock(reader.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Start: consistentRead, Len: 1}))
		set, err := OpenDestination(specs, Options{})
		if complete {
			require.NoError(t, err)
		} else {
			require.ErrorIs(t, err, unix.EBUSY)
			require.NoError(t, reader.Close())
			set, err = OpenDestination(specs, Options{})
			require.NoError(t, err)
		}
		d := set.Resumed()[0]
		require.Equal(t, access, d.Access())
		require.NoError(t, d.Close())
		require.NoError(t, set.Close())
	}
}
