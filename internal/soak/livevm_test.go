package soak

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/internal/livevm"
)

func TestMovesOfASeedAreTheSame(t *testing.T) {
	same := 0
	for seed := range uint64(50) {
		a, b, c := livevm.Defaults(), livevm.Defaults(), livevm.Defaults()
		require.Equal(t, varied(&a, seed), varied(&b, seed))
		require.Equal(t, a, b)
		if varied(&c, seed+1) == varied(&a, seed) {
			same++
		}
	}
	require.Less(t, same, 5, "of 50 seeds and their next")
}

func TestMachineThatDoesNotBootIsAFailureAndItsFilesAreLeft(t *testing.T) {
	dir := t.TempDir()
	move := livevm.Defaults()
	move.Size, move.Cold = 8<<20, 0
	t.Setenv("PATH", "/nonexistent") // whatever is installed here: mkfs.ext4 is not
	sum, err := MoveMachines(t.Context(), LiveOptions{Move: move, Dir: dir, Log: t.Logf})
	require.ErrorContains(t, err, "mkfs.ext4")
	require.ErrorContains(t, err, "the files are in "+dir)
	require.Empty(t, sum.Moves)
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, left, 1)
}

func TestMoveThatFailsCanBeMadeAgain(t *testing.T) {
	dir := t.TempDir()
	move := livevm.Defaults()
	move.From = filepath.Join(dir, "none")
	_, _, err := moveMachine(t.Context(), &LiveOptions{Move: move, Dir: dir}, 7)
	require.ErrorContains(t, err, "cp: ")
	require.ErrorContains(t, err, "again: scripts/soak --seed 7 --rounds 1 live-vm")
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, left, 1)
}

func TestSummaryOfMoves(t *testing.T) {
	sum := &LiveSummary{took: time.Minute, Moves: []livevm.Report{
		{Pause: 3 * time.Millisecond, Handoff: time.Millisecond, Stopped: 2 * time.Millisecond, Records: 10, RecordsBefore: 4, Places: 20, DiskPasses: 1, Fsck: "clean"},
		{Pause: 9 * time.Millisecond, Handoff: 2 * time.Millisecond, Stopped: 4 * time.Millisecond, Records: 5, RecordsBefore: 4, Places: 10, DiskPasses: 2, Fsck: "clean"},
		{Pause: 5 * time.Millisecond, Handoff: 4 * time.Millisecond, Stopped: 3 * time.Millisecond, Records: 5, RecordsBefore: 4, Places: 10, DiskPasses: 3, GivenUp: 1, Asked: 2, Mismatches: 1, DiskAfter: 3 << 20},
	}}
	require.Equal(t, `moves: 3 in 1m0s, and 0 that failed; 1 were handed off in the first pass over the disk, 1 when it was asked for again; 1 at the second try, the first was given up
records: 12 at the sources, 8 at the destinations; 40 places verified by the guests, 1 mismatches; 2 file systems clean
disks: 0 MiB before the handoff, 3 MiB after it
median and longest: pause of a guest 5ms and 9ms, machine stopped 3ms and 4ms, handoff 2ms and 4ms`, sum.String())
}
