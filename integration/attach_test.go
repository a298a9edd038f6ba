//go:build integration

package integration

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// attachScript uses our own attachment: two disks that are hardly there yet, refusals, a dest that dies under a
// mounted file system and comes back, and the end.
const attachScript = `
fail() { echo "FAILED: $*"; cat /tmp/*.log; dmesg | tail -n 20; exit 1; }
dest() {
	: >/tmp/ready # before the other process does: what the last dest has said would be taken for this one's word
	silo-nbd dest --disk disk=/tmp/copy.raw --disk empty=/tmp/empty.raw --connect unix:///tmp/s --nbd unix:///tmp/n >/tmp/ready 2>>/tmp/dest.log &
	dest=$!
	until [ "$(grep -c ^ready /tmp/ready)" = 2 ]; do sleep 0.1; kill -0 $dest || fail 'dest has ended'; done
}
refused() { # WORDS COMMAND...
	words=$1; shift
	"$@" >/tmp/out 2>/tmp/err && fail "not refused: $*"
	grep -q "^silo-nbd: .*$words" /tmp/err && [ "$(wc -l </tmp/err)" = 1 ] || fail "$* said: $(cat /tmp/err), not: $words"
}
says() { # WORDS COMMAND...
	words=$1; shift
	"$@" >/tmp/out 2>/tmp/err || fail "$*: $(cat /tmp/err)"
	[ "$(cat /tmp/out)" = "$words" ] || fail "$* said: $(cat /tmp/out), not: $words"
}
silo-nbd source --disk disk=/dev/vda --disk empty=/dev/vdb --state disk=/tmp/state --state empty=/tmp/state2 \
	--listen unix:///tmp/s --rate 128KiB --control /tmp/c 2>/tmp/source.log &
source=$!
until [ -S /tmp/s ]; do sleep 0.1; done
dest
disk=$(sed -n 's/^ready disk //p' /tmp/ready)
empty=$(sed -n 's/^ready empty //p' /tmp/ready)
refused 'modprobe nbd' silo-nbd attach "$disk"
modprobe nbd && modprobe loop || fail 'no module'
refused 'is not attached' silo-nbd detach /dev/nbd0

says 'attached /dev/nbd0' silo-nbd attach "$disk"
says 'attached /dev/nbd1' silo-nbd attach "$empty" --connections 2 --timeout 1h
[ "$(cat /sys/block/nbd0/size)" = "$(cat /sys/block/vda/size)" ] || fail 'another size'
refused 'nbd0 is attached to nbd+unix:///disk.*detach /dev/nbd0' silo-nbd attach "$empty" --device /dev/nbd0
block() { [ "$(cat /sys/block/nbd1/queue/logical_block_size)" = "$1" ] || fail "not blocks of $1: $(cat /sys/block/nbd1/queue/logical_block_size)"; }
block 512
printf 'EFI PART' | dd of=/dev/nbd1 bs=4096 seek=1 conv=fsync 2>/dev/null || fail 'a partition table'
says '' silo-nbd detach /dev/nbd1
says 'attached /dev/nbd1' silo-nbd attach "$empty" --device /dev/nbd1
block 4096
says '' silo-nbd detach /dev/nbd1
says 'attached /dev/nbd1' silo-nbd attach "$empty" --device /dev/nbd1 --block-size 512
block 512
mkdir /m /e
mkfs.ext4 -q /dev/nbd1 || fail mkfs
mount /dev/nbd1 /e && echo hello >/e/file && sync && umount /e || fail 'the new file system'
e2fsck -fn /dev/nbd1 >/tmp/fsck.log 2>&1 || fail 'fsck of the new file system'

mount /dev/nbd0 /m || fail mount
refused 'nbd0 is attached to this export already, and in use' silo-nbd attach "$disk"
refused 'nbd0 is mounted at /m' silo-nbd detach /dev/nbd0
cd /m
sha256sum -c sums >/tmp/checked 2>&1 || fail "$(grep -v OK /tmp/checked)"
dd if=/dev/urandom of=written bs=64k count=16 conv=fsync 2>/dev/null || fail write

kill -9 $dest
dd if=/dev/urandom of=later bs=64k count=16 conv=fsync 2>/tmp/dd.log &
writer=$!
cd / # or dest would hold the file system
dest
cd /m
kill -0 $writer || fail 'a write has ended while nobody served'
says 'attached /dev/nbd0' silo-nbd attach "$disk" --device /dev/nbd0
wait $writer || fail 'a write under way when dest died'
says 'attached /dev/nbd1' silo-nbd attach "$empty" # in place of what its predecessor has left
echo 3 >/proc/sys/vm/drop_caches
sha256sum -c sums >/tmp/checked 2>&1 || fail "after dest came back: $(grep -v OK /tmp/checked)"
sum=$(cat written later | sha256sum)
kill -0 $source || fail 'the transfer had finished before the file system had been used'
cd /
umount /m || fail umount
e2fsck -fn /dev/nbd0 >/tmp/fsck.log 2>&1 || fail fsck
sleep 1000 </dev/nbd0 &
reader=$!
refused 'nbd0 is open in process' silo-nbd detach /dev/nbd0
kill $reader; wait $reader
says '' silo-nbd detach /dev/nbd0
says '' silo-nbd detach nbd1
refused 'is not attached' silo-nbd detach /dev/nbd0
echo "used through $(uname -r): $(wc -l </tmp/checked) files verified before and after dest died"

silo-nbd rate --control /tmp/c 0 || fail rate
wait $source || fail source
kill $dest
wait $dest || fail "dest: $?"
mount -o loop /tmp/copy.raw /m || fail 'mount of the copy'
cd /m
sha256sum -c sums >/tmp/checked 2>&1 || fail "$(grep -v OK /tmp/checked)"
[ "$(cat written later | sha256sum)" = "$sum" ] || fail 'what was written is lost'
cd / && umount /m
mount -o loop /tmp/empty.raw /e && [ "$(cat /e/file)" = hello ] || fail 'the new file system'
dmesg | grep -E 'I/O error|EXT4-fs error|Remounting' && fail 'the kernel complains'
echo 'the copy is whole'
`

