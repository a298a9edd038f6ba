//go:build integration

package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// scratch is a directory for the whole run; what single tests need lies in their own t.TempDir.
var scratch string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "silo-nbd-integration-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "integration:", err)
		os.Exit(1)
	}
	if err := os.Chmod(dir, 0o755); err != nil { // some tests run the command as another user
		fmt.Fprintln(os.Stderr, "integration:", err)
		os.Exit(1)
	}
	scratch = dir
	if os.Getenv("SILO_NBD_STATE_DIR") == "" {
		os.Setenv("SILO_NBD_STATE_DIR", filepath.Join(dir, "state")) // as below
	}
	if os.Getenv("SILO_NBD_RUN_DIR") == "" {
		os.Setenv("SILO_NBD_RUN_DIR", filepath.Join(dir, "run")) // the programs inherit it
	}
	code := m.Run()
	if err := os.RemoveAll(dir); err != nil {
		fmt.Fprintln(os.Stderr, "integration:", err)
	}
	os.Exit(code)
}

// top is the root of the repository.
var top = sync.OnceValue(func() string {
	dir, err := os.Getwd()
	if err != nil {
		panic(err)
	}
	return filepath.Dir(dir)
})

// build builds a package of the repository.
func build(bin, pkg string) error {
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", bin, pkg)
	cmd.Dir = top()
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s: %w\n%s", pkg, err, out)
	}
	return nil
}

// need skips the test when one of the tools is not installed; in CI, where a skip would look like a pass, it fails.
func need(t *testing.T, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			lacking(t, "%s is not installed", tool)
		}
	}
}

// needRoot skips the test when it does not run as root.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		lacking(t, "not run as root")
	}
}

// needGuest skips the test when no virtual machine can run here.
func needGuest(t *testing.T) {
	t.Helper()
	out, err := exec.Command(filepath.Join(top(), "scripts", "guest"), "--check").CombinedOutput()
	if err != nil {
		lacking(t, "%s", strings.TrimSpace(string(out)))
	}
}

// lacking ends the test because of what the machine lacks: a failure in CI, a skip with the reason elsewhere.
func lacking(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format+" (in CI that is a failure)", args...)
	}
	t.Skipf(format, args...)
}
