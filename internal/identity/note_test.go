package identity

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

// missing skips a test that needs what this machine does not have; in CI it has to
// be there.
func missing(t *testing.T, what string, err error) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("CI must have %s: %v", what, err)
	}
	t.Skipf("no %s: %v", what, err)
}

// bind mounts what is at from also at to, until the test ends.
func bind(t *testing.T, from, to string, readOnly bool) {
	t.Helper()
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		missing(t, "bind mounts", err)
	}
	t.Cleanup(func() { require.NoError(t, unix.Unmount(to, 0)) })
	if readOnly {
		require.NoError(t, unix.Mount("", to, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
	}
}

// loop makes a file a block device until the test ends.
func loop(t *testing.T, file string) string {
	t.Helper()
	out, err := exec.Command("losetup", "--find", "--show", file).CombinedOutput()
	if err != nil {
		missing(t, "loop devices", errors.New(string(out)))
	}
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() { require.NoError(t, exec.Command("losetup", "-d", device).Run()) })
	return device
}

// opened opens the disk at path for a test that ends at once.
func opened(t *testing.T, path, state string, do func(d Spec)) {
	t.Helper()
	f := openFile(t, path, false)
	defer func() { require.NoError(t, f.Close()) }()
	do(Spec{Disk: f, Name: "vm", State: state})
}

// notServed requires that no source takes the disk at path for this host's.
func notServed(t *testing.T, path, state string) {
	t.Helper()
	opened(t, path, state, func(d Spec) {
		for _, o := range []Options{{}, {Live: true}, {Live: true, Moved: true}} {
			l, err := Open([]Spec{d}, o)
			if err == nil {
				require.True(t, l.HandedOff(), "%s is served", path)
				require.NoError(t, l.Close())
				continue
			}
			require.ErrorContains(t, err, path)
		}
		note, err := NoteAt(d.Disk, state)
		require.NoError(t, err)
		require.NotNil(t, note, "dest would serve it")
		require.Equal(t, migrate.Device{1}, note.Owner)
		require.ErrorIs(t, note.Err(), ErrHandedOff)
		require.ErrorContains(t, note.Err(), "01000000000000000000000000000000")
	})
}

// served requires that a source takes the disk at path for this host's.
func served(t *testing.T, path, state string, o Options) {
	t.Helper()
	opened(t, path, state, func(d Spec) {
		l := mustOpen(t, []Spec{d}, o)
		require.False(t, l.HandedOff())
		require.NoError(t, l.Close())
		note, err := NoteAt(d.Disk, state)
		require.NoError(t, err)
		require.Nil(t, note)
	})
}

// A disk that was handed off is served by no name that leads to it, nor is its
// copy, nor with another state file (faults A2, A10, H2; trap I1).
func TestHandedOffDiskIsNotServedByAnotherName(t *testing.T) {
	for _, frozen := range []bool{true, false} {
		dir := t.TempDir()
		vm := filepath.Join(dir, "vm-42.raw")
		require.NoError(t, os.WriteFile(vm, make([]byte, 8192), 0o600))
		link := filepath.Join(dir, "current.raw")
		require.NoError(t, os.Symlink("vm-42.raw", link))
		opened(t, link, "", func(d Spec) { move(t, []Spec{d}, Options{Live: !frozen}) })

		notServed(t, vm, "")
		notServed(t, link, "")
		notServed(t, vm, filepath.Join(dir, "other.state"))
		hard := filepath.Join(dir, "hard.raw")
		require.NoError(t, os.Link(vm, hard))
		notServed(t, hard, "")
		mounted := filepath.Join(t.TempDir(), "mounted.raw")
		require.NoError(t, os.WriteFile(mounted, nil, 0o600))
		bind(t, vm, mounted, false)
		notServed(t, mounted, "")
		clone := filepath.Join(t.TempDir(), "clone.raw")
		copyAll(t, vm, clone)
		notServed(t, clone, "")
		dirClone := t.TempDir()
		copyAll(t, dir+"/.", dirClone)
		notServed(t, filepath.Join(dirClone, "vm-42.raw"), "")
		renamed := filepath.Join(dir, "renamed.raw")
		require.NoError(t, os.Rename(vm, renamed))
		notServed(t, renamed, "")
		opened(t, renamed, "", func(d Spec) {
			_, err := Open([]Spec{d}, Options{Live: true})
			require.ErrorContains(t, err, "--state "+vm+Suffix, "it says where the state file is")
		})
		notServed(t, renamed, vm+Suffix)

		served(t, renamed, vm+Suffix, Options{Reclaim: true})
		served(t, renamed, vm+Suffix, Options{Live: true})
		served(t, clone, "", Options{Reclaim: true, Live: true})
		served(t, clone, "", Options{})
	}
}

