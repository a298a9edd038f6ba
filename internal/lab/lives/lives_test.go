package lives

import (
	"cmp"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

var (
	runs    = flag.Int("lives.runs", 2000, "how many runs are drawn")
	bound   = flag.Duration("lives.time", 150*time.Second, "no run is drawn after this time, so that the gate takes 3 minutes at most")
	from    = flag.Uint64("lives.seed", 1, "the seed of the first run")
	workers = flag.Int("lives.workers", 2*runtime.NumCPU(), "how many runs at once")
	going   = flag.Bool("lives.all", false, "go on after a violation, and count them")
	given   = flag.String("lives.bin", "", "the program that is tried (default: it is built)")
	shorten = flag.Duration("lives.shrink", 20*time.Second, "how long steps are left out of a run that found a violation")
	keeps   = flag.Bool("lives.keeps", true, "a dest that is killed has lost nothing that was acknowledged")
	races   = flag.Bool("lives.race", false, "build the program with the race detector")
	played  = flag.String("lives.play", "", "play these steps, between semicolons, and show what was said")
	only    = flag.String("lives.story", "", "play only this story, and show what was said")
)

// program builds silo-nbd, once.
var program = sync.OnceValues(func() (string, error) { return build(filepath.Join(work(), "silo-nbd")) })

// work is a directory that TestMain removes.
var work = sync.OnceValue(func() string {
	dir, err := os.MkdirTemp("", "lives-bin-")
	if err != nil {
		panic(err)
	}
	return dir
})

func build(to string, args ...string) (string, error) {
	if *races {
		args = append(args, "-race")
	}
	args = append([]string{"build", "-buildvcs=false", "-o", to}, append(args, "../../../cmd/silo-nbd")...)
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return to, nil
}

// sweep removes what a test has left that was killed.
var sweep = sync.OnceFunc(func() {
	left, _ := filepath.Glob(filepath.Join(os.TempDir(), "lives-[0-9]*-*")) // the pattern is right
	for _, dir := range left {
		var pid int
		if _, err := fmt.Sscanf(filepath.Base(dir), "lives-%d-", &pid); err != nil || syscall.Kill(pid, 0) != syscall.ESRCH {
			continue
		}
		for _, name := range []string{"A", "B"} {
			_ = syscall.Unmount(filepath.Join(dir, name), syscall.MNT_DETACH) // it may not be mounted
		}
		_ = os.RemoveAll(dir) // tried again the next time
	}
})

func TestMain(m *testing.M) {
	code := m.Run()
	os.RemoveAll(work())
	os.Exit(code)
}

func testWorker(t *testing.T, bin string) *worker {
	if bin = cmp.Or(bin, *given); bin == "" {
		var err error
		bin, err = program()
		require.NoError(t, err)
	}
	sweep()
	dir, err := os.MkdirTemp("", fmt.Sprintf("lives-%d-", os.Getpid())) // short: socket paths lie in it
	require.NoError(t, err)
	w, err := newWorker(bin, dir, *keeps)
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, w.close())
		require.NoError(t, os.RemoveAll(dir))
	})
	return w
}

func TestLives(t *testing.T) {
	var next, made atomic.Uint64
	next.Store(*from)
	last := *from + uint64(*runs)
	var mu sync.Mutex
	kinds := map[string]int{}
	began := time.Now()
	var wg sync.WaitGroup
	for range *workers {
		w := testWorker(t, "")
		wg.Go(func() {
			for seed := next.Add(1) - 1; seed < last && (*going || !t.Failed()) && time.Since(began) < *bound; seed = next.Add(1) - 1 {
				f := w.draw(seed, *shorten)
				made.Add(1)
				if f == nil {
					continue
				}
				mu.Lock()
				kinds[f.Err.Error()]++
				t.Error(f.String())
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	t.Logf("%d runs in %v, violations: %v", made.Load(), time.Since(began).Round(time.Second), kinds)
}

// TestStories plays what once went wrong.
func TestStories(t *testing.T) {
	for _, s := range stories {
		if *only != "" && s.name != *only {
			continue
		}
		t.Run(s.name, func(t *testing.T) {
			if s.open != "" && *only == "" && !*going {
				t.Skip("not mended yet: " + s.open)
			}
			w := testWorker(t, "")
			began := time.Now()
			d := &drawer{}
			steps, closing := slices.Clone(s.steps), false
			r, err := w.play(1, func(r *run) string {
				if len(steps) == 0 && !closing {
					steps, closing = d.closing(r), true
				}
				if len(steps) == 0 {
					return ""
				}
				next := steps[0]
				steps = steps[1:]
				return next
			})
			if err != nil {
				t.Error((&Failure{Err: err, Steps: r.done, Log: r.log()}).String())
			}
			if err == nil && *only != "" {
				t.Log(r.log())
			}
			t.Log(time.Since(began).Round(time.Millisecond), r.started, "processes:", strings.Join(r.done, "; "))
		})
	}
}

// TestPlay plays the steps of a flag.
func TestPlay(t *testing.T) {
	if *played == "" {
		t.Skip("no -lives.play")
	}
	var steps []string
	for s := range strings.SplitSeq(*played, ";") {
		steps = append(steps, strings.TrimSpace(s))
	}
	r, err := testWorker(t, "").play(*from, listed(steps))
	t.Log(strings.Join(r.done, "; "), "\n", r.log())
	require.NoError(t, err)
}
