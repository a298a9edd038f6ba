package identity

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/internal/durable"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

var _ migrate.Ledger = (*Ledger)(nil)

// specs makes disks in dir, or opens those that are there.
func specs(t *testing.T, dir string, names ...string) []Spec {
	t.Helper()
	var all []Spec
	for _, name := range names {
		path := filepath.Join(dir, name)
		if _, err := os.Stat(path); err != nil {
			require.NoError(t, os.WriteFile(path, make([]byte, 8192), 0o600))
		}
		f := openFile(t, path, true)
		t.Cleanup(func() { require.NoError(t, f.Close()) })
		all = append(all, Spec{Disk: f, Name: name})
	}
	return all
}

func mustOpen(t *testing.T, disks []Spec, o Options) *Ledger {
	t.Helper()
	l, err := Open(disks, o)
	require.NoError(t, err)
	return l
}

// refuses opens disks that must not be served or sent.
func refuses(t *testing.T, disks []Spec, o Options, why string) {
	t.Helper()
	l, err := Open(disks, o)
	if err == nil {
		require.NoError(t, l.Close())
	}
	require.ErrorContains(t, err, why)
}

func ownersOf(disks []Spec) map[string]migrate.Owner {
	to := make(map[string]migrate.Owner)
	for i, d := range disks {
		to[d.Name] = migrate.Owner{Device: migrate.Device{byte(i + 1)}, Epoch: uint64(i + 100), Steps: 3}
	}
	return to
}

// handOff hands the disks off, up to the answer of the destination.
func handOff(t *testing.T, l *Ledger, disks []Spec) {
	t.Helper()
	require.NoError(t, l.Prepare(ownersOf(disks)))
	require.NoError(t, l.HandOff())
	require.NoError(t, l.Taken())
}

// move is a whole move of disks, frozen or live.
func move(t *testing.T, disks []Spec, o Options) {
	t.Helper()
	l := mustOpen(t, disks, o)
	handOff(t, l, disks)
	require.NoError(t, l.Close())
}

func live(o Options) Options { o.Live = true; return o }

func TestLiveDiskHasANewGenerationEachTime(t *testing.T) {
	disks := specs(t, t.TempDir(), "a", "b")
	l := mustOpen(t, disks, live(Options{}))
	require.Empty(t, l.Crashed())
	require.Empty(t, l.Ended(), "there was none before")
	seen := map[uint64]bool{l.Identity(1).Generation: true}
	uuid := l.Identity(1).UUID
	require.NoError(t, l.disks.unlock()) // killed
	for _, crashed := range []bool{true, false, false} {
		l = mustOpen(t, disks, live(Options{}))
		require.Equal(t, crashed, len(l.Crashed()) == 2)
		require.Equal(t, !crashed, len(l.Ended()) == 2)
		require.Equal(t, uuid, l.Identity(1).UUID)
		require.False(t, seen[l.Identity(1).Generation])
		seen[l.Identity(1).Generation] = true
		touch(t, disks...)
		require.NoError(t, l.Close())
	}
	l = mustOpen(t, disks, Options{})
	require.False(t, seen[l.Identity(1).Generation], "what was copied of a live disk has changed since")
	require.NoError(t, l.Close())
}

// touch writes the disks.
func touch(t *testing.T, disks ...Spec) {
	t.Helper()
	for _, d := range disks {
		f, err := os.OpenFile(d.Disk.Path(), os.O_WRONLY, 0)
		require.NoError(t, err)
		_, err = f.WriteAt([]byte("touched"), 0)
		require.NoError(t, errors.Join(err, f.Close()))
	}
}

// A frozen source is not refused after a start of source --nbd by mistake in which
// nothing was written (fault A4).
func TestUntouchedLiveRunLeavesTheFrozenIdentity(t *testing.T) {
	disks := specs(t, t.TempDir(), "a")
	identity := func(o Options) migrate.Identity {
		l := mustOpen(t, disks, o)
		defer func() { require.NoError(t, l.Close()) }()
		return l.Identity(0)
	}
	first := identity(Options{})
	require.NotEqual(t, first, identity(live(Options{})))
	require.Equal(t, first, identity(Options{}))
}