// Of a disk that was prepared for a handoff, and never handed off, the note at the
// disk does not count once its state file says so; without that it cannot be told.
func TestPreparedHandoffCountsOnlyWithoutItsStateFile(t *testing.T) {
	dir := t.TempDir()
	vm := filepath.Join(dir, "vm.raw")
	require.NoError(t, os.WriteFile(vm, make([]byte, 8192), 0o600))
	opened(t, vm, "", func(d Spec) {
		l := mustOpen(t, []Spec{d}, live(Options{}))
		require.NoError(t, l.Prepare(ownersOf([]Spec{d})))
		require.NoError(t, l.disks.unlock()) // killed
	})
	renamed := filepath.Join(dir, "renamed.raw")
	require.NoError(t, os.Rename(vm, renamed))
	notServed(t, renamed, "")
	require.NoError(t, os.Rename(renamed, vm))
	served(t, vm, "", live(Options{}))
	require.NoError(t, os.Rename(vm, renamed))
	served(t, renamed, "", live(Options{}))
}

// The same of a device by another node, and of one whose state file is another
// (fault A10; trap I1).
func TestHandedOffDeviceIsNotServedByAnotherNode(t *testing.T) {
	t.Setenv(stateDirVariable, filepath.Join(t.TempDir(), "states"))
	dir := t.TempDir()
	file := filepath.Join(dir, "backing")
	require.NoError(t, os.WriteFile(file, make([]byte, 1<<20), 0o600))
	device := loop(t, file)
	state := filepath.Join(dir, "loop.state")
	opened(t, device, state, func(d Spec) { move(t, []Spec{d}, Options{}) })
	notServed(t, device, state)
	notServed(t, device, filepath.Join(dir, "other.state"))
	var st unix.Stat_t
	require.NoError(t, unix.Stat(device, &st))
	alias := filepath.Join(dir, "alias")
	if err := unix.Mknod(alias, unix.S_IFBLK|0o600, int(st.Rdev)); err != nil {
		missing(t, "mknod", err)
	}
	notServed(t, alias, state)
	notServed(t, alias, "")
	other := filepath.Join(dir, "other-backing")
	require.NoError(t, os.WriteFile(other, make([]byte, 1<<20), 0o600))
	served(t, loop(t, other), filepath.Join(dir, "second.state"), Options{})
	opened(t, loop(t, other), state, func(d Spec) {
		refuses(t, []Spec{d}, Options{}, "is the state file of another disk")
	})
	served(t, alias, state, Options{Reclaim: true})
	served(t, device, state, Options{})
}

// A loop device and the file behind it are one disk, whichever was handed off
// (fault H1; trap I1).
func TestLoopDeviceAndItsFileAreOneDisk(t *testing.T) {
	t.Setenv(stateDirVariable, filepath.Join(t.TempDir(), "states"))
	for _, byDevice := range []bool{false, true} {
		dir := t.TempDir()
		file, state := filepath.Join(dir, "vm.raw"), filepath.Join(dir, "loop.state")
		require.NoError(t, os.WriteFile(file, make([]byte, 1<<20), 0o600))
		device := loop(t, file)
		if byDevice {
			opened(t, device, state, func(d Spec) { move(t, []Spec{d}, Options{}) })
			notServed(t, file, "")
			served(t, file, "", Options{Reclaim: true})
			served(t, file, "", Options{})
		} else {
			opened(t, file, "", func(d Spec) { move(t, []Spec{d}, Options{}) })
			notServed(t, device, state)
			served(t, device, state, Options{Reclaim: true})
			served(t, device, state, Options{})
		}
	}
}

// A disk that has come back is served again without force (fault H12; trap I2).
func TestDiskThatCameBackIsServedAgain(t *testing.T) {
	dir := t.TempDir()
	vm := filepath.Join(dir, "vm.raw")
	require.NoError(t, os.WriteFile(vm, make([]byte, 8192), 0o600))
	seen := make(map[uint64]bool)
	for range 5 {
		opened(t, vm, "", func(d Spec) {
			l := mustOpen(t, []Spec{d}, live(Options{}))
			require.False(t, seen[l.Identity(0).Generation])
			seen[l.Identity(0).Generation] = true
			handOff(t, l, []Spec{d})
			require.NoError(t, l.Complete())
			require.NoError(t, l.Close())
		})
		notServed(t, vm, "")
		opened(t, vm, "", func(d Spec) { // dest --overwrite
			touch(t, d)
			require.NoError(t, EndNote(d.Disk, ""))
			require.NoError(t, EndNote(d.Disk, ""))
		})
		served(t, vm, "", Options{})
	}
	require.NoError(t, os.Remove(vm+Suffix))
	served(t, vm, "", Options{})
}

