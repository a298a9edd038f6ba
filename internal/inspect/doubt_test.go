package inspect

import (
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// A file that is not the one of the map is not called safe (trap I6).
func TestDiskOfAnotherMapIsNotSafe(t *testing.T) {
	disk, where := receive(t, func(d *lazy.Device, s *lazy.Stream) {
		arrive(t, s, 0, blocks)
		require.NoError(t, d.Complete())
	})
	f, err := sources.OpenFile(disk, sources.FileOptions{})
	require.NoError(t, err)
	err = f.SetXattr("user.silo-nbd.disk", []byte(`{"mark":"00","device":"another","map":"/elsewhere"}`))
	require.NoError(t, err)
	require.NoError(t, f.Close())
	r, err := Of(disk, where)
	require.NoError(t, err)
	require.False(t, r.Safe)
	require.Contains(t, r.Problem, "another map, /elsewhere")
	require.NoError(t, os.Remove(disk))
}
