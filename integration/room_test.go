//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// smallFS mounts a file system with so much room until the test's end.
func smallFS(t *testing.T, size string) string {
	t.Helper()
	needRoot(t)
	need(t, "mount", "umount")
	small := filepath.Join(socketDir(t), "small")
	if err := os.Mkdir(small, 0o755); err != nil {
		t.Fatal(err)
	}
	if r := command(t, soon, "mount", "-t", "tmpfs", "-o", "size="+size, "tmpfs", small); r.code != 0 {
		lacking(t, "cannot mount a tmpfs: %s", r.stderr)
	}
	t.Cleanup(func() { must(t, soon, "umount", small) })
	return small
}

// says waits for a text on the standard error of a process.
func (p *process) says(text string, within time.Duration) {
	p.t.Helper()
	eventually(p.t, within, p.name+" says: "+text, func() bool { return strings.Contains(p.stderr.String(), text) })
}

// TestFullDestinationWaitsForRoom moves a disk into a file system that has no room for it, until it has.
func TestFullDestinationWaitsForRoom(t *testing.T) {
	need(t, "qemu-io")
	small := smallFS(t, "8M")
	disk, copied := filepath.Join(t.TempDir(), "disk.raw"), filepath.Join(small, "copy.raw")
	randomImage(t, disk, 24*mib)
	listen, nbd := address(t, false), address(t, false)
	source := start(t, "source", siloNBD(t), "source", "--disk", disk, "--listen", listen)
	waitListening(t, listen)
	args := []string{"dest", "--disk", copied, "--connect", listen, "--nbd", nbd, "--exit-when-complete"}
	dest := start(t, "dest", siloNBD(t), args...)
	uri := readyURI(dest, "disk")
	dest.says("no room: the migration waits, and goes on by itself when there is", soon)
	dest.says(" file="+copied+" bytes_needed_at_most=", soon)
	source.says("the destination has no room: waiting until there is", soon)

	local := pattern(7, 64*kib, 512)
	must(t, soon, "qemu-io", "-f", "raw", "-c", fmt.Sprintf("write -P 7 %d 512", local.off), "-c", "flush", "-c", fmt.Sprintf("read -P 7 %d 512", local.off), uri)
	r := command(t, soon, "qemu-io", "-f", "raw", "-c", fmt.Sprintf("write -P 8 %d 4M", 16*mib), uri)
	if out := r.stdout + r.stderr; !strings.Contains(out, "No space left on device") {
		t.Errorf("a write without room: exit code %d\n%s", r.code, out)
	}
	if !source.running() || !dest.running() {
		t.Fatal("an end has given up")
	}

	// A restart changes nothing.
	dest.signal(syscall.SIGKILL)
	dest.wait(soon)
	dest = start(t, "dest", siloNBD(t), args...)
	readyURI(dest, "disk")
	dest.says("no room: the migration waits", soon)
	must(t, soon, "mount", "-o", "remount,size=64M", small)
	source.succeeds(soon)
	dest.succeeds(soon)
	dest.says("there is room again", soon)
	if err := compareFiles(disk, copied, []patch{local}); err != nil {
		t.Error(err)
	}
}

// TestFlushIsRefusedWhileTheMapHasNoRoom fills the file system of the map: what the map cannot remember is not called
// durable, until there is room.
func TestFlushIsRefusedWhileTheMapHasNoRoom(t *testing.T) {
	need(t, "qemu-io", "losetup")
	small := smallFS(t, "1M")
	dir := t.TempDir()
	disk, backing, where := randomImage(t, filepath.Join(dir, "disk.raw"), 24*mib), filepath.Join(dir, "backing"), filepath.Join(small, "map")
	must(t, soon, "truncate", "-s", "24M", backing)
	device := loopDevice(t, backing)
	listen, nbd := address(t, false), address(t, false)
	source := start(t, "source", siloNBD(t), "source", "--disk", disk, "--listen", listen, "--rate", "64KiB")
	waitListening(t, listen)
	dest := start(t, "dest", siloNBD(t), "dest", "--disk", device, "--map", where, "--overwrite", "--connect", listen, "--nbd", nbd)
	uri := readyURI(dest, "disk")
	filler := filepath.Join(small, "filler")
	if r := command(t, soon, "dd", "if=/dev/zero", "of="+filler, "bs=4096"); r.code == 0 {
		t.Fatal("the file system has no end")
	}
	// A sector of a missing block needs a mask in the map.
	written := pattern(9, 20*mib, 512)
	r := command(t, soon, "qemu-io", "-f", "raw", "-t", "writeback", "-c", fmt.Sprintf("write -P 9 %d 512", written.off), "-c", "flush", uri)
	if r.code == 0 { // it does not say why
		t.Errorf("a flush that the map has no room for went well:\n%s%s", r.stdout, r.stderr)
	}
	dest.says("command=FLUSH off=0 length=0 errno=28", soon)
	dest.says("there is no room for the map", soon)
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	must(t, soon, "qemu-io", "-f", "raw", "-t", "writeback", "-c", "flush", uri)
	dest.signal(syscall.SIGKILL)
	dest.wait(soon)
	source.signal(syscall.SIGKILL)
	source.wait(soon)

	dest = start(t, "dest", siloNBD(t), "dest", "--disk", device, "--map", where, "--connect", listen, "--nbd", nbd, "--exit-when-complete")
	must(t, soon, "qemu-io", "-f", "raw", "-r", "-c", fmt.Sprintf("read -P 9 %d 512", written.off), readyURI(dest, "disk"))
	source = start(t, "source", siloNBD(t), "source", "--disk", disk, "--listen", listen)
	source.succeeds(soon)
	dest.succeeds(soon)
	must(t, soon, "losetup", "--list", device)
	copied := filepath.Join(dir, "copied")
	must(t, soon, "dd", "if="+device, "of="+copied, "bs=1M", "status=none")
	if err := compareFiles(disk, copied, []patch{written}); err != nil {
		t.Error(err)
	}
}
