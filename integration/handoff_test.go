//go:build integration

package integration

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"testing"
	"time"
)

var handoffProgram = sync.OnceValues(func() (string, error) {
	bin := filepath.Join(scratch, "handoff")
	return bin, build(bin, "./internal/handoff")
})

// TestDiskInUseMoves moves a disk under a steady writer, who finds everything that it has written at the destination: at
// random moments, in the first pass and after it, and with the connection broken in the handoff.
func TestDiskInUseMoves(t *testing.T) {
	program, err := handoffProgram()
	if err != nil {
		t.Fatal(err)
	}
	for i, cut := range []bool{false, false, false, true, true} {
		seed := rand.Uint64N(1 << 32)
		before := 100*time.Millisecond + rand.N(1500*time.Millisecond)
		t.Run(fmt.Sprintf("%d,cut=%v", i, cut), func(t *testing.T) {
			args := []string{"-silo-nbd", siloNBD(t), "-dir", t.TempDir(), "-size", "33554432", "-rate", "20MiB", "-before", before.String(),
				"-after", "200ms", fmt.Sprintf("-cut=%v", cut), "-seed", strconv.FormatUint(seed, 10)}
			t.Log(args)
			r := command(t, patient, program, args...)
			if r.code != 0 {
				t.Fatalf("exit code %d\n%s%s", r.code, r.stdout, r.stderr)
			}
			for _, want := range []string{`(?m)^mismatches: 0$`, `it made \d+ writes, [1-9]\d* of them at the destination`} {
				if !regexp.MustCompile(want).MatchString(r.stdout) {
					t.Errorf("no %q in\n%s", want, r.stdout)
				}
			}
			t.Logf("\n%s", r.stdout)
		})
	}
}
