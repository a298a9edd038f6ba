package livevm

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

var start = time.Unix(1000, 0)

func TestLineBegunAtTheSourceEndsAtTheDestination(t *testing.T) {
	c := newConsole()
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	c.take(0, at(0), []byte("r 1 99000\nr 2 20"))
	c.take(0, at(30), []byte("000\r\nr 3 10000\n"))
	c.take(0, at(40), []byte("r 4 "))
	c.take(1, at(140), []byte("12000\nr 5 1000\nr 6 1000\n"))
	c.take(1, at(160), []byte("r 7 15000\nwrote 7\nverified 14 places 96 bytes 0 mismatches\n"))
	s := c.look()
	require.Equal(t, gap{30 * time.Millisecond, 20 * time.Millisecond}, s.atSource)
	require.Equal(t, gap{110 * time.Millisecond, 12 * time.Millisecond}, s.across)
	require.Equal(t, gap{20 * time.Millisecond, 15 * time.Millisecond}, s.atDest)
	require.EqualValues(t, 3, s.before)
	require.EqualValues(t, 7, s.last)
	require.EqualValues(t, 7, s.wrote)
	require.Equal(t, "verified 14 places 96 bytes 0 mismatches", c.verdict())
	require.Empty(t, c.bad)
}

func TestWhatTheGuestComplainsAboutFailsTheMove(t *testing.T) {
	on := &process{name: "new", done: make(chan struct{})}
	for says, want := range map[string]string{
		"r 1 0\nr 3 0\n":                 "record 3 came after record 1",
		"error fsync: i/o error\n":       "the guest says: error fsync: i/o error",
		"bad record 7 is not at 28672\n": "record 7 is not at 28672",
	} {
		c := newConsole()
		c.take(0, start, []byte(says))
		require.ErrorContains(t, c.await(t.Context(), on, "it", func(*console) bool { return true }), want)
	}
}

func TestMachineThatEndsIsNotWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, on := newConsole(), &process{name: "old", log: filepath.Join(t.TempDir(), "none"), done: make(chan struct{})}
		failed := make(chan error, 1)
		go func() {
			failed <- c.await(t.Context(), on, "record 2", func(c *console) bool { return c.seen.last >= 2 })
		}()
		synctest.Wait()
		c.take(0, start, []byte("r 1 0\n"))
		synctest.Wait()
		require.Empty(t, failed)
		on.err = errors.New("exit status 1")
		close(on.done)
		require.ErrorContains(t, <-failed, "old ended before record 2, after record 1")

		c.take(0, start, []byte("r 2 0\n"))
		require.NoError(t, c.await(t.Context(), on, "record 2", func(c *console) bool { return c.seen.last >= 2 }), "it had said so before")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		alive := &process{name: "new", done: make(chan struct{})}
		require.ErrorIs(t, c.await(ctx, alive, "more", func(*console) bool { return false }), context.DeadlineExceeded)
	})
}

// TestInitrdIsAnArchiveBehindTheBase reads what was made as the kernel does: header by header.
func TestInitrdIsAnArchiveBehindTheBase(t *testing.T) {
	dir := t.TempDir()
	base, guest, path := filepath.Join(dir, "base"), filepath.Join(dir, "guest"), filepath.Join(dir, "initrd")
	require.NoError(t, os.WriteFile(base, []byte("BASE"), 0o600))
	require.NoError(t, os.WriteFile(guest, []byte("a program"), 0o600))
	require.NoError(t, makeInitrd(path, base, guest, "1234 2ms"))
	made, err := os.ReadFile(path)
	require.NoError(t, err)
	made, ok := bytes.CutPrefix(made, []byte("BASE"))
	require.True(t, ok)

	field := func(header []byte, n int) int {
		v, err := strconv.ParseUint(string(header[6+8*n:14+8*n]), 16, 32)
		require.NoError(t, err)
		return int(v)
	}
	up := func(n int) int { return (n + 3) &^ 3 }
	got, modes := map[string]string{}, map[string]int{}
	for len(made) > 0 {
		require.Equal(t, "070701", string(made[:6]))
		size, name := field(made, 6), field(made, 11)
		begin := up(110 + name)
		n := string(made[110 : 110+name-1])
		got[n], modes[n] = string(made[begin:begin+size]), field(made, 1)
		made = made[up(begin+size):]
	}
	require.Equal(t, map[string]string{
		"guest": "a program", "workload": "exec /guest 1234 2ms </dev/ttyS0\n", "workload.args": "set --\n", "TRAILER!!!": "",
	}, got)
	require.Equal(t, 0o100755, modes["guest"])
}

func TestProgramThatFailsIsQuoted(t *testing.T) {
	m := &move{dir: t.TempDir()}
	p, err := m.launch("sh", func(out io.Reader) { _, _ = io.Copy(io.Discard, out) }, "sh", "-c", "echo one >&2; echo the reason >&2; exit 3")
	require.NoError(t, err)
	err = p.wait(t.Context())
	require.ErrorContains(t, err, "sh ended with exit status 3: the reason")
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit)
	require.NoError(t, m.close())
}

func TestSiloThatEndsBeforeItIsReadyIsNotWaitedFor(t *testing.T) {
	m := &move{dir: t.TempDir(), o: Options{SiloNBD: "false"}}
	_, err := m.silo(t.Context(), "source")
	require.ErrorContains(t, err, "source ended before it was ready")
	m.o.SiloNBD = "echo" // it prints its first argument, which is not ready
	_, err = m.silo(t.Context(), "dest")
	require.ErrorContains(t, err, "dest ended before it was ready")
	require.NoError(t, m.close())
}

func TestReport(t *testing.T) {
	r := Report{
		Pause: 120 * time.Millisecond, GuestPause: 57 * time.Millisecond, PauseBefore: 266 * time.Millisecond, PauseAfter: 98 * time.Millisecond,
		Stopped: 52 * time.Millisecond, Switched: time.Second, Handoff: 4900 * time.Microsecond, Asked: 1, Memory: 97 << 20, MemoryPasses: 3,
		DiskBefore: 98 << 20, DiskAfter: 1 << 19, DiskPasses: 2, Missing: 1 << 18, Records: 222, RecordsBefore: 165, Places: 286, Cold: 96 << 20, Fsck: "clean: x",
	}
	want := `the guest's longest pause: 266ms (across the move 120ms, by its own clock 57ms; before it 266ms, after it 98ms)
stopped: 52ms by QEMU's account, of which the handoff of the disk took 4.9ms
memory: 97.0 MiB in 3 passes, 1s from the start of its migration to the guest's start at the destination
disk: 98.0 MiB before the handoff, in 2 passes; 0.5 MiB after it, with 0.2 MiB (holes included) missing at the destination when that became its owner
records: 165 at the source, 57 at the destination
verified by the guest: 286 places with records, and 96.0 MiB that nobody wrote; mismatches: 0
e2fsck: clean: x`
	require.Equal(t, want, r.String())
	r.GivenUp, r.Asked = 5*time.Millisecond, 3
	require.Contains(t, r.String(), "a first try was given up; the guest stood still for 5ms, and went on at the source\nthe guest's")
	require.Contains(t, r.String(), "took 4.9ms (asked for 3 times)\n")
}
