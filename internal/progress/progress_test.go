package progress

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestNeverHundredPercentBeforeComplete is trap M11.
func TestNeverHundredPercentBeforeComplete(t *testing.T) {
	for _, r := range []Row{
		{Size: 1000, Done: 999}, {Size: 1000, Done: 1000}, {Size: 1000, Done: 2000},
		{Size: 1 << 60, Done: 1<<60 - 1}, {Size: 0}, {Size: 1000, Done: -1},
	} {
		require.Less(t, r.Percent(), 100, "%+v", r)
		require.GreaterOrEqual(t, r.Percent(), 0, "%+v", r)
		require.NotContains(t, describe(r, &Meter{}), "complete")
	}
	require.Equal(t, 100, Row{Size: 1000, Done: 1000, Complete: true}.Percent())
	require.Equal(t, 100, Row{Complete: true}.Percent())
	require.Equal(t, 42, Row{Size: 1000, Done: 429}.Percent())
}

func TestRateFollowsWhatHappens(t *testing.T) {
	var m Meter
	now := time.Unix(0, 0)
	done := int64(0)
	run := func(d time.Duration, rate int64) {
		for range d / (200 * time.Millisecond) {
			now, done = now.Add(200*time.Millisecond), done+rate/5
			m.Add(now, done)
		}
	}
	m.Add(now, done)
	_, ok := m.ETA(1 << 30)
	require.False(t, ok, "nothing is known yet")
	run(time.Second, 10_000_000)
	require.InEpsilon(t, 10_000_000, m.rate, 0.01)
	run(30*time.Second, 1_000_000)
	require.InEpsilon(t, 1_000_000, m.rate, 0.05)
	left, ok := m.ETA(done + 60_000_000)
	require.True(t, ok)
	require.InDelta(t, 60, left.Seconds(), 4)
	run(5*time.Minute, 0)
	_, ok = m.ETA(done + 60_000_000)
	require.False(t, ok, "nothing moves: no ETA")
	run(time.Minute, -1_000_000)
	_, ok = m.ETA(1 << 40)
	require.False(t, ok, "more gets missing: no ETA")
}

func TestDescribeIsHonest(t *testing.T) {
	moving, still := &Meter{done: 1 << 20, rate: 1 << 20, seen: time.Minute}, &Meter{seen: time.Minute}
	for want, s := range map[string]string{
		"1.00 MiB of 61.0 MiB  1.00 MiB/s  ETA 1:00": describe(Row{Size: 61 << 20, Done: 1 << 20, Connected: true}, moving),
		"1.00 MiB of 61.0 MiB  not connected":        describe(Row{Size: 61 << 20, Done: 1 << 20}, moving),
		"1.00 MiB of 61.0 MiB  stalled":              describe(Row{Size: 61 << 20, Done: 1 << 20, Connected: true}, still),
		"61.0 MiB of 61.0 MiB  finishing":            describe(Row{Size: 61 << 20, Done: 61 << 20, Connected: true}, still),
		"1.00 MiB of 61.0 MiB  starting":             describe(Row{Size: 61 << 20, Done: 1 << 20, Connected: true}, &Meter{}),
		"61.0 MiB  complete":                         describe(Row{Size: 61 << 20, Done: 61 << 20, Complete: true}, still),
		"0 B of 61.0 MiB  not connected  waiting reads: 2 (since 1:01:01)": describe(
			Row{Size: 61 << 20, Waiting: 2, OldestWait: time.Hour + time.Minute + time.Second}, still),
	} {
		require.Equal(t, want, s)
	}
}

// logged runs a line display in a bubble of its own and returns its lines.
func logged(t *testing.T, d time.Duration, rows func(at time.Duration) []Row) (lines []map[string]any) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		ctx, cancel := context.WithTimeout(t.Context(), d)
		defer cancel()
		start := time.Now()
		display := New(&out, false)
		display.Run(ctx, slog.New(slog.NewJSONHandler(display, nil)), func() []Row { return rows(time.Since(start)) })
		for l := range strings.Lines(out.String()) {
			var m map[string]any
			require.NoError(t, json.Unmarshal([]byte(l), &m))
			lines = append(lines, m)
		}
	})
	return lines
}