// A frozen disk is watched, and what the ledger does to it itself is no change
// (faults F7, A9; trap I7).
func TestFrozenDiskThatIsWrittenIsSeen(t *testing.T) {
	dir := t.TempDir()
	for name, write := range map[string]func(path string){
		"written": func(path string) { touch(t, Spec{Disk: openFile(t, path, false)}) },
		"grown":   func(path string) { require.NoError(t, os.Truncate(path, 1<<20)) },
	} {
		vm := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(vm, make([]byte, 8192), 0o600))
		opened(t, vm, "", func(d Spec) {
			l := mustOpen(t, []Spec{d}, Options{})
			require.NoError(t, l.Changed(0))
			handOff(t, l, []Spec{d})
			require.NoError(t, l.Changed(0))
			first := l.Identity(0)
			write(vm)
			require.ErrorContains(t, l.Changed(0), vm+" was written while it was sent")
			require.NoError(t, l.Taken())
			require.Error(t, l.Changed(0), "our own notes do not hide it")
			require.NoError(t, l.Close())
			refuses(t, []Spec{d}, Options{}, "was written here after it was handed off")
			l = mustOpen(t, []Spec{d}, Options{Reclaim: true})
			require.NotEqual(t, first.Generation, l.Identity(0).Generation)
			require.NoError(t, l.Close())
		})
	}
}

// A source that can keep no state file has an identity as long as it runs, which
// is never zero and never another's; one that can keep it later has the same UUID,
// so that the destination compares (faults F6, A8, H3; trap I8).
func TestDiskWithoutAStateFileHasAnIdentityOfItsOwn(t *testing.T) {
	dir, seen := t.TempDir(), t.TempDir()
	t.Setenv(stateDirVariable, filepath.Join(seen, "states"))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "vm.raw"), make([]byte, 8192), 0o600))
	bind(t, dir, seen, true)
	vm := filepath.Join(seen, "vm.raw")
	identify := func(state string) (id migrate.Identity) {
		opened(t, vm, state, func(d Spec) {
			l := mustOpen(t, []Spec{d}, Options{})
			require.Equal(t, state == "", l.Lacks(0) != nil)
			require.NotZero(t, l.Identity(0).UUID)
			require.NotZero(t, l.Identity(0).Generation)
			id = l.Identity(0)
			handOff(t, l, []Spec{d}) // in memory
			owner, ok := l.Owner("vm")
			require.True(t, ok)
			require.True(t, owner.Taken)
			require.NoError(t, l.Complete())
			require.NoError(t, l.Close())
		})
		return id
	}
	one, two := identify(""), identify("")
	require.NotEqual(t, one.Generation, two.Generation, "a new process cannot know that the disk is as it was")
	kept := identify(filepath.Join(t.TempDir(), "vm.state"))
	if _, err := os.Stat("/etc/machine-id"); err == nil {
		require.Equal(t, one.UUID, two.UUID)
		require.Equal(t, one.UUID, kept.UUID)
	}
	require.NotEqual(t, one.Generation, kept.Generation)
	opened(t, vm, "", func(d Spec) {
		_, err := Open([]Spec{d}, live(Options{}))
		require.ErrorContains(t, err, "--state", "a disk in use must be noted")
	})
}

// The very file is removed, and no other one that has its name by now (fault X7).
func TestRemoveTakesTheFileAndNotTheName(t *testing.T) {
	dir := t.TempDir()
	vm, link := filepath.Join(dir, "vm.raw"), filepath.Join(dir, "link.raw")
	require.NoError(t, os.WriteFile(vm, make([]byte, 8192), 0o600))
	require.NoError(t, os.Symlink(vm, link))
	moved := func(path string, meanwhile func()) (err error) {
		opened(t, path, "", func(d Spec) {
			l := mustOpen(t, []Spec{d}, live(Options{}))
			require.Error(t, l.RemoveDisks(), "it is this host's")
			handOff(t, l, []Spec{d})
			require.NoError(t, l.Complete())
			meanwhile()
			err = l.RemoveDisks()
			require.NoError(t, l.Close())
		})
		return err
	}
	err := moved(vm, func() {
		require.NoError(t, os.Rename(vm, vm+".away"))
		require.NoError(t, os.WriteFile(vm, []byte("another one"), 0o600))
	})
	require.ErrorContains(t, err, "another file by now")
	content, err := os.ReadFile(vm)
	require.NoError(t, err)
	require.Equal(t, "another one", string(content))
	require.FileExists(t, vm+".away")

	require.NoError(t, errors.Join(os.Remove(vm+".away"), os.Remove(vm+Suffix)))
	require.NoError(t, moved(link, func() {}))
	require.NoFileExists(t, vm)
	require.NoFileExists(t, vm+Suffix)
	_, err = os.Lstat(link)
	require.NoError(t, err, "the link is not the disk")
}

