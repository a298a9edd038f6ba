//go:build integration

package integration

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// kernelScript moves a block device within the guest and mounts it through the kernel's own NBD client while it moves.
const kernelScript = `
fail() { echo "FAILED: $*"; cat /tmp/*.log; exit 1; }
modprobe nbd && modprobe loop || fail 'no module'
silo-nbd source --disk disk=/dev/vda --state /tmp/state --listen unix:///tmp/s --rate 3MiB 2>/tmp/source.log &
source=$!
until [ -S /tmp/s ]; do sleep 0.1; kill -0 $source || fail 'source has ended'; done
silo-nbd dest --disk /tmp/copy.raw --connect unix:///tmp/s --nbd unix:///tmp/n >/tmp/ready 2>/tmp/dest.log &
dest=$!
until grep -q ^ready /tmp/ready; do sleep 0.1; kill -0 $dest || fail 'dest has ended'; done

nbd-client -unix /tmp/n -N disk -C 4 /dev/nbd0 >/tmp/client.log 2>&1 || fail 'nbd-client'
mkdir /m
mount /dev/nbd0 /m || fail mount
cd /m
sha256sum -c sums >/tmp/checked 2>&1 || fail "$(grep -v OK /tmp/checked)"
dd if=/dev/urandom of=written bs=64k count=16 conv=fsync 2>/dev/null || fail write
sum=$(sha256sum <written)
kill -0 $source || fail 'the transfer had finished before the file system had been used'
cd /
umount /m || fail umount
nbd-client -d /dev/nbd0 >/dev/null || fail 'nbd-client -d'
echo "used through $(uname -r): verified $(wc -l </tmp/checked) files while it moved"

wait $source || fail 'source'
kill $dest
wait $dest || fail "dest: $?"
mount -o loop /tmp/copy.raw /m || fail 'mount of the copy'
cd /m
sha256sum -c sums >/tmp/checked 2>&1 || fail "$(grep -v OK /tmp/checked)"
[ "$(sha256sum <written)" = "$sum" ] || fail 'what was written is lost'
cd / && umount /m
dmesg | grep -E 'nbd0.*(error|timed out)|EXT4-fs error' && fail 'the kernel complains'
echo 'the copy is whole'
`

// TestKernelMountsAMovingDisk uses the kernel's NBD client over four connections, in a guest: source, destination and
// client run there together.
func TestKernelMountsAMovingDisk(t *testing.T) {
	need(t, "nbd-client", "mkfs.ext4")
	needGuest(t)
	client, err := exec.LookPath("nbd-client")
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(t.TempDir(), "root")
	goroot := strings.TrimSpace(must(t, time.Minute, "go", "env", "GOROOT"))
	must(t, time.Minute, "cp", "-rL", filepath.Join(goroot, "src", "cmd"), root)
	writeFile(t, filepath.Join(root, "sums"), someSums(t, root, 60))
	disk := filepath.Join(t.TempDir(), "disk.raw")
	must(t, time.Minute, "truncate", "-s", "160M", disk)
	must(t, time.Minute, "mkfs.ext4", "-q", "-d", root, disk)
	r := guest(t, kernelScript, "--mem", "1024", "--time", "240", "--disk", disk,
		"--file", siloNBD(t)+":/bin/silo-nbd", "--file", client+":/bin/nbd-client")
	if r.code != 0 || !strings.HasSuffix(r.stdout, "the copy is whole\n") {
		t.Fatalf("the guest ended with %d:\n%s%s", r.code, r.stdout, r.stderr)
	}
	t.Log(strings.SplitN(r.stdout, "\n", 2)[0])
}
