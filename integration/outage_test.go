//go:build integration

package integration

import (
	"os/exec"
	"strings"
	"testing"
)

// outageScript kills the source under two mounted file systems, for longer than the 30 s after which the kernel
// begins to look at requests that wait: one over one connection, without a timeout, the other over four, with one
// that is longer than the outage.
const outageScript = `
fail() { echo "FAILED: $*"; cat /tmp/*.log; dmesg | tail -n 20; exit 1; }
begin() {
	silo-nbd source --disk one=/dev/vda --disk four=/dev/vdb --state one=/tmp/state1 --state four=/tmp/state4 \
		--listen unix:///tmp/s --rate 128KiB --control /tmp/c 2>>/tmp/source.log &
	source=$!
}
modprobe nbd && modprobe loop || fail 'no module'
begin
until [ -S /tmp/s ]; do sleep 0.1; done
silo-nbd dest --disk one=/tmp/one.raw --disk four=/tmp/four.raw --connect unix:///tmp/s --nbd unix:///tmp/n >/tmp/ready 2>/tmp/dest.log &
dest=$!
until [ "$(grep -c ^ready /tmp/ready)" = 2 ]; do sleep 0.1; kill -0 $dest || fail 'dest has ended'; done
nbd-client -unix /tmp/n -N one /dev/nbd0 >/tmp/client.log 2>&1 || fail 'nbd-client'
nbd-client -unix /tmp/n -N four -C 4 -t 3600 /dev/nbd1 >>/tmp/client.log 2>&1 || fail 'nbd-client'
mkdir /one /four
mount /dev/nbd0 /one && mount /dev/nbd1 /four || fail mount

writer() { # DIR: records with fsync, until it is told to end
	i=0
	until [ -e /tmp/stop ]; do
		i=$((i + 1))
		echo "record $i" | dd of=$1/records oflag=append conv=notrunc,fsync 2>/dev/null || exit 1
		sleep 0.1
	done
}
writer /one & w1=$!
writer /four & w4=$!
reader() { cd $1 && sha256sum -c sums >/tmp/checked$1 2>&1; }
mkdir /tmp/checked
until [ -s /one/records ] && [ -s /four/records ]; do sleep 0.1; kill -0 $w1 $w4 || fail 'a write failed'; done
kill -9 $source
before=$(cat /one/records /four/records | wc -l)
reader /one & r1=$!
reader /four & r4=$!
sleep 36
kill -0 $w1 $w4 || fail 'a write failed without the source'
kill -0 $r1 $r4 || fail "a read ended without the source: $(grep -hv OK /tmp/checked/*)"
during=$(($(cat /one/records /four/records | wc -l) - before))
[ $during -gt 100 ] || fail "only $during records without the source"
begin
wait $r1 && wait $r4 || fail "$(grep -v OK /tmp/checked/*)"
after=$(cat /one/records /four/records | wc -l)
until [ "$(cat /one/records /four/records | wc -l)" -gt $((after + 10)) ]; do sleep 0.1; kill -0 $w1 $w4 || fail 'a write failed'; done
kill -0 $source || fail 'the transfer had finished before the file systems had been used'
touch /tmp/stop
wait $w1 && wait $w4 || fail 'a write failed'
cat /one/records /four/records | sha256sum >/tmp/sum
umount /one && umount /four || fail umount
for n in 0 1; do
	e2fsck -fn /dev/nbd$n >/tmp/fsck.log 2>&1 || fail fsck
	nbd-client -d /dev/nbd$n >/dev/null || fail 'nbd-client -d'
done
dmesg | grep -E 'I/O error|EXT4-fs error|Remounting|timed out' && fail 'the kernel complains'
echo "$during records written in 36 s without the source, $(cat /tmp/checked/* | wc -l) files read after it, over $(uname -r)"

silo-nbd rate --control /tmp/c 0 || fail rate
wait $source || fail source
kill $dest
wait $dest || fail "dest: $?"
mount -o loop /tmp/one.raw /one && mount -o loop /tmp/four.raw /four || fail 'mount of the copies'
cat /one/records /four/records | sha256sum | cmp - /tmp/sum || fail 'what was written is lost'
for d in /one /four; do reader $d || fail "$(grep -v OK /tmp/checked$d)"; done
echo 'the copies are whole'
`

// TestKernelClientWaitsForTheSource kills the source while nbd-client's devices are mounted in a guest, and starts it
// again: no error, no read-only file system, and writes go on meanwhile.
func TestKernelClientWaitsForTheSource(t *testing.T) {
	need(t, "nbd-client", "mkfs.ext4", "e2fsck")
	needGuest(t)
	options := []string{"--mem", "1024", "--time", "240", "--file", siloNBD(t) + ":/bin/silo-nbd"}
	for range 2 {
		options = append(options, "--disk", kernelDisk(t, "48M", "cmd/compile"))
	}
	for _, tool := range []string{"nbd-client", "e2fsck"} {
		path, err := exec.LookPath(tool)
		if err != nil {
			t.Fatal(err)
		}
		options = append(options, "--file", path+":/bin/"+tool)
	}
	r := guest(t, outageScript, options...)
	if r.code != 0 || !strings.HasSuffix(r.stdout, "the copies are whole\n") {
		t.Fatalf("the guest ended with %d:\n%s%s", r.code, r.stdout, r.stderr)
	}
	t.Log(strings.SplitN(r.stdout, "\n", 2)[0])
}
