//go:build integration

package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestVerifyFindsTheFirstDifference compares files and an export of another program.
func TestVerifyFindsTheFirstDifference(t *testing.T) {
	need(t, "nbdkit")
	dir := t.TempDir()
	a := randomImage(t, filepath.Join(dir, "a.raw"), oddSize)
	b := filepath.Join(dir, "b.raw")
	must(t, soon, "cp", "--sparse=always", a, b)
	nbdkit := address(t, false)
	socket := strings.TrimPrefix(nbdkit, "unix://")
	start(t, "nbdkit", "nbdkit", "-f", "-U", socket, "-e", "b", "file", b)
	waitListening(t, nbdkit)
	export := "nbd+unix:///b?socket=" + socket

	if r := command(t, soon, siloNBD(t), "verify", a, b); r.code != 0 || !strings.HasPrefix(r.stdout, "equal") {
		t.Errorf("equal files: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	f, err := os.OpenFile(b, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var was [1]byte
	for _, off := range []int64{oddSize - 1, 40*mib + 7} {
		if _, err := f.ReadAt(was[:], off); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte{^was[0]}, off); err != nil {
			t.Fatal(err)
		}
	}
	for _, other := range []string{b, export} {
		r := command(t, soon, siloNBD(t), "verify", a, other)
		if r.code != 1 || !strings.Contains(r.stdout, "first at byte 41943047 ") {
			t.Errorf("%s: exit code %d, want 1 and the first difference at byte 41943047\n%s%s", other, r.code, r.stdout, r.stderr)
		}
	}
	if r := command(t, soon, siloNBD(t), "verify", a, filepath.Join(dir, "none")); r.code != 1 {
		t.Errorf("a file that is not there: exit code %d, want 1", r.code)
	}
}