func TestMovingDiskIsLoggedEveryFewSeconds(t *testing.T) {
	lines := logged(t, 31*time.Second, func(at time.Duration) []Row {
		return []Row{{Name: "a", Size: 100 << 20, Done: int64(at/time.Second) << 20, Connected: true, Waiting: 1}}
	})
	require.Len(t, lines, 7) // at 5, 10, … 30 s, and the end
	require.Equal(t, "progress", lines[0]["msg"])
	require.Equal(t, "a", lines[0]["disk"])
	require.EqualValues(t, 5, lines[0]["percent"])
	require.EqualValues(t, 1<<20, lines[1]["bytes_per_second"])
	require.EqualValues(t, 90, lines[1]["eta_seconds"])
	require.EqualValues(t, 1, lines[1]["waiting_reads"])
	require.EqualValues(t, 31<<20, lines[6]["done_bytes"])
}

func TestIdleDiskIsLoggedRarelyButIs(t *testing.T) {
	lines := logged(t, 10*time.Minute, func(at time.Duration) []Row {
		return []Row{{Name: "a", Size: 100, Done: 50, Waiting: 1, OldestWait: at}}
	})
	require.InDelta(t, 10, len(lines), 1)
	require.Equal(t, false, lines[0]["connected"])
	require.NotContains(t, lines[0], "eta_seconds")
}

func TestCompleteIsLoggedOnce(t *testing.T) {
	lines := logged(t, time.Hour, func(at time.Duration) []Row {
		return []Row{{Name: "a", Size: 100, Done: min(100, int64(at/time.Second)), Complete: at > 100*time.Second}}
	})
	last := lines[len(lines)-1]
	require.EqualValues(t, 100, last["percent"])
	require.Less(t, lines[len(lines)-2]["percent"], float64(100))
	require.Less(t, len(lines), 30)
}

// safeBuffer may be read while the bars write to it.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func TestBars(t *testing.T) {
	var out safeBuffer
	var mu sync.Mutex
	rows := []Row{{Name: "a", Size: 100 << 20, Done: 100 << 20, Connected: true}}
	d := New(&out, true)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		d.Run(ctx, nil, func() []Row {
			mu.Lock()
			defer mu.Unlock()
			return append([]Row(nil), rows...)
		})
	}()
	wait := func(what string) {
		t.Helper()
		require.Eventually(t, func() bool { return strings.Contains(out.String(), what) }, 5*time.Second, 10*time.Millisecond, "%q in %q", what, &out)
	}
	wait("99%  100 MiB of 100 MiB  finishing")
	require.NotContains(t, out.String(), "100% ")
	_, err := fmt.Fprintln(d, "a line between")
	require.NoError(t, err)
	wait("a line between\n")
	mu.Lock()
	rows[0].Complete = true
	rows = append(rows, Row{Name: "second", Size: 10 << 20, Connected: true})
	mu.Unlock()
	wait("100%  100 MiB  complete")
	wait("second")
	cancel()
	<-ended
	_, err = fmt.Fprintln(d, "a line after")
	require.NoError(t, err)
	require.True(t, strings.HasSuffix(out.String(), "a line after\n"), "%q", out.String())
}

func TestIsTerminal(t *testing.T) {
	require.False(t, IsTerminal(&bytes.Buffer{}))
	f, err := os.CreateTemp(t.TempDir(), "")
	require.NoError(t, err)
	defer f.Close()
	require.False(t, IsTerminal(f))
	if pty, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0); err == nil {
		defer pty.Close()
		require.False(t, IsTerminal(pty), "a terminal without a size has no room")
		require.NoError(t, unix.IoctlSetWinsize(int(pty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 80}))
		require.True(t, IsTerminal(pty))
	}
}