// TestKeep: a live disk's generation may stay when it is known what has changed,
// after an end in order and after a kill, and not when the disk was written since.
func TestGenerationOfALiveDiskStaysIfItsChangesAreKnown(t *testing.T) {
	disks := specs(t, t.TempDir(), "a")
	var asked []Run
	keep := live(Options{Keep: func(disk string, last Run) bool {
		require.Equal(t, "a", disk)
		asked = append(asked, last)
		return true
	}})
	l := mustOpen(t, disks, keep)
	require.Empty(t, asked, "there was no run before")
	first := l.Identity(0)
	touch(t, disks[0])
	require.NoError(t, l.Close())

	l = mustOpen(t, disks, keep)
	require.Equal(t, first, l.Identity(0))
	require.Len(t, asked, 1)
	require.True(t, asked[0].Ended)
	require.Empty(t, l.Ended())
	require.NoError(t, l.disks.unlock()) // killed

	l = mustOpen(t, disks, keep)
	require.Equal(t, first, l.Identity(0))
	require.Len(t, asked, 2)
	require.False(t, asked[1].Ended)
	require.Empty(t, l.Crashed())
	require.NoError(t, l.Close())

	touch(t, disks[0]) // by another program
	l = mustOpen(t, disks, keep)
	require.NotEqual(t, first, l.Identity(0))
	require.Len(t, asked, 2)
	second := l.Identity(0)
	l.disks[0].state.BootID = "before the host was restarted"
	require.NoError(t, l.save(l.disks[0]))
	require.NoError(t, l.disks.unlock())

	l = mustOpen(t, disks, keep)
	require.NotEqual(t, second, l.Identity(0))
	require.Len(t, asked, 2)
	require.NoError(t, l.Close())
}

func TestHandedOffDisksStayHandedOff(t *testing.T) {
	disks := specs(t, t.TempDir(), "a", "b")
	l := mustOpen(t, disks, live(Options{}))
	first := l.Identity(1)
	handOff(t, l, disks)
	want := ownersOf(disks)["b"]
	want.Taken = true
	owner, ok := l.Owner("b")
	require.True(t, ok)
	require.Equal(t, want, owner)
	require.NoError(t, l.Close())

	l = mustOpen(t, disks, live(Options{}))
	require.True(t, l.HandedOff())
	require.False(t, l.Finished())
	require.Equal(t, first, l.Identity(1))
	owner, ok = l.Owner("b")
	require.True(t, ok)
	require.Equal(t, want, owner)
	peer, ok := l.Peer("b")
	require.True(t, ok)
	require.Equal(t, want, peer)
	want.Epoch, want.Steps = 7, 1
	require.NoError(t, l.Confirm("b", want))
	require.ErrorContains(t, l.Confirm("b", migrate.Owner{Device: migrate.Device{9}}), "belongs to device")
	require.NoError(t, l.Close())

	l = mustOpen(t, disks, live(Options{}))
	owner, _ = l.Owner("b")
	require.Equal(t, want, owner)
	require.NoError(t, l.Close())

	refuses(t, disks[1:], live(Options{}), "give all of them")
	refuses(t, disks, Options{}, "let the source go on with --nbd")
	l = mustOpen(t, disks, live(Options{Reclaim: true}))
	require.False(t, l.HandedOff())
	require.NotEqual(t, first, l.Identity(1))
	for i := range disks {
		require.Nil(t, l.Note(i))
	}
	require.NoError(t, l.Close())
	for _, d := range disks {
		note, err := NoteAt(d.Disk, "")
		require.NoError(t, err)
		require.Nil(t, note)
	}
	l = mustOpen(t, disks[1:], live(Options{}))
	require.Equal(t, []migrate.Device{want.Device}, l.Former(0), "it may come back, and is not the owner")
	require.NoError(t, l.Close())
}

