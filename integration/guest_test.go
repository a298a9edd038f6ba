//go:build integration

package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// guestTime bounds one run of a guest: some 5 s on an idle machine, more on a busy one, plus the download of the
// kernel in a fresh clone.
const guestTime = 5 * time.Minute

// guest runs a shell script inside a virtual machine.
func guest(t *testing.T, script string, options ...string) result {
	t.Helper()
	needGuest(t)
	path := filepath.Join(t.TempDir(), "workload")
	writeFile(t, path, script)
	return command(t, guestTime, filepath.Join(top(), "scripts", "guest"), append(options, path, "one", "two words")...)
}

func writeFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestGuestReturnsOutputAndExitCode(t *testing.T) {
	r := guest(t, `echo "args: $1, $2"; uname -s; modprobe nbd && test -b /dev/nbd0 && echo 'nbd is there'; exit 7`)
	if r.code != 7 {
		t.Errorf("exit code %d, want the script's 7\n%s", r.code, r.stderr)
	}
	if want := "args: one, two words\nLinux\nnbd is there\n"; r.stdout != want {
		t.Errorf("output %q, want %q", r.stdout, want)
	}
}

func TestGuestSeesAndChangesADiskFile(t *testing.T) {
	need(t, "mkfs.ext4")
	disk := filepath.Join(t.TempDir(), "disk.raw")
	must(t, time.Minute, "truncate", "-s", "64M", disk)
	must(t, time.Minute, "mkfs.ext4", "-q", disk)
	r := guest(t, `set -e; mkdir /m; mount /dev/vda /m; echo from the guest >/m/file; umount /m`, "--disk", disk)
	if r.code != 0 {
		t.Fatalf("exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	must(t, time.Minute, "e2fsck", "-fn", disk)
	if got := must(t, time.Minute, "debugfs", "-R", "cat /file", disk); got != "from the guest\n" {
		t.Errorf("the file holds %q", got)
	}
}

func TestGuestThatDiesOrHangsIsNoSuccess(t *testing.T) {
	if r := guest(t, `echo c >/proc/sysrq-trigger`); r.code != 125 || !strings.Contains(r.stderr, "without an exit code") {
		t.Errorf("kernel panic: exit code %d, want 125\n%s", r.code, r.stderr)
	}
	if r := guest(t, `sleep 1000`, "--time", "15"); r.code != 124 || !strings.Contains(r.stderr, "its time was up") {
		t.Errorf("hanging workload: exit code %d, want 124\n%s", r.code, r.stderr)
	}
}
