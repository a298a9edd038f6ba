//go:build integration

package integration

import (
	"os/exec"
	"testing"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/soak"
)

// soakSeed makes a run of the tests plan what the one before did. scripts/soak takes another each time.
const soakSeed = 20261122

// TestD11KilledAtRandomMoments kills source, destination and both, 200 times and more, with clients that write and
// fio that verifies: nothing that was flushed is lost, and nothing comes back that was written over.
func TestD11KilledAtRandomMoments(t *testing.T) {
	need(t, "fio")
	fio, err := exec.LookPath("fio")
	if err != nil {
		t.Fatal(err)
	}
	sum := soaked(t, soak.Options{Kind: soak.Kill, Fio: fio, Kills: 200, Parallel: 2})
	if sum.Kills() < 200 || sum.SourceKills.Load() < 50 || sum.DestKills.Load() < 50 {
		t.Errorf("too few kills:\n%v", sum)
	}
}

// TestLinkCutAtAnyByte cuts the link of one migration 200 times, at any byte, lets it go silent, delays it and
// changes bits of what passes.
func TestLinkCutAtAnyByte(t *testing.T) {
	sum := soaked(t, soak.Options{Kind: soak.Cut, Rounds: 1})
	if sum.Cuts.Load() < 200 || sum.Rounds.Load() != 1 {
		t.Errorf("too few cuts:\n%v", sum)
	}
}

func soaked(t *testing.T, o soak.Options) *soak.Summary {
	t.Helper()
	o.Bin, o.Dir, o.Seed, o.Duration, o.Log = siloNBD(t), scratch, soakSeed, 10*time.Minute, t.Output()
	sum, err := soak.Run(t.Context(), o)
	if err != nil {
		t.Fatalf("%v\n%v", err, sum)
	}
	t.Logf("%v", sum)
	return sum
}
