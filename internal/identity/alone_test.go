package identity

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/internal/durable"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

// rigid is a file system on which nothing can be written but attributes.
type rigid struct{ durable.FS }

func (rigid) Create(string, []byte) (durable.File, error) { return nil, unix.EACCES }

// A frozen disk that can have no state file bears the mark all the same: the owner goes on
// after a restart, and no second destination gets it (faults A4, A8).
func TestHandoffWithoutAStateFileIsBorneByTheDisk(t *testing.T) {
	t.Setenv(stateDirVariable, filepath.Join(t.TempDir(), "states"))
	o := Options{Files: rigid{durable.OS}}
	disks := specs(t, t.TempDir(), "a", "b")
	l := mustOpen(t, disks, o)
	require.Error(t, l.Lacks(0))
	first := l.Identity(0)
	require.NoError(t, l.Prepare(ownersOf(disks)))
	require.NoError(t, l.HandOff())
	require.NoError(t, l.disks.unlock()) // killed

	refuses(t, disks[:1], o, ErrHandedOff.Error())
	refuses(t, disks, live(o), ErrHandedOff.Error())
	refuses(t, disks, live(Options{}), ErrHandedOff.Error())
	for _, complete := range []bool{false, true} {
		l = mustOpen(t, disks, o)
		require.True(t, l.HandedOff())
		require.False(t, l.Finished())
		owner, ok := l.Owner("b")
		require.True(t, ok)
		require.Equal(t, migrate.Device{2}, owner.Device)
		if _, err := os.Stat("/etc/machine-id"); err == nil {
			require.Equal(t, first.UUID, l.Identity(0).UUID)
		}
		require.NotEqual(t, first.Generation, l.Identity(0).Generation, "the ends compare")
		require.NoError(t, l.Confirm("b", owner))
		require.NoError(t, l.Taken())
		require.NoError(t, l.Changed(0))
		if complete {
			require.NoError(t, l.Complete())
		}
		require.NoError(t, l.Close())
	}
	l = mustOpen(t, disks, o)
	require.True(t, l.Finished())
	require.NoError(t, l.Close())
	touch(t, disks[0])
	refuses(t, disks, o, "was not sent")
	l = mustOpen(t, disks, Options{Reclaim: true})
	require.False(t, l.HandedOff())
	require.NoError(t, l.Close())
	require.NoError(t, mustOpen(t, disks, live(Options{})).Close())
}

// A device bears no mark of its own: if the note of it cannot be kept, it is not handed
// off, and nothing has happened (faults A2, A8).
func TestDeviceWhoseNoteCannotBeKeptIsNotHandedOff(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, make([]byte, 1<<20), 0o600))
	device := loop(t, file)
	states := filepath.Join(t.TempDir(), "states")
	t.Setenv(stateDirVariable, states)
	opened(t, device, filepath.Join(t.TempDir(), "vm.state"), func(d Spec) {
		l := mustOpen(t, []Spec{d}, live(Options{}))
		require.NoError(t, os.WriteFile(states, nil, 0o600)) // no directory can be made
		require.ErrorContains(t, l.Prepare(ownersOf([]Spec{d})), stateDirVariable)
		require.False(t, l.HandedOff())
		require.NoError(t, os.Remove(states))
		require.NoError(t, l.Prepare(ownersOf([]Spec{d})), "it may be tried again")
		require.NoError(t, l.HandOff())
		require.NoError(t, l.Close())
	})
}
