package identity

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

func makeDisk(t *testing.T, size int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "a.raw")
	require.NoError(t, os.WriteFile(path, make([]byte, size), 0o600))
	return path
}

func openFile(t *testing.T, path string, write bool) *sources.File {
	t.Helper()
	f, err := sources.OpenFile(path, sources.FileOptions{ReadOnly: !write})
	require.NoError(t, err)
	return f
}

// frozen is the identity of a disk that is sent frozen, by a source that then
// ends in order.
func frozen(t *testing.T, path string, o Options) (migrate.Identity, error) {
	t.Helper()
	f := openFile(t, path, false)
	defer func() { require.NoError(t, f.Close()) }()
	l, err := Open([]Spec{{Disk: f, Name: "a"}}, o)
	if err != nil {
		return migrate.Identity{}, err
	}
	id := l.Identity(0)
	require.NoError(t, l.Close())
	return id, nil
}

func mustFrozen(t *testing.T, path string) migrate.Identity {
	t.Helper()
	id, err := frozen(t, path, Options{})
	require.NoError(t, err)
	require.NotZero(t, id.UUID)
	require.NotZero(t, id.Generation)
	return id
}

func copyAll(t *testing.T, from, to string) {
	t.Helper()
	out, err := exec.Command("cp", "-a", from, to).CombinedOutput()
	require.NoError(t, err, "%s", out)
}

func TestIdentityStaysWhileTheDiskDoes(t *testing.T) {
	for _, size := range []int{1, 4095, 4096, 4097, 1 << 20} {
		path := makeDisk(t, size)
		first := mustFrozen(t, path)
		require.Equal(t, first, mustFrozen(t, path))
		require.NotEqual(t, first.UUID, mustFrozen(t, makeDisk(t, size)).UUID)
	}
}

// Also a write whose modification time was put back, as by touch -r, cp -p and
// rsync --inplace -t (faults F5, A9; trap I7).
func TestChangedDiskIsAnotherGeneration(t *testing.T) {
	path := makeDisk(t, 1<<20)
	seen := map[migrate.Identity]bool{mustFrozen(t, path): true}
	was, err := os.Stat(path)
	require.NoError(t, err)
	for name, change := range map[string]func(){
		"grown":   func() { require.NoError(t, os.Truncate(path, 2<<20)) },
		"touched": func() { require.NoError(t, os.Chtimes(path, time.Time{}, was.ModTime().Add(time.Second))) },
		"written, and the time put back": func() {
			at, err := os.Stat(path)
			require.NoError(t, err)
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			require.NoError(t, err)
			_, err = f.WriteAt([]byte{1}, 12345)
			require.NoError(t, err)
			require.NoError(t, f.Close())
			require.NoError(t, os.Chtimes(path, time.Time{}, at.ModTime()))
		},
		"a copy in its place": func() {
			copyAll(t, path, path+".new")
			require.NoError(t, os.Rename(path+".new", path))
		},
	} {
		change()
		now := mustFrozen(t, path)
		require.False(t, seen[now], name)
		for id := range seen {
			require.Equal(t, id.UUID, now.UUID, "%s: the ends compare what they have", name)
		}
		seen[now] = true
		require.Equal(t, now, mustFrozen(t, path), name)
	}
}

// A counter would give the same number to two contents (faults F4, A5; trap I4).
func TestDiskThatWasRolledBackHasAnotherGeneration(t *testing.T) {
	path := makeDisk(t, 1<<20)
	mustFrozen(t, path)
	backup := t.TempDir()
	copyAll(t, filepath.Dir(path)+"/.", backup)
	seen := make(map[uint64]bool)
	for i := range 4 { // the disk is changed, sent, and restored with its state file
		require.NoError(t, os.WriteFile(path, bytes.Repeat([]byte{byte(i)}, 1<<20), 0o600))
		id := mustFrozen(t, path)
		require.False(t, seen[id.Generation])
		seen[id.Generation] = true
		copyAll(t, backup+"/.", filepath.Dir(path))
		id = mustFrozen(t, path)
		require.False(t, seen[id.Generation], "restored")
		seen[id.Generation] = true
	}
}

// Of the two clones one is never taken for the other, nor compared with it: what
// is still missing of one would come from the other (faults F4, A5; trap I4).
func TestClonesOfATemplateAreDisksOfTheirOwn(t *testing.T) {
	path := makeDisk(t, 1<<20)
	template := mustFrozen(t, path)
	seen := map[[16]byte]bool{template.UUID: true}
	for range 3 {
		dir := t.TempDir()
		copyAll(t, filepath.Dir(path)+"/.", dir)
		clone := filepath.Join(dir, "a.raw")
		id := mustFrozen(t, clone)
		require.False(t, seen[id.UUID])
		seen[id.UUID] = true
		require.Equal(t, id, mustFrozen(t, clone))
	}
	require.Equal(t, template, mustFrozen(t, path))
}