// A note counts against the disks that it names, and not against those that are
// given now (fault A1; trap I1).
func TestHandedOffDiskIsNotServedBesideAnother(t *testing.T) {
	for _, o := range []Options{{}, {Live: true}} {
		disks := specs(t, t.TempDir(), "a", "b", "c", "e")
		a, b, c, e := disks[0], disks[1], disks[2], disks[3]
		move(t, []Spec{a}, o)
		for _, set := range [][]Spec{{a, c}, {c, a}} {
			refuses(t, set, o, "which is this host's")
			refuses(t, set, live(Options{}), a.Disk.Path())
		}
		l := mustOpen(t, []Spec{a}, o)
		require.True(t, l.HandedOff(), "the note is still there")
		require.NoError(t, l.Close())
		require.NoError(t, mustOpen(t, []Spec{c}, o).Close())

		move(t, []Spec{b}, o)
		move(t, []Spec{e}, o)
		refuses(t, []Spec{b, e}, o, "start a source for each of these: "+b.Disk.Path()+"; "+e.Disk.Path())
		for _, one := range []Spec{b, e} {
			l := mustOpen(t, []Spec{one}, o)
			require.True(t, l.HandedOff())
			require.NoError(t, l.Close())
		}
	}
}

// A second disk whose state file was restored from before the handoff, or lost,
// is no proof that the handoff was never published (fault A1).
func TestHandoffOfWhichOneDiskKnowsNothingIsRefused(t *testing.T) {
	disks := specs(t, t.TempDir(), "a", "b")
	l := mustOpen(t, disks, live(Options{}))
	require.NoError(t, l.Close())
	before, err := os.ReadFile(disks[1].Disk.Path() + Suffix)
	require.NoError(t, err)
	move(t, disks, live(Options{}))
	require.NoError(t, os.WriteFile(disks[1].Disk.Path()+Suffix, before, 0o600))
	refuses(t, disks, live(Options{}), "does not know of it")
	refuses(t, disks[1:], live(Options{}), "does not know of it") // by its attribute
	require.NoError(t, os.Remove(disks[1].Disk.Path()+Suffix))
	refuses(t, disks, live(Options{}), disks[1].Disk.Path())
	refuses(t, disks[1:], live(Options{}), disks[1].Disk.Path())
	l = mustOpen(t, disks, live(Options{Reclaim: true}))
	require.NoError(t, l.Close())
	require.NoError(t, mustOpen(t, disks, live(Options{})).Close())
}

// The power goes when only one of two disks says that it was handed off: the
// destination was not told, so none is.
func TestHalfAHandoffIsNone(t *testing.T) {
	disks := specs(t, t.TempDir(), "a", "b")
	l := mustOpen(t, disks, live(Options{}))
	first := l.Identity(0)
	require.NoError(t, l.Prepare(ownersOf(disks)))
	before, err := os.ReadFile(disks[1].Disk.Path() + Suffix)
	require.NoError(t, err)
	require.NoError(t, l.HandOff())
	require.NoError(t, l.disks.unlock())
	require.NoError(t, os.WriteFile(disks[1].Disk.Path()+Suffix, before, 0o600))
	refuses(t, disks[:1], live(Options{}), "give all of them")
	// The other one alone is not handed off, and proves it to the first later.
	require.NoError(t, mustOpen(t, disks[1:], live(Options{})).Close())
	l = mustOpen(t, disks, live(Options{}))
	require.False(t, l.HandedOff())
	require.NotEqual(t, first, l.Identity(0))
	require.NoError(t, l.Close())
	require.NoError(t, mustOpen(t, disks[:1], live(Options{})).Close())
}