// TestAttachedDiskOutlivesDest attaches with silo-nbd attach, in a guest. A disk whose partition table was made for blocks of
// 4096 bytes gets those (fault H7).
func TestAttachedDiskOutlivesDest(t *testing.T) {
	need(t, "mkfs.ext4", "e2fsck")
	needGuest(t)
	empty := filepath.Join(t.TempDir(), "empty.raw")
	must(t, time.Minute, "truncate", "-s", "16M", empty)
	options := []string{"--mem", "1024", "--time", "240", "--disk", kernelDisk(t, "64M", "cmd/compile"), "--disk", empty, "--file", siloNBD(t) + ":/bin/silo-nbd"}
	for _, tool := range []string{"mkfs.ext4", "e2fsck"} {
		path, err := exec.LookPath(tool)
		if err != nil {
			t.Fatal(err)
		}
		options = append(options, "--file", path+":/bin/"+tool)
	}
	r := guest(t, attachScript, options...)
	if r.code != 0 || !strings.HasSuffix(r.stdout, "the copy is whole\n") {
		t.Fatalf("the guest ended with %d:\n%s%s", r.code, r.stdout, r.stderr)
	}
	t.Log(strings.SplitN(r.stdout, "\n", 2)[0])
}

// kernelDisk makes a disk with an ext4 file system that holds a directory of Go's sources, and the sums of some of
// its files in the file sums.
func kernelDisk(t *testing.T, size, sources string) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "root")
	goroot := strings.TrimSpace(must(t, time.Minute, "go", "env", "GOROOT"))
	must(t, time.Minute, "cp", "-rL", filepath.Join(goroot, "src", sources), root)
	writeFile(t, filepath.Join(root, "sums"), someSums(t, root, 60))
	disk := filepath.Join(t.TempDir(), "disk.raw")
	must(t, time.Minute, "truncate", "-s", size, disk)
	must(t, time.Minute, "mkfs.ext4", "-q", "-d", root, disk)
	return disk
}
