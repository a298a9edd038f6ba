//go:build integration

package integration

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// busyScript makes, moves, removes and flushes files in two file systems until the host says stop, on a third disk.
// What it knows of them is kept in memory, and held against the file systems when they have been mounted anew.
const busyScript = `
fail() { echo "FAILED: $*"; cat /tmp/*.log; dmesg | tail -n 20; exit 1; }
told() { blockdev --flushbufs /dev/vdc && [ "$(dd if=/dev/vdc bs=4 count=1 2>/dev/null)" = stop ]; }
mkdir /one /two /tmp/one /tmp/two
mount /dev/vda /one && mount /dev/vdb /two || fail mount

work() { # NAME: files of 4 to 36 KiB in 8 directories, of which every second one stays, and a file of records
	i=0
	until [ -e /tmp/stop ]; do
		i=$((i + 1))
		dir=/$1/d$((i % 8))
		mkdir -p $dir
		dd if=/dev/urandom of=$dir/new bs=4k count=$((i % 9 + 1)) conv=fsync 2>/tmp/$1/dd.log || exit 1
		sha256sum <$dir/new >/tmp/$1/f$i
		mv $dir/new $dir/f$i || exit 1
		old=$((i - 40))
		if [ $old -gt 0 ] && [ $((old % 2)) = 0 ]; then
			rm /$1/d$((old % 8))/f$old || exit 1
			rm /tmp/$1/f$old
		fi
		echo "record $i" | dd of=/$1/records oflag=append conv=notrunc,fsync 2>/tmp/$1/dd.log || exit 1
		echo $i >/tmp/$1/last
	done
}
work one & w1=$!
work two & w2=$!
until [ "$(cat /tmp/one/last 2>/dev/null)" -gt 20 ] 2>/dev/null; do sleep 0.1; kill -0 $w1 || fail 'a file system failed'; done
echo busy
until told; do sleep 0.2; kill -0 $w1 && kill -0 $w2 || fail "a file system failed: $(cat /tmp/one/dd.log /tmp/two/dd.log)"; done
touch /tmp/stop
wait $w1 && wait $w2 || fail 'a file system failed'

umount /one && umount /two || fail umount
echo 3 >/proc/sys/vm/drop_caches
mount /dev/vda /one && mount /dev/vdb /two || fail 'the second mount'
for name in one two; do
	last=$(cat /tmp/$name/last)
	seq 1 $last | sed 's/^/record /' | cmp - /$name/records || fail "the records of $name"
	[ "$(ls -d /$name/d*/* | wc -l)" = "$(ls /tmp/$name/f* | wc -l)" ] || fail "$name has other files: $(ls /$name/d*) and not $(ls /tmp/$name)"
	for f in /tmp/$name/f*; do
		n=${f##*/f}
		sha256sum </$name/d$((n % 8))/f$n | cmp - $f || fail "file $n of $name"
	done
	(cd /$name && sha256sum -c sums) >/tmp/checked.log 2>&1 || fail "the old files of $name"
	echo "$name: $last files written"
done
umount /one && umount /two || fail 'the second umount'
dmesg | grep -E 'I/O error|EXT4-fs (error|warning)|Remounting' && fail 'the kernel complains'
echo 'all is there'
`

// TestFileSystemsInUseAreCleanAfterAHandoff hands off two disks under the kernel of a virtual machine that changes a file
// system on each, with requests in flight in the handoff: nothing that was flushed is lost, before or after it, and
// fsck finds nothing.
func TestFileSystemsInUseAreCleanAfterAHandoff(t *testing.T) {
	need(t, "mkfs.ext4", "e2fsck")
	needGuest(t)
	m := moveLive(t, []string{kernelDisk(t, "64M", "cmd/asm"), kernelDisk(t, "64M", "cmd/link")}, "--block-size", "4KiB")
	stop := filepath.Join(t.TempDir(), "stop")
	writeFile(t, stop, strings.Repeat("\x00", 4096))
	script := filepath.Join(t.TempDir(), "workload")
	writeFile(t, script, busyScript)
	vm := start(t, "guest", filepath.Join(top(), "scripts", "guest"), "--time", "280",
		"--disk", m.relayed[0], "--disk", m.relayed[1], "--disk", stop, script)
	vm.line("busy", guestTime)
	// All of it has been copied by now; what changes is ahead of the link.
	must(t, soon, siloNBD(t), "rate", "--control", m.control, "128KiB")
	time.Sleep(time.Second + rand.N(3*time.Second))
	must(t, soon, siloNBD(t), "handoff", "--control", m.control)
	for _, r := range m.relays {
		moved := r.after.Load()
		eventually(t, guestTime, "the guest writes at the destination", func() bool { return r.after.Load() > moved+200 })
	}
	writeFile(t, stop, "stop"+strings.Repeat("\x00", 4092))
	if code := vm.wait(guestTime); code != 0 || !strings.HasSuffix(vm.stdout.String(), "all is there\n") {
		t.Fatalf("the guest ended with %d", code)
	}
	for i, r := range m.relays {
		t.Logf("disk %d: %d requests at the source, %d refused there in the handoff, %d at the destination", i, r.before.Load(), r.refused.Load(), r.after.Load())
		if r.before.Load() < 100 || r.refused.Load() == 0 {
			t.Error("the guest did not use both exports")
		}
	}
	t.Log(vm.stdout.String())
	m.source.succeeds(patient)
	m.dest.signal(os.Interrupt)
	m.dest.succeeds(soon)
	for _, copied := range m.copies {
		must(t, time.Minute, "e2fsck", "-fn", copied)
	}
}