func TestHandoffThatIsTakenBackLeavesNothing(t *testing.T) {
	disks := specs(t, t.TempDir(), "a", "b")
	for _, o := range []Options{{}, {Live: true}} {
		l := mustOpen(t, disks, o)
		id := l.Identity(0)
		require.NoError(t, l.Prepare(ownersOf(disks)))
		require.NoError(t, l.HandOff())
		require.NoError(t, l.TakeBack())
		require.False(t, l.HandedOff())
		require.Equal(t, id, l.Identity(0))
		_, ok := l.Owner("a")
		require.False(t, ok)
		require.NoError(t, l.Changed(0))
		require.NoError(t, l.Prepare(ownersOf(disks))) // and again
		require.NoError(t, l.Close())
		for _, d := range disks {
			note, err := NoteAt(d.Disk, "")
			require.NoError(t, err)
			require.Nil(t, note)
		}
		require.Len(t, names(t, filepath.Dir(disks[0].Disk.Path())), 4, "no temporary files")
		if !o.Live {
			l = mustOpen(t, disks, o)
			require.Equal(t, id, l.Identity(0), "our own marks are not a change")
			require.NoError(t, l.Close())
		}
	}
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	all, err := durable.OS.Names(dir)
	require.NoError(t, err)
	return all
}

// A frozen move is bound to its first destination, and its disk is not served
// meanwhile nor afterwards (fault A4).
func TestFrozenMoveIsNoted(t *testing.T) {
	disks := specs(t, t.TempDir(), "a")
	l := mustOpen(t, disks, Options{})
	first := l.Identity(0)
	require.NoError(t, l.Confirm("a", migrate.Owner{Device: migrate.Device{1}, Epoch: 5}))
	peer, ok := l.Peer("a")
	require.True(t, ok)
	require.Equal(t, migrate.Owner{Device: migrate.Device{1}, Epoch: 5}, peer)
	_, ok = l.Owner("a")
	require.False(t, ok)
	handOff(t, l, disks)
	require.NoError(t, l.Changed(0), "our own notes are not a change")
	require.NoError(t, l.disks.unlock()) // killed

	refuses(t, disks, live(Options{}), "its move is under way")
	l = mustOpen(t, disks, Options{})
	require.True(t, l.HandedOff())
	require.Equal(t, first, l.Identity(0), "the destination goes on")
	require.NoError(t, l.Changed(0))
	require.NoError(t, l.Complete())
	require.NoError(t, l.Changed(0))
	require.NoError(t, l.Close())
	for _, o := range []Options{{}, {Live: true}} {
		l = mustOpen(t, disks, o)
		require.True(t, l.Finished(), "it is the destination's, which has everything (fault H12)")
		require.True(t, l.Note(0).Complete)
		require.NoError(t, l.Close())
	}
	l = mustOpen(t, disks, Options{Reclaim: true})
	require.False(t, l.Finished())
	require.NotEqual(t, first, l.Identity(0))
	require.NoError(t, l.Close())
	require.NoError(t, mustOpen(t, disks, live(Options{})).Close())
}

// A source that has nothing to do ends with 0 only for the destination that has the disk:
// another one gets nothing, and a script that starts a machine there must fail.
func TestFinishedSourceIsNotFinishedForAnotherDestination(t *testing.T) {
	for _, at := range []string{"", "tcp://one:7000"} {
		disks := specs(t, t.TempDir(), "a")
		l := mustOpen(t, disks, Options{At: at})
		handOff(t, l, disks)
		require.NoError(t, l.Complete())
		require.NoError(t, l.Close())
		l = mustOpen(t, disks, Options{At: at})
		require.True(t, l.Finished())
		require.NoError(t, l.Close())
		refuses(t, disks, Options{At: "tcp://two:7000"}, "the one at tcp://two:7000 may be another, and gets nothing")
		if at != "" {
			refuses(t, disks, Options{At: "tcp://two:7000"}, "at "+at+", has all of it")
			refuses(t, disks, Options{}, "one that connects now may be another")
		}
	}
}

