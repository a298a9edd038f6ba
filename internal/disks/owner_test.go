package disks

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/internal/identity"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

// handOff serves the disk at path here and hands it off, as source --nbd does.
func handOff(t *testing.T, path string) error {
	t.Helper()
	files, err := OpenSource([]Spec{{Name: "b", Path: path}}, true)
	if err != nil {
		return err
	}
	defer func() { require.NoError(t, files[0].Close()) }()
	l, err := identity.Open([]identity.Spec{{Disk: files[0], Name: "b"}}, identity.Options{Live: true})
	if err != nil {
		return err
	}
	_, away := l.Owner("b")
	if !away {
		require.NoError(t, l.Prepare(map[string]migrate.Owner{"b": {Device: migrate.Device{7}, Epoch: 9}}))
		require.NoError(t, l.HandOff())
		require.NoError(t, l.Taken())
	}
	require.NoError(t, l.Close())
	if away {
		return identity.ErrHandedOff
	}
	return nil
}

// TestDestDoesNotServeWhatItsHostHasHandedOff, by any name of the disk: the dest command
// of an earlier move runs again (fault A2, trap I1).
func TestDestDoesNotServeWhatItsHostHasHandedOff(t *testing.T) {
	dir := t.TempDir()
	specs := parse(t, dir, "b.raw")
	require.NoError(t, run(t, specs, Options{}, life{lo: 0, hi: 64, complete: true}))
	require.NoError(t, handOff(t, dir+"/b.raw"))
	require.NoError(t, os.Symlink("b.raw", dir+"/link"))
	for _, name := range []string{"b.raw", "link"} {
		before, err := os.ReadFile(filepath.Join(dir, "b.raw"+MapSuffix))
		require.NoError(t, err)
		_, err = OpenDestination(parse(t, dir, name), Options{})
		require.ErrorIs(t, err, identity.ErrHandedOff, name)
		require.ErrorContains(t, err, "--overwrite", name)
		_, err = OpenDestination(parse(t, dir, name), Options{Moved: true})
		require.ErrorIs(t, err, identity.ErrHandedOff, name)
		after, err := os.ReadFile(filepath.Join(dir, "b.raw"+MapSuffix))
		require.NoError(t, err)
		require.Equal(t, before, after, "nothing is changed")
	}
}

// TestDiskGoesThereAndBack five times: its return ends what was noted when it left, so it
// is served without force, and can be handed off again (faults A2 and H12, trap I2).
func TestDiskGoesThereAndBack(t *testing.T) {
	dir := t.TempDir()
	specs := parse(t, dir, "b.raw")
	require.NoError(t, run(t, specs, Options{}, life{lo: 0, hi: 64, complete: true}))
	for range 5 {
		require.NoError(t, handOff(t, dir+"/b.raw"))
		require.ErrorIs(t, handOff(t, dir+"/b.raw"), identity.ErrHandedOff)
		require.NoError(t, run(t, specs, Options{Overwrite: true}, life{lo: 0, hi: 20}), "it comes back")
		require.ErrorContains(t, handOff(t, dir+"/b.raw"), "is not whole")
		require.NoError(t, run(t, specs, Options{}, life{lo: 20, hi: 64, complete: true}))
		note, err := identity.NoteOf(dir+"/b.raw", "")
		require.NoError(t, err)
		require.Nil(t, note)
	}
}