// What is here now was not sent: a source that is started again does not say that
// the destination has it (rule of exit code 0; fault H12).
func TestDiskThatWasReplacedAfterItsMoveIsNotTakenForSent(t *testing.T) {
	for name, c := range map[string]struct {
		change func(path string)
		sent   bool
	}{
		"nothing":  {func(string) {}, true},
		"mode":     {func(path string) { require.NoError(t, os.Chmod(path, 0o640)) }, true},
		"written":  {func(path string) { touch(t, Spec{Disk: openFile(t, path, false)}) }, false},
		"replaced": {func(path string) { copyAll(t, path, path+".new"); require.NoError(t, os.Rename(path+".new", path)) }, false},
	} {
		vm := filepath.Join(t.TempDir(), "vm.raw")
		require.NoError(t, os.WriteFile(vm, make([]byte, 8192), 0o600))
		opened(t, vm, "", func(d Spec) {
			l := mustOpen(t, []Spec{d}, Options{})
			handOff(t, l, []Spec{d})
			require.NoError(t, l.Complete())
			require.NoError(t, l.Close())
		})
		c.change(vm)
		opened(t, vm, "", func(d Spec) {
			for _, o := range []Options{{}, {Live: true}} {
				l, err := Open([]Spec{d}, o)
				if !c.sent {
					require.ErrorContains(t, err, "was not sent", name)
					continue
				}
				require.NoError(t, err, name)
				require.True(t, l.Finished(), name)
				require.NoError(t, l.Close())
			}
		})
		served(t, vm, "", Options{Reclaim: true})
	}
}

// A disk that is in use can be looked at (fault A2).
func TestNoteIsReadOfADiskThatIsInUse(t *testing.T) {
	vm := filepath.Join(t.TempDir(), "vm.raw")
	require.NoError(t, os.WriteFile(vm, make([]byte, 8192), 0o600))
	note, err := NoteOf(vm, "")
	require.NoError(t, err)
	require.Nil(t, note)
	f := openFile(t, vm, true)
	defer f.Close()
	d := Spec{Disk: f, Name: "vm"}
	l := mustOpen(t, []Spec{d}, live(Options{}))
	handOff(t, l, []Spec{d})
	note, err = NoteOf(vm, "")
	require.NoError(t, err)
	require.True(t, note.Taken)
	require.Equal(t, l.Note(0), note)
	require.NoError(t, os.Remove(vm+Suffix))
	note, err = NoteOf(vm, "")
	require.NoError(t, err)
	require.Contains(t, note.Where, "attribute")
	require.ErrorContains(t, note.Err(), "its state file ("+vm+Suffix+") knows", "the disk says where")
	_, err = NoteOf(filepath.Join(vm, "none"), "")
	require.Error(t, err)
}

// A disk in a directory that cannot be written has its state file in the state
// directory, by whatever name it is reached, also when the directory can be written
// later (faults A8, H3; traps I3, I8).
func TestStateFileOfADiskInAReadOnlyDirectoryLiesElsewhere(t *testing.T) {
	t.Setenv(stateDirVariable, filepath.Join(t.TempDir(), "states"))
	for _, o := range []Options{{}, {Live: true}} {
		for _, before := range []bool{false, true} {
			dir, seen := t.TempDir(), t.TempDir()
			vm := filepath.Join(dir, "vm.raw")
			require.NoError(t, os.WriteFile(vm, make([]byte, 8192), 0o600))
			if before { // it could be written then
				served(t, vm, "", Options{})
			}
			bind(t, dir, seen, true)
			served(t, filepath.Join(seen, "vm.raw"), "", o)
			opened(t, filepath.Join(seen, "vm.raw"), "", func(d Spec) {
				l := mustOpen(t, []Spec{d}, o)
				require.NoError(t, l.Lacks(0))
				handOff(t, l, []Spec{d})
				require.NoError(t, l.Close())
				l = mustOpen(t, []Spec{d}, o)
				require.True(t, l.HandedOff())
				require.NoError(t, l.Close())
			})
			notServed(t, filepath.Join(seen, "vm.raw"), "")
			notServed(t, vm, "")
			note, err := NoteOf(vm, "")
			require.NoError(t, err)
			require.NotNil(t, note)
			require.NoError(t, os.Rename(vm, vm+".renamed"))
			notServed(t, vm+".renamed", "")
			served(t, vm+".renamed", "", Options{Reclaim: true})
			served(t, filepath.Join(seen, "vm.raw.renamed"), "", Options{})
		}
	}
}
