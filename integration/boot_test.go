//go:build integration

package integration

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// rootInittab and rootScript are the user space of the root disk: busybox as init, which runs a workload once.
const rootInittab = `::sysinit:/etc/rc
::ctrlaltdel:/sbin/reboot
`

const rootScript = `#!/bin/sh
export PATH=/bin:/sbin
mount -o remount,rw / || echo 'cannot remount the root'
mount -t tmpfs tmp /tmp
(
	set -e
	echo "user space on $(awk '$2 == "/" { print $1, $3 }' /proc/mounts)"
	cd /tree
	sha256sum -c /sums >/tmp/checked || { grep -v ': OK$' /tmp/checked; exit 1; }
	echo "verified $(wc -l </tmp/checked) files"
	dd if=/dev/urandom of=/written bs=64k count=32 2>/dev/null
	sha256sum </written >/written.sum
	sync
	echo 'workload: done'
)
code=$?
cd /
umount /tmp
mount -o remount,ro /
echo "guest-exit: $code" >/dev/ttyS1
poweroff -f
`

// TestGuestBootsFromTheExport boots a virtual machine whose root disk is on the way: nearly all of it is still at the
// source when its workload has read, verified and written files.
func TestGuestBootsFromTheExport(t *testing.T) {
	need(t, "mkfs.ext4", "e2fsck", "debugfs")
	needGuest(t)
	disk := rootDisk(t)
	m := migrate(t, how{rate: 4 * mib}, disk)
	began := time.Now()
	r := command(t, guestTime, filepath.Join(top(), "scripts", "guest"), "--boot", "--time", "240", "--disk", m.uris[0])
	took, arrived := time.Since(began), m.arrived()
	m.streaming("booting a machine from the export and running its workload")
	if r.code != 0 || !strings.Contains(r.stdout, "\nworkload: done\n") {
		t.Fatalf("the guest ended with %d:\n%s%s", r.code, r.stdout, r.stderr)
	}
	all := fileSize(t, disk)
	t.Logf("booted, verified, wrote and ended in %.1f s; %d of %d MiB had crossed the link", took.Seconds(), arrived/mib, all/mib)
	if arrived > all/3 { // the disk has some 300 MiB of data
		t.Errorf("%d of %d bytes had arrived when the guest was done, want less than a third", arrived, all)
	}
	m.link.SetRate(0)
	m.finish()

	must(t, time.Minute, "e2fsck", "-fn", m.copies[0])
	written := filepath.Join(t.TempDir(), "written")
	must(t, time.Minute, "debugfs", "-R", "dump /written "+written, m.copies[0])
	sum := must(t, time.Minute, "debugfs", "-R", "cat /written.sum", m.copies[0])
	if got := fileSum(t, written); fileSize(t, written) != 2*mib || !strings.HasPrefix(sum, got) {
		t.Errorf("the file that the guest wrote has %d bytes and the sum %s, the guest says %s", fileSize(t, written), got, sum)
	}
}

// rootDisk makes a disk of 640 MiB: busybox, a tree of real files, and the sums of some of them.
func rootDisk(t *testing.T) string {
	t.Helper()
	must(t, guestTime, filepath.Join(top(), "scripts", "guest"), "--prepare")
	root := filepath.Join(t.TempDir(), "root")
	for _, dir := range []string{"bin", "sbin", "etc", "dev", "proc", "sys", "tmp", "mnt"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	must(t, time.Minute, "cp", filepath.Join(top(), ".cache", "guest", "current", "busybox"), filepath.Join(root, "bin", "busybox"))
	for _, applet := range strings.Fields("bin/sh bin/mount bin/umount bin/awk bin/sha256sum bin/grep bin/wc bin/dd bin/sync bin/cat sbin/init sbin/poweroff sbin/reboot") {
		if err := os.Symlink("/bin/busybox", filepath.Join(root, applet)); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, filepath.Join(root, "etc", "inittab"), rootInittab)
	writeFile(t, filepath.Join(root, "etc", "rc"), rootScript)
	if err := os.Chmod(filepath.Join(root, "etc", "rc"), 0o755); err != nil {
		t.Fatal(err)
	}
	goroot := strings.TrimSpace(must(t, time.Minute, "go", "env", "GOROOT"))
	if err := os.Mkdir(filepath.Join(root, "tree"), 0o755); err != nil {
		t.Fatal(err)
	}
	must(t, time.Minute, "cp", "-rL", filepath.Join(goroot, "src"), filepath.Join(goroot, "pkg"), filepath.Join(goroot, "bin"), filepath.Join(root, "tree"))
	writeFile(t, filepath.Join(root, "sums"), someSums(t, filepath.Join(root, "tree"), 150))
	disk := filepath.Join(t.TempDir(), "root.raw")
	must(t, time.Minute, "truncate", "-s", "640M", disk)
	must(t, time.Minute, "mkfs.ext4", "-q", "-E", "root_owner=0:0", "-d", root, disk)
	return disk
}

// someSums returns the sums, as sha256sum writes them, of count files from all over the tree.
func someSums(t *testing.T, tree string, count int) string {
	t.Helper()
	files := strings.Split(strings.TrimSpace(must(t, time.Minute, "find", tree, "-type", "f", "-size", "+0")), "\n")
	var sums strings.Builder
	for i := range count {
		path := files[i*len(files)/count]
		fmt.Fprintf(&sums, "%s  %s\n", fileSum(t, path), strings.TrimPrefix(path, tree+"/"))
	}
	return sums.String()
}

// fileSum returns the SHA-256 of a file in hexadecimal.
func fileSum(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}
