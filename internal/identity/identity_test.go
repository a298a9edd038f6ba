package identity

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

func of(t *testing.T, path string) (migrate.Identity, error) {
	t.Helper()
	f, err := sources.OpenFile(path, sources.FileOptions{ReadOnly: true})
	require.NoError(t, err)
	defer f.Close()
	where, err := Default(path, false)
	require.NoError(t, err)
	return Of(f, where)
}

func disk(t *testing.T, size int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "a.raw")
	require.NoError(t, os.WriteFile(path, make([]byte, size), 0o600))
	return path
}

func TestIdentityStaysWhileTheDiskDoes(t *testing.T) {
	for _, size := range []int{1, 4095, 4096, 4097, 1 << 20} {
		path := disk(t, size)
		first, err := of(t, path)
		require.NoError(t, err)
		require.EqualValues(t, 1, first.Generation)
		require.NotZero(t, first.UUID)
		again, err := of(t, path)
		require.NoError(t, err)
		require.Equal(t, first, again)
		other, err := of(t, disk(t, size))
		require.NoError(t, err)
		require.NotEqual(t, first.UUID, other.UUID)
	}
}

func TestChangedDiskIsAnotherGeneration(t *testing.T) {
	path := disk(t, 1<<20)
	first, err := of(t, path)
	require.NoError(t, err)
	was, err := os.Stat(path)
	require.NoError(t, err)
	for i, change := range []func(){
		func() { require.NoError(t, os.Truncate(path, 2<<20)) },
		func() { require.NoError(t, os.Chtimes(path, time.Time{}, was.ModTime().Add(time.Second))) },
		func() { // the same size and time, other bytes at the very end
			at, err := os.Stat(path)
			require.NoError(t, err)
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			require.NoError(t, err)
			_, err = f.WriteAt([]byte{1}, 2<<20-1)
			require.NoError(t, err)
			require.NoError(t, f.Close())
			require.NoError(t, os.Chtimes(path, time.Time{}, at.ModTime()))
		},
		func() { // a copy in its place
			b, err := os.ReadFile(path)
			require.NoError(t, err)
			at, err := os.Stat(path)
			require.NoError(t, err)
			require.NoError(t, os.Rename(path, path+".old"))
			require.NoError(t, os.WriteFile(path, b, 0o600))
			require.NoError(t, os.Chtimes(path, time.Time{}, at.ModTime()))
		},
	} {
		change()
		now, err := of(t, path)
		require.NoError(t, err)
		require.Equal(t, migrate.Identity{UUID: first.UUID, Generation: uint64(i + 2)}, now)
	}
}

func TestDamagedStateIsRefusedAndLeftAlone(t *testing.T) {
	for name, content := range map[string]string{
		"empty": "", "foreign": "hello", "newer": `{"version": 2}`,
		"no uuid": `{"version": 1, "uuid": "xyz", "generation": 1, "fingerprint": {}}`,
	} {
		t.Run(name, func(t *testing.T) {
			path := disk(t, 4096)
			require.NoError(t, os.WriteFile(path+Suffix, []byte(content), 0o600))
			_, err := of(t, path)
			require.ErrorContains(t, err, path+Suffix)
			got, err := os.ReadFile(path + Suffix)
			require.NoError(t, err)
			require.Equal(t, content, string(got))
		})
	}
}

func TestStateFileOfABlockDeviceOutlivesTheHost(t *testing.T) {
	_, err := Default("/dev/vda", true)
	require.ErrorContains(t, err, "--state /var/lib/silo-nbd/vda.state")
	where, err := Default("/dev/shm/a.raw", false)
	require.NoError(t, err, "a file there would be gone itself")
	require.Equal(t, "/dev/shm/a.raw"+Suffix, where)
	where, err = Default("/usr/vda", true)
	require.NoError(t, err, "a link to the device, in a directory that stays")
	require.Equal(t, "/usr/vda"+Suffix, where)
	_, err = Default("/no/such/vda", true)
	require.Error(t, err)
}

// Who has taken a part of a disk has nothing of one that was written since.
func TestThatADestinationWasMetIsKeptForTheGeneration(t *testing.T) {
	path := disk(t, 1<<20)
	state := path + Suffix
	require.ErrorIs(t, SetMet(state, "tcp://b:10000"), os.ErrNotExist)
	first, err := of(t, path)
	require.NoError(t, err)
	met := func() string {
		met, err := Met(state)
		require.NoError(t, err)
		return met
	}
	require.Empty(t, met())
	require.NoError(t, SetMet(state, "tcp://b:10000"))
	again, err := of(t, path)
	require.NoError(t, err)
	require.Equal(t, first, again)
	require.Equal(t, "tcp://b:10000", met())
	require.NoError(t, SetMet(state, ""))
	require.Empty(t, met())
	require.NoError(t, SetMet(state, "tcp://b:10000"))
	require.NoError(t, os.Truncate(path, 2<<20))
	_, err = of(t, path)
	require.NoError(t, err)
	require.Empty(t, met())
}
