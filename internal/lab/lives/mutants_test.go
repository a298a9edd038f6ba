package lives

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

var (
	withMutants = flag.Bool("lives.mutants", false, "take known mends out, one after the other, and see that the model finds it")
	mutantRuns  = flag.Uint64("lives.mutantruns", 1500, "in how many runs at most")
)

// mutant is the program without a mend.
type mutant struct {
	fault string
	edits []edit
}

// edit replaces text that stands once in a file.
type edit struct{ file, from, to string }

var mutants = []mutant{
	// A note counts only if all disks that are given have it.
	{"A1", []edit{{"internal/identity/judge.go", `	if err := s.together(away); err != nil {
		return false, false, err
	}
`, `	if len(away) < len(s) {
		return false, false, nil
	}
`}}},
	// A complete map is enough for dest.
	{"A2", []edit{{"internal/disks/maps.go", `	if err != nil || note == nil {
		return err
	}
	return fmt.Errorf("%w; nothing was changed: use it there`, `	if err != nil || note == nil || true {
		return err
	}
	return fmt.Errorf("%w; nothing was changed: use it there`}}},
	// A frozen disk is bound to no destination.
	{"A4", []edit{
		{"pkg/migrate/live.go", "	case owned:\n		e.Device", "	case owned && d.Live != nil:\n		e.Device"},
		{"pkg/migrate/admit.go", "if err := last.owns(c.told); err != nil {", "if err := last.owns(c.told); err != nil && c.disk.Live != nil {"},
		{"pkg/migrate/admit.go", "	if !last.Taken {", "	if !last.Taken || !c.told.Live {"},
		{"internal/identity/handoff.go", "if h.Owner != deviceDigits(o.Device) {", "if l.live && h.Owner != deviceDigits(o.Device) {"},
	}},
	// A generation is the one after the last.
	{"A5", []edit{{"internal/identity/state.go", "	s.Generation = draw()\n", "	s.Generation++\n"}}},
	// A destination is known by its device alone, whatever state that is in.
	{"A6", []edit{
		{"pkg/migrate/peer.go", "	case t.Epoch.Before != p.Epoch, t.Epoch.Steps-p.Steps > p.Pending:", "	case false:"},
		{"pkg/migrate/peer.go", "	if p.Taken && p.Epoch != 0 && !t.Live {", "	if false {"},
	}},
	// A map is tied to no disk.
	{"F1", []edit{{"internal/disks/verify.go", "	if wrong != \"\" {\n		return d.refuse(wrong, moved)\n	}", "	if false {\n		return d.refuse(wrong, moved)\n	}"}}},
}

// TestMutants shows that the model is worth something: it finds known faults
// again when what mends them is taken out.
func TestMutants(t *testing.T) {
	if !*withMutants {
		t.Skip("minutes of work: scripts/lives mutants")
	}
	for _, m := range mutants {
		t.Run(m.fault, func(t *testing.T) {
			bin := m.build(t)
			began := time.Now()
			var next atomic.Uint64
			var mu sync.Mutex
			var found *Failure
			var wg sync.WaitGroup
			for range *workers {
				w := testWorker(t, bin)
				wg.Go(func() {
					for seed := next.Add(1); seed <= *mutantRuns; seed = next.Add(1) {
						mu.Lock()
						done := found != nil
						mu.Unlock()
						if done {
							return
						}
						if f := w.draw(seed, 10*time.Second); f != nil {
							mu.Lock()
							found = f
							mu.Unlock()
						}
					}
				})
			}
			wg.Wait()
			require.NotNil(t, found, "%s was not found in %d runs", m.fault, *mutantRuns)
			t.Logf("found after %d runs, %v: %v\n%s", next.Load(), time.Since(began).Round(time.Second), found.Err, strings.Join(found.Steps, "\n"))
		})
	}
}

// build builds the program with the edits laid over its source.
func (m mutant) build(t *testing.T) string {
	dir := t.TempDir()
	root, err := filepath.Abs("../../..")
	require.NoError(t, err)
	texts := map[string]string{}
	for _, e := range m.edits {
		path := filepath.Join(root, e.file)
		if _, ok := texts[path]; !ok {
			b, err := os.ReadFile(path)
			require.NoError(t, err)
			texts[path] = string(b)
		}
		require.Equal(t, 1, strings.Count(texts[path], e.from), "the mend of %s is not in %s as it was: look for %q", m.fault, e.file, e.from)
		texts[path] = strings.Replace(texts[path], e.from, e.to, 1)
	}
	overlay := struct{ Replace map[string]string }{map[string]string{}}
	for path, text := range texts {
		to := filepath.Join(dir, strings.ReplaceAll(filepath.Base(filepath.Dir(path))+"_"+filepath.Base(path), string(filepath.Separator), "_"))
		require.NoError(t, os.WriteFile(to, []byte(text), 0o600))
		overlay.Replace[path] = to
	}
	b, err := json.Marshal(overlay)
	require.NoError(t, err)
	where := filepath.Join(dir, "overlay.json")
	require.NoError(t, os.WriteFile(where, b, 0o600))
	bin, err := build(filepath.Join(dir, "silo-nbd"), "-overlay", where)
	require.NoError(t, err, m.fault)
	return bin
}