// A disk that was moved to another file system is a copy, unless the user says
// that it is the disk: then the ends compare (fault H3).
func TestDiskThatWasMovedKeepsItsUUIDOnRequest(t *testing.T) {
	path := makeDisk(t, 1<<20)
	first := mustFrozen(t, path)
	dir := t.TempDir()
	copyAll(t, filepath.Dir(path)+"/.", dir)
	moved, err := frozen(t, filepath.Join(dir, "a.raw"), Options{Moved: true})
	require.NoError(t, err)
	require.Equal(t, first.UUID, moved.UUID)
	require.NotEqual(t, first.Generation, moved.Generation)
}

func TestRenamedDiskIsTheSame(t *testing.T) {
	path := makeDisk(t, 1<<20)
	first := mustFrozen(t, path)
	dir := filepath.Join(filepath.Dir(path), "sub")
	require.NoError(t, os.Mkdir(dir, 0o700))
	for _, suffix := range []string{"", Suffix} {
		require.NoError(t, os.Rename(path+suffix, filepath.Join(dir, "b.raw"+suffix)))
	}
	id, err := frozen(t, filepath.Join(dir, "b.raw"), Options{})
	require.NoError(t, err)
	// The rename has changed the change time.
	require.Equal(t, first.UUID, id.UUID)
}

// A damaged or unreadable state file may say that the disk was handed off
// (fault A10).
func TestDamagedStateIsRefusedInEveryModeAndLeftAlone(t *testing.T) {
	for name, content := range map[string]string{
		"empty": "", "foreign": "hello", "newer": `{"version": 4}`, "version 2 without content": `{"version": 2}`,
		"no uuid":        `{"version": 1, "uuid": "xyz", "generation": 1, "fingerprint": {}}`,
		"no uuid, new":   `{"version": 3, "uuid": "xyz"}`,
		"unknown field":  `{"version": 3, "uuid": "` + strings.Repeat("0", 32) + `", "more": 1}`,
		"handoff to all": `{"version": 3, "uuid": "` + strings.Repeat("0", 32) + `", "handoff": {"id": "x"}}`,
		"handoff in 1":   `{"version": 1, "uuid": "` + strings.Repeat("0", 32) + `", "handoff": {"id": "x"}}`,
	} {
		t.Run(name, func(t *testing.T) {
			path := makeDisk(t, 4096)
			require.NoError(t, os.WriteFile(path+Suffix, []byte(content), 0o600))
			f := openFile(t, path, false)
			defer f.Close()
			for _, o := range []Options{{}, {Live: true}, {Live: true, Reclaim: true}, {Reclaim: true}, {Moved: true}} {
				_, err := Open([]Spec{{Disk: f, Name: "a"}}, o)
				require.ErrorContains(t, err, path+Suffix)
			}
			_, err := NoteAt(f, "")
			require.ErrorContains(t, err, path+Suffix)
			require.ErrorContains(t, EndNote(f, ""), path+Suffix)
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

// A destination that has a part of a disk has nothing of one that was written
// since.
func TestThatADestinationWasMetIsKeptForTheGeneration(t *testing.T) {
	path := makeDisk(t, 1<<20)
	with := func(do func(l *Ledger)) {
		f := openFile(t, path, false)
		defer f.Close()
		l, err := Open([]Spec{{Disk: f, Name: "a"}}, Options{})
		require.NoError(t, err)
		do(l)
		require.NoError(t, l.Close())
	}
	with(func(l *Ledger) {
		require.Empty(t, l.Met())
		require.NoError(t, l.SetMet("tcp://b:10000"))
	})
	with(func(l *Ledger) {
		require.Equal(t, "tcp://b:10000", l.Met())
		require.NoError(t, l.SetMet(""))
		require.Empty(t, l.Met())
		require.NoError(t, l.SetMet("tcp://b:10000"))
	})
	require.NoError(t, os.Truncate(path, 2<<20))
	with(func(l *Ledger) { require.Empty(t, l.Met()) })
}

// State files of the versions before are read. What they take for a proof is none
// here, so the disk gets a new generation and the ends compare.
func TestStateFilesOfEarlierVersionsAreRead(t *testing.T) {
	const uuid = "0123456789abcdef0123456789abcdef"
	for name, content := range map[string]string{
		"version 1": `{"version": 1, "uuid": "` + uuid + `", "generation": 7, "fingerprint": {"size": 4096, "inode": INODE, "modtime": 1, "samples": "x"}, "met": "tcp://b:1"}`,
		"version 2": `{"version": 2, "uuid": "` + uuid + `", "generation": 7, "fingerprint": {"size": 4096, "samples": ""}, "open": true}`,
	} {
		path := makeDisk(t, 4096)
		f := openFile(t, path, false)
		now, err := f.Stamp()
		require.NoError(t, err)
		require.NoError(t, f.Close())
		content = strings.ReplaceAll(content, "INODE", itoa(now.Inode))
		require.NoError(t, os.WriteFile(path+Suffix, []byte(content), 0o600))
		id := mustFrozen(t, path)
		require.Equal(t, uuid, deviceDigits(id.UUID), name)
		require.NotEqual(t, uint64(7), id.Generation, name)
		require.Equal(t, id, mustFrozen(t, path), name)
	}
}

func itoa(n uint64) string { return strconv.FormatUint(n, 10) }
