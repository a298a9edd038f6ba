package identity

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

func liveDisks(t *testing.T) []LiveDisk {
	t.Helper()
	var all []LiveDisk
	dir := t.TempDir()
	for _, name := range []string{"a", "b"} {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, make([]byte, 8192), 0o600))
		f, err := sources.OpenFile(path, sources.FileOptions{})
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, f.Close()) })
		all = append(all, LiveDisk{Disk: f, Name: name, Path: path + Suffix})
	}
	return all
}

func open(t *testing.T, disks []LiveDisk, reclaim bool) (*Live, migrate.Identity) {
	t.Helper()
	l, err := OpenLive(disks, reclaim)
	require.NoError(t, err)
	id, err := l.Identity(1)
	require.NoError(t, err)
	return l, id
}

func TestLiveDiskHasANewGenerationEachTime(t *testing.T) {
	disks := liveDisks(t)
	l, first := open(t, disks, false)
	require.Empty(t, l.Crashed())
	require.Empty(t, l.Ended(), "there was none before")
	l, second := open(t, disks, false) // after a crash
	require.Equal(t, []string{"a", "b"}, l.Crashed())
	require.Empty(t, l.Ended())
	require.Equal(t, first.UUID, second.UUID)
	require.Equal(t, first.Generation+1, second.Generation)
	require.NoError(t, l.Close())
	l, third := open(t, disks, false)
	require.Empty(t, l.Crashed())
	require.Equal(t, []string{"a", "b"}, l.Ended())
	require.Equal(t, second.Generation+1, third.Generation)
	frozen, err := Of(disks[1].Disk, disks[1].Path)
	require.NoError(t, err)
	require.Equal(t, third.Generation+1, frozen.Generation, "what was copied of a live disk has changed since")
}

func handOff(t *testing.T, l *Live) {
	t.Helper()
	require.NoError(t, l.Prepare(map[string]migrate.Owner{"a": {Device: migrate.Device{1}}, "b": {Device: migrate.Device{2}}}))
	require.NoError(t, l.HandOff())
}

func TestHandedOffDisksStayHandedOff(t *testing.T) {
	disks := liveDisks(t)
	l, first := open(t, disks, false)
	handOff(t, l)
	require.NoError(t, l.Close())
	l, again := open(t, disks, false)
	require.True(t, l.HandedOff())
	require.Equal(t, first, again)
	owner, ok := l.Owner("b")
	require.True(t, ok)
	require.Equal(t, migrate.Owner{Device: migrate.Device{2}}, owner)
	_, err := OpenLive(disks[1:], false)
	require.ErrorContains(t, err, "give all of them")
	_, err = Of(disks[1].Disk, disks[1].Path)
	require.ErrorIs(t, err, ErrHandedOff)
	l, reclaimed := open(t, disks, true)
	require.False(t, l.HandedOff())
	require.Greater(t, reclaimed.Generation, first.Generation)
}

// The power goes when only one of two disks says that it was handed off: the
// destination was not told, so none is.
func TestHalfAHandoffIsNone(t *testing.T) {
	disks := liveDisks(t)
	l, first := open(t, disks, false)
	before, err := os.ReadFile(disks[1].Path)
	require.NoError(t, err)
	handOff(t, l)
	require.NoError(t, os.WriteFile(disks[1].Path, before, 0o600))
	l, again := open(t, disks, false)
	require.False(t, l.HandedOff())
	require.Greater(t, again.Generation, first.Generation)

	handOff(t, l)
	require.NoError(t, l.TakeBack())
	l, _ = open(t, disks, false)
	require.False(t, l.HandedOff())
}