// Two processes with one state file: one would write its copy over the other's
// handoff (fault A10).
func TestStateFileIsLockedAndHeldAgainstTheDisk(t *testing.T) {
	dir := t.TempDir()
	disks := specs(t, dir, "a", "b")
	state := filepath.Join(dir, "a.state")
	disks[0].State, disks[1].State = state, state
	l := mustOpen(t, disks[:1], live(Options{}))
	refuses(t, disks[1:], live(Options{}), "in use")
	refuses(t, disks[1:], Options{}, "in use")
	handOff(t, l, disks[:1])
	refuses(t, disks[1:], live(Options{}), "in use")
	require.NoError(t, l.Close())
	for _, o := range []Options{{}, {Live: true}, {Live: true, Reclaim: true}} {
		refuses(t, disks[1:], o, "is the state file of another disk "+disks[0].Disk.Path())
	}
	l = mustOpen(t, disks[:1], live(Options{}))
	require.True(t, l.HandedOff())
	require.NoError(t, l.Close())
	refuses(t, disks, Options{}, "in use")
}

// Nothing of a process that was killed stays for good (small fault of F16).
func TestLeftoversOfACrashAreRemoved(t *testing.T) {
	dir := t.TempDir()
	disks := specs(t, dir, "a")
	l := mustOpen(t, disks, live(Options{}))
	require.NoError(t, l.Prepare(ownersOf(disks)))
	require.NoError(t, l.disks.unlock())
	require.Len(t, names(t, dir), 4)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "."+"a"+Suffix+".mine"), nil, 0o600))
	require.NoError(t, mustOpen(t, disks, live(Options{})).Close())
	require.ElementsMatch(t, []string{"a", "a" + Suffix, "." + "a" + Suffix + ".mine"}, names(t, dir))
}

// A disk may have as long a name as the file system allows (fault H3).
func TestDisksOfLongNamesHaveAnIdentity(t *testing.T) {
	dir := t.TempDir()
	lengths := []int{228, 229, 231, 232, 239, 240, 245, 246, 247, 254, 255}
	for _, n := range lengths {
		disks := specs(t, dir, strings.Repeat("x", n))
		move(t, disks, live(Options{}))
		l := mustOpen(t, disks, live(Options{}))
		require.True(t, l.HandedOff())
		require.NoError(t, l.Close())
	}
	require.Len(t, names(t, dir), 2*len(lengths))
}

// Many disks share the commits of their file system (fault H18).
func TestManyDisksAreHandedOffTogether(t *testing.T) {
	var all []string
	for i := range 64 {
		all = append(all, "disk"+strings.Repeat("x", i))
	}
	disks := specs(t, t.TempDir(), all...)
	for _, o := range []Options{{}, {Live: true}} {
		l := mustOpen(t, disks, o)
		handOff(t, l, disks)
		require.NoError(t, l.Complete())
		require.NoError(t, l.Close())
		l = mustOpen(t, disks, o)
		require.True(t, l.Finished())
		require.NoError(t, l.Close())
		refuses(t, disks[1:], o, "give all of them")
		l = mustOpen(t, disks, Options{Reclaim: true})
		require.Len(t, l.Reclaimed(), len(disks))
		require.NoError(t, l.Close())
	}
}

// A handoff that is tried again and again does not make a state file forget those
// that took place, nor grow.
func TestStateFileRemembersTheHandoffsThatTookPlace(t *testing.T) {
	s := &state{}
	s.end("first", endReclaimed)
	for i := range 3 * maxEnded {
		s.end(strings.Repeat("x", i+1), endAborted)
	}
	require.Equal(t, endReclaimed, s.knows("first"))
	require.Equal(t, endAborted, s.knows(strings.Repeat("x", 3*maxEnded)))
	require.Len(t, s.Ended, maxEnded)
	for i := range 2 * maxEnded {
		s.end(strings.Repeat("y", i+1), endReturned)
	}
	require.Len(t, s.Ended, maxEnded)
	require.Equal(t, endReturned, s.knows(strings.Repeat("y", 2*maxEnded)))
}
