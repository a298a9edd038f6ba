package disks

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// missing skips on a laptop, and fails where nothing may be missing.
func missing(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// attachLoop makes a block device of a file, until the test ends or it is detached.
func attachLoop(t *testing.T, backing string) (device string, detach func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "loop devices need root")
	}
	out, err := exec.Command("losetup", "--find", "--show", backing).CombinedOutput()
	if err != nil {
		missing(t, "no loop device: "+strings.TrimSpace(string(out)+" "+err.Error()))
	}
	device = strings.TrimSpace(string(out))
	attached := true
	detach = func() {
		if attached {
			attached = false
			out, err := exec.Command("losetup", "--detach", device).CombinedOutput()
			require.NoError(t, err, string(out))
		}
	}
	t.Cleanup(detach)
	return device, detach
}

// TestAnotherDeviceByTheNameIsRefused: what a name such as /dev/sdb leads to after a
// restart of the host need not be what it led to before (fault F1, trap I6).
func TestAnotherDeviceByTheNameIsRefused(t *testing.T) {
	content := func(p byte, size int64) []byte { return bytes.Repeat([]byte{p}, int(size)) }
	for name, c := range map[string]struct {
		kill  bool
		size  int64                        // of another device, in place of the right one; 0: the right one
		spoil func(t *testing.T, b []byte) // what is written to the file behind the right one; nil: nothing
		want  string                       // empty: it is taken
	}{
		"the right one":           {},
		"the right one, killed":   {kill: true},
		"a larger one":            {size: 2 * testSize, want: "size"},
		"a larger one, killed":    {kill: true, size: 2 * testSize, want: "size"},
		"one as large":            {size: testSize, want: "WWID"},
		"an older state":          {spoil: func(t *testing.T, b []byte) { clear(b[5*testBlock:]) }, want: "it was"},
		"an older state, killed":  {kill: true, spoil: func(t *testing.T, b []byte) { clear(b[5*testBlock:]) }, want: "not what they were"},
		"written in a few places": {spoil: func(t *testing.T, b []byte) { b[40*testBlock] = 1 }, want: "it was"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			t.Setenv("SILO_NBD_STATE_DIR", dir+"/state")
			require.NoError(t, os.WriteFile(dir+"/right", content('R', testSize), 0o600))
			right, detach := attachLoop(t, dir+"/right")
			require.NoError(t, os.Symlink(right, dir+"/sdb"))
			specs := parse(t, dir, "b=sdb")
			specs[0].Named, specs[0].Map = false, dir+"/b.map"
			require.NoError(t, run(t, specs, Options{Overwrite: true}, life{lo: 0, hi: 10}))
			require.NoError(t, run(t, specs, Options{}, life{lo: 10, hi: 20, kill: c.kill}))

			detach()
			backing := dir + "/right"
			if c.size > 0 {
				backing = dir + "/other"
				require.NoError(t, os.WriteFile(backing, content('P', c.size), 0o600))
			}
			if c.spoil != nil {
				b, err := os.ReadFile(backing)
				require.NoError(t, err)
				c.spoil(t, b)
				require.NoError(t, os.WriteFile(backing, b, 0o600))
			}
			now, _ := attachLoop(t, backing)
			require.NoError(t, os.Remove(dir+"/sdb"))
			require.NoError(t, os.Symlink(now, dir+"/sdb"))
			before, err := os.ReadFile(backing)
			require.NoError(t, err)
			err = run(t, specs, Options{}, life{lo: 20, hi: 30})
			if c.want == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, c.want)
			require.ErrorContains(t, err, "/dev/disk/by-id")
			require.ErrorContains(t, err, filepath.Join(dir, "b.map"))
			after, err := os.ReadFile(backing)
			require.NoError(t, err)
			require.True(t, bytes.Equal(before, after), "nothing is written")
		})
	}
}
