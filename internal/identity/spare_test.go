package identity

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/internal/durable"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// mounted mounts the image of a file system until the test ends.
func mounted(t *testing.T, image, options string) string {
	t.Helper()
	dir := t.TempDir()
	out, err := exec.Command("mount", "-o", options, image, dir).CombinedOutput()
	if err != nil {
		missing(t, "loop mounts", errors.New(string(out)))
	}
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, 0)) })
	return dir
}

// The disk in a snapshot has the number of the original. A backup of the one does not take
// the other away, nor hides what is noted beside it, in either direction (faults A8, A1).
func TestSnapshotOfAFileSystemIsNotTheOriginal(t *testing.T) {
	t.Setenv(stateDirVariable, filepath.Join(t.TempDir(), "states"))
	image := filepath.Join(t.TempDir(), "fs.img")
	require.NoError(t, os.WriteFile(image, nil, 0o600))
	require.NoError(t, os.Truncate(image, 16<<20))
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", image).CombinedOutput(); err != nil {
		missing(t, "mkfs.ext4", errors.New(string(out)))
	}
	vm := filepath.Join(mounted(t, image, "loop"), "vm.raw")
	require.NoError(t, os.WriteFile(vm, make([]byte, 1<<20), 0o600))
	var original migrate.Identity
	opened(t, vm, "", func(d Spec) {
		l := mustOpen(t, []Spec{d}, live(Options{}))
		original = l.Identity(0)
		unix.Sync()
		snapshot := image + ".snapshot"
		plainCopy(t, image, snapshot)
		backup := filepath.Join(mounted(t, snapshot, "loop,ro,noload"), "vm.raw")
		var copied migrate.Identity
		for range 2 { // it is interrupted, and goes on
			opened(t, backup, "", func(d Spec) {
				l := mustOpen(t, []Spec{d}, Options{})
				require.NoError(t, l.Lacks(0))
				require.NotEqual(t, original.UUID, l.Identity(0).UUID)
				if copied.Generation != 0 {
					require.Equal(t, copied, l.Identity(0))
				}
				copied = l.Identity(0)
				require.NoError(t, l.Close())
			})
		}
		opened(t, backup, "", func(d Spec) {
			move(t, []Spec{d}, Options{})
			l := mustOpen(t, []Spec{d}, Options{})
			require.True(t, l.HandedOff())
			require.NoError(t, l.Complete())
			require.NoError(t, l.Close())
		})
		require.NoError(t, l.Close())
	})
	served(t, vm, "", live(Options{}))
	opened(t, vm, "", func(d Spec) {
		l := mustOpen(t, []Spec{d}, Options{})
		require.Equal(t, original.UUID, l.Identity(0).UUID)
		require.NoError(t, l.Close())
	})
}

// Where the file system has no name, the boot, the place and the file beside the disk tell
// whose a state file is; where they do not, and it says that the disk is away, it is not
// guessed.
func TestStateFileOfAnUnnamedFileSystemIsTold(t *testing.T) {
	now := sources.Stamp{Size: 4096, Dev: 5, Inode: 9, Birth: 1, BootID: "b"}
	h := &handoff{ID: "h"}
	for name, c := range map[string]struct {
		spare, beside *state
		ours, refused bool
	}{
		"same device in this boot":      {&state{Path: "/y", Disk: sources.Stamp{Dev: 5, BootID: "b"}}, nil, true, false},
		"another device in this boot":   {&state{Path: "/x", Disk: sources.Stamp{Dev: 6, BootID: "b"}, Handoff: h}, nil, false, false},
		"of a live run in this boot":    {&state{Path: "/x", Disk: sources.Stamp{Dev: 6}, BootID: "b"}, nil, false, false},
		"its place":                     {&state{Path: "/x", Disk: sources.Stamp{Dev: 6, BootID: "a"}}, nil, true, false},
		"another place, and it is away": {&state{Path: "/y", Disk: sources.Stamp{Dev: 5, BootID: "a"}, Handoff: h}, nil, false, true},
		"another place":                 {&state{Path: "/y", Disk: sources.Stamp{Dev: 5, BootID: "a"}}, nil, false, false},
		"the one beside is the same":    {&state{UUID: "u", Path: "/y", Disk: sources.Stamp{BootID: "a"}, Handoff: h}, &state{UUID: "u"}, true, false},
		"the one beside is another":     {&state{UUID: "u", Path: "/y", Disk: sources.Stamp{BootID: "a"}, Handoff: h}, &state{UUID: "v"}, false, false},
		"the other file system":         {&state{Path: "/x", FS: "two", Handoff: h}, nil, true, false}, // it has no name here
	} {
		at := &found{path: "/x", now: now}
		ours, err := at.isOurs("spare", c.spare, c.beside)
		require.Equal(t, c.ours, ours, name)
		require.Equal(t, c.refused, err != nil, name)
	}
	at := &found{path: "/x", now: now, fs: "one"}
	ours, err := at.isOurs("spare", &state{Path: "/x", FS: "two"}, nil)
	require.NoError(t, err)
	require.False(t, ours)
}

// A disk was handed off, and a state file in the state directory that does not know of it
// must not hide that (faults A1, A8).
func TestStateFileElsewhereDoesNotHideAHandoff(t *testing.T) {
	t.Setenv(stateDirVariable, filepath.Join(t.TempDir(), "states"))
	dir, seen := t.TempDir(), t.TempDir()
	vm := filepath.Join(dir, "vm.raw")
	require.NoError(t, os.WriteFile(vm, make([]byte, 8192), 0o600))
	served(t, vm, "", Options{})
	bind(t, dir, seen, true)
	served(t, filepath.Join(seen, "vm.raw"), "", Options{}) // in the state directory
	spare, err := filepath.Glob(filepath.Join(os.Getenv(stateDirVariable), "file-*.state"))
	require.NoError(t, err)
	require.Len(t, spare, 1)
	kept, err := os.ReadFile(spare[0])
	require.NoError(t, err)
	require.NoError(t, os.Remove(spare[0]))
	opened(t, vm, "", func(d Spec) {
		bare := []Spec{{Disk: lacking{d.Disk}, Name: "vm"}} // no mark
		move(t, bare, live(Options{}))
		require.NoError(t, os.WriteFile(spare[0], kept, 0o600))
		refuses(t, bare, live(Options{}), "move the wrong one of the two state files away")
		_, err := look(durable.OS, bare[0].Disk, "")
		require.ErrorIs(t, err, ErrHandedOff)
	})
}
