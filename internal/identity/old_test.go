package identity

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

// oldLive is a state file of version 2, of disk n of two that were handed off.
func oldLive(n int, handedOff bool) string {
	handoff := ""
	if handedOff {
		handoff = fmt.Sprintf(`, "handoff": {"id": "first", "disks": [%q, %q], "owner": "%02d%s"}`, oldUUID(0), oldUUID(1), n+1, strings.Repeat("0", 30))
	}
	return fmt.Sprintf(`{"version": 2, "uuid": %q, "generation": 7, "fingerprint": {"size": 8192, "samples": ""}, "open": true%s}`, oldUUID(n), handoff)
}

func oldUUID(n int) string { return fmt.Sprintf("%032d", n) }

// What version 2 has noted about a handoff counts as it did.
func TestHandoffOfAnEarlierVersionCounts(t *testing.T) {
	dir := t.TempDir()
	disks := specs(t, dir, "a", "b")
	for i, d := range disks {
		require.NoError(t, os.WriteFile(d.Disk.Path()+Suffix, []byte(oldLive(i, true)), 0o600))
	}
	refuses(t, disks[:1], live(Options{}), "give all of them")
	refuses(t, disks, Options{}, "let the source go on with --nbd")
	l := mustOpen(t, disks, live(Options{}))
	require.True(t, l.HandedOff())
	owner, ok := l.Owner("b")
	require.True(t, ok)
	require.Equal(t, migrate.Owner{Device: migrate.Device{2}}, owner)
	require.NoError(t, l.Taken())
	require.NoError(t, l.Close())
	hard := filepath.Join(dir, "hard")
	require.NoError(t, os.Link(disks[0].Disk.Path(), hard))
	note, err := NoteOf(hard, "")
	require.NoError(t, err)
	require.NotNil(t, note, "the disk says so itself by now")

	// Half of one: version 2 has nothing that proves that it was not published.
	disks = specs(t, t.TempDir(), "a", "b")
	for i, d := range disks {
		require.NoError(t, os.WriteFile(d.Disk.Path()+Suffix, []byte(oldLive(i, i == 0)), 0o600))
	}
	refuses(t, disks, live(Options{}), "does not know of it")
	require.NoError(t, mustOpen(t, disks, live(Options{Reclaim: true})).Close())
}

// Version 2 had put the state file beside a link: it goes to where the link leads
// (fault H2).
func TestStateFileBesideALinkIsFound(t *testing.T) {
	dir := t.TempDir()
	vm, other, link := filepath.Join(dir, "vm"), filepath.Join(dir, "other"), filepath.Join(dir, "link")
	for _, path := range []string{vm, other} {
		require.NoError(t, os.WriteFile(path, make([]byte, 8192), 0o600))
	}
	require.NoError(t, os.Symlink("vm", link))
	one := strings.Replace(oldLive(0, true), fmt.Sprintf(", %q]", oldUUID(1)), "]", 1)
	require.NoError(t, os.WriteFile(link+Suffix, []byte(one), 0o600))
	opened(t, link, "", func(d Spec) {
		note, err := NoteAt(d.Disk, "")
		require.NoError(t, err)
		require.NotNil(t, note)
		require.FileExists(t, link+Suffix, "nothing is changed")
		l := mustOpen(t, []Spec{d}, live(Options{}))
		require.True(t, l.HandedOff())
		require.NoError(t, l.Taken())
		require.NoError(t, l.Close())
	})
	require.NoFileExists(t, link+Suffix)
	notServed(t, vm, "")

	// One that is surely of another disk stays where it is.
	require.NoError(t, os.Remove(link))
	require.NoError(t, os.Symlink("other", link))
	one = strings.Replace(one, `"size": 8192,`, `"size": 8192, "inode": 1,`, 1)
	require.NoError(t, os.WriteFile(link+Suffix, []byte(one), 0o600))
	served(t, link, "", live(Options{}))
	require.FileExists(t, link+Suffix)
}

// A source that is killed right after the handoff, before it is answered, does not
// know a stamp of the disk as it was handed off: its state file has got its name
// after the last write (trap M7).
func TestGenerationStaysWhenTheSourceIsKilledInTheHandoff(t *testing.T) {
	disks := specs(t, t.TempDir(), "a", "b")
	l := mustOpen(t, disks, live(Options{}))
	id := l.Identity(1)
	require.NoError(t, l.Prepare(ownersOf(disks)))
	touch(t, disks...)
	require.NoError(t, l.HandOff())
	require.NoError(t, l.disks.unlock())
	l = mustOpen(t, disks, live(Options{}))
	require.True(t, l.HandedOff())
	require.Equal(t, id, l.Identity(1))
	require.NoError(t, l.disks.unlock())
	touch(t, disks...)
	refuses(t, disks, live(Options{}), "its modification time is later than the handoff")
}
