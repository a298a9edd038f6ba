//go:build integration

package integration

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// refused runs a command that has to fail, and wants each of the words in what it says.
func refused(t *testing.T, code int, cmd []string, words ...string) {
	t.Helper()
	r := command(t, soon, cmd[0], cmd[1:]...)
	if r.code != code {
		t.Errorf("%v: exit code %d, want %d:\n%s%s", cmd, r.code, code, r.stdout, r.stderr)
	}
	for _, w := range words {
		if !strings.Contains(r.stderr+r.stdout, w) {
			t.Errorf("%v: it does not say %q:\n%s%s", cmd, w, r.stdout, r.stderr)
		}
	}
}

// hold starts a program of QEMU that has the image open, and waits until it has. Its end lets go of it.
func hold(t *testing.T, image string, args ...string) *process {
	t.Helper()
	p := start(t, "holder", args[0], args[1:]...)
	eventually(t, soon, args[0]+" has locked the image", func() bool {
		infos, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", p.cmd.Process.Pid)) // a good pattern
		for _, i := range infos {
			b, _ := os.ReadFile(i) // it may be closed just now
			if strings.Contains(string(b), "OFDLCK") {
				return true
			}
		}
		return false
	})
	return p
}

// qemuNBD serves an image, to be written by those who attach.
func qemuNBD(t *testing.T, image string, args ...string) *process {
	return hold(t, image, append([]string{"qemu-nbd", "-f", "raw", "--persistent", "-k", filepath.Join(socketDir(t), "s"), image}, args...)...)
}

func sourceOf(t *testing.T, disk string, args ...string) []string {
	return append([]string{siloNBD(t), "source", "--disk", disk, "--listen", address(t, false)}, args...)
}

func destOf(t *testing.T, disk string, args ...string) []string {
	return append([]string{siloNBD(t), "dest", "--disk", disk, "--listen", address(t, false), "--nbd", address(t, false)}, args...)
}

// TestImageThatQEMUWritesIsRefused, and nothing of it is touched; also by another name of it, and as a device (trap I13, fault F9, fault H1).
func TestImageThatQEMUWritesIsRefused(t *testing.T) {
	need(t, "qemu-nbd", "losetup")
	needRoot(t)
	dir := t.TempDir()
	image := randomImage(t, filepath.Join(dir, "vm.raw"), 4*mib)
	link := filepath.Join(dir, "link.raw")
	if err := os.Symlink("vm.raw", link); err != nil {
		t.Fatal(err)
	}
	before := sum(t, image)
	check := func(names ...string) {
		t.Helper()
		for _, disk := range names {
			who := []string{"in use by process ", "(qemu-nbd)", "stop that one first"}
			refused(t, 1, sourceOf(t, disk, "--state", filepath.Join(dir, "s")), who...)
			refused(t, 1, sourceOf(t, disk, "--state", filepath.Join(dir, "s"), "--nbd", address(t, false), "--control", filepath.Join(socketDir(t), "c")), who...)
			refused(t, 1, destOf(t, disk, "--overwrite", "--map", filepath.Join(dir, "m")), who...)
		}
	}
	p := qemuNBD(t, image)
	check(image, link)
	p.signal(os.Interrupt)
	p.wait(soon)

	device := loopDevice(t, image)
	qemuNBD(t, device)
	check(device)
	alias := filepath.Join(dir, "alias")
	must(t, soon, "sh", "-c", fmt.Sprintf("mknod %s b $(stat -c '0x%%t 0x%%T' %s)", alias, device))
	refused(t, 1, sourceOf(t, alias, "--state", filepath.Join(dir, "s")), "in use: process ", "(qemu-nbd) has it open for writing")
	if exists(filepath.Join(dir, "s")) || exists(filepath.Join(dir, "m")) || exists(image+".silo-nbd-source") {
		t.Error("something was made beside the disk that was refused")
	}
	if sum(t, image) != before {
		t.Error("the image has changed")
	}
}

func sum(t *testing.T, path string) string {
	t.Helper()
	return strings.Fields(must(t, patient, "sha256sum", path))[0]
}

// TestQEMURefusesADiskThatIsSent: it may read a frozen one and write none (trap I13).
func TestQEMURefusesADiskThatIsSent(t *testing.T) {
	need(t, "qemu-io", "qemu-img", "qemu-nbd")
	image := randomImage(t, filepath.Join(t.TempDir(), "vm.raw"), 4*mib)
	write := []string{"qemu-io", "-f", "raw", "-c", "write 0 4k", image}
	read := []string{"qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", image}
	readAnyhow := []string{"qemu-io", "-r", "-U", "-f", "raw", "-c", "read 0 4k", image}

	frozen := sourceOf(t, image)
	p := start(t, "source", frozen[0], frozen[1:]...)
	waitListening(t, frozen[len(frozen)-1])
	refused(t, 1, write, `"write" lock`)
	refused(t, 1, []string{"qemu-nbd", "-f", "raw", "-k", filepath.Join(socketDir(t), "s"), image}, "lock")
	must(t, soon, read[0], read[1:]...)
	must(t, soon, readAnyhow[0], readAnyhow[1:]...)
	must(t, soon, "qemu-img", "convert", "-O", "qcow2", image, filepath.Join(t.TempDir(), "copy.qcow2"))
	must(t, soon, siloNBD(t), "verify", image, image)
	p.signal(os.Interrupt)
	p.wait(soon)

	nbd := address(t, false)
	live := sourceOf(t, image, "--nbd", nbd, "--control", filepath.Join(socketDir(t), "c"))
	p = start(t, "source --nbd", live[0], live[1:]...)
	readyURI(p, "vm")
	refused(t, 1, write, `"write" lock`)
	refused(t, 1, []string{"qemu-img", "convert", "-f", "raw", "-O", "raw", image, image + ".copy"}, `"write" lock`)
	must(t, soon, readAnyhow[0], readAnyhow[1:]...)
	must(t, soon, siloNBD(t), "verify", image, "nbd+unix:///vm?socket="+strings.TrimPrefix(nbd, "unix://"))
	p.signal(os.Interrupt)
	p.wait(soon)
	must(t, soon, write[0], write[1:]...)
}

// TestQEMURefusesHalfADisk, also one that it would only read and was told to read all the same; when it is complete it may be read (trap I13, fault H1).
func TestQEMURefusesHalfADisk(t *testing.T) {
	need(t, "qemu-io", "qemu-img")
	disk := randomImage(t, filepath.Join(t.TempDir(), "odd.raw"), oddSize)
	m := migrate(t, how{rate: mib, stay: true}, disk)
	half := m.copies[0]
	for _, flags := range [][]string{{}, {"-r"}, {"-r", "-U"}} {
		refused(t, 1, append(append([]string{"qemu-io", "-f", "raw"}, flags...), "-c", "read 0 4k", half), "lock")
	}
	refused(t, 1, []string{"qemu-img", "convert", "-f", "raw", "-O", "raw", half, half + ".copy"}, "lock")
	must(t, soon, siloNBD(t), "inspect", half)
	refused(t, 1, sourceOf(t, half), "in use by process", "(silo-nbd)")
	m.streaming("reading half of it")
	m.link.SetRate(0)
	m.source.succeeds(patient)
	must(t, soon, "qemu-io", "-r", "-U", "-f", "raw", "-c", "read 0 4k", half)
	must(t, soon, siloNBD(t), "verify", disk, half)
	refused(t, 1, []string{"qemu-io", "-f", "raw", "-c", "write 0 4k", half}, "lock")
}

// TestTwoOfOursReadOneDisk: what is only read is locked against those who write, and not against each other.
func TestTwoOfOursReadOneDisk(t *testing.T) {
	image := randomImage(t, filepath.Join(t.TempDir(), "vm.raw"), 4*mib)
	for i := range 2 {
		s := sourceOf(t, image, "--state", filepath.Join(t.TempDir(), "s"))
		start(t, fmt.Sprint("source ", i), s[0], s[1:]...)
		waitListening(t, s[len(s)-3])
	}
	must(t, soon, siloNBD(t), "verify", image, image)
	refused(t, 1, destOf(t, image, "--overwrite"), "in use by process", "(silo-nbd)")
}

// TestDeviceInUseIsRefusedAlsoForReading names who uses it; --shared takes it all the same, and says so (fault A9, fault H1).
func TestDeviceInUseIsRefusedAlsoForReading(t *testing.T) {
	need(t, "losetup", "mkfs.ext4")
	needRoot(t)
	dir := t.TempDir()
	image := filepath.Join(dir, "vm.raw")
	if err := os.WriteFile(image, make([]byte, 8*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, soon, "mkfs.ext4", "-q", image)
	device := loopDevice(t, image)
	alias := filepath.Join(dir, "alias")
	must(t, soon, "sh", "-c", fmt.Sprintf("mknod %s b $(stat -c '0x%%t 0x%%T' %s)", alias, device))
	state := []string{"--state", filepath.Join(dir, "s")}

	refused(t, 1, sourceOf(t, image, "--handoff", "auto", "--nbd", address(t, false)), "in use: it is the file behind "+device)
	at := filepath.Join(dir, "mnt")
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	must(t, soon, "mount", device, at)
	for _, name := range []string{device, alias} {
		refused(t, 1, sourceOf(t, name, state...), "in use: it is mounted at "+at)
		refused(t, 1, destOf(t, name, "--overwrite", "--map", filepath.Join(dir, "m")), "in use: it is mounted at "+at)
	}
	refused(t, 1, sourceOf(t, image), "in use: it is the file behind "+device+", and it is mounted at "+at)
	for i, name := range []string{device, image} {
		s := sourceOf(t, name, "--shared", "--state", filepath.Join(dir, fmt.Sprint("shared", i)))
		p := start(t, "source --shared", s[0], s[1:]...)
		eventually(t, soon, "it warns", func() bool { return strings.Contains(p.stderr.String(), "it is mounted at "+at) })
		waitListening(t, s[5])
		p.signal(os.Interrupt)
		p.wait(soon)
	}
	must(t, soon, "umount", at)

	s := sourceOf(t, device, state...)
	p := start(t, "source", s[0], s[1:]...)
	waitListening(t, s[len(s)-3])
	refused(t, 32, []string{"mount", device, at}, "busy")
	p.signal(os.Interrupt)
	p.wait(soon)
}

// TestPartitionInUseMakesItsDiskRefused, and the other way round (fault H1).
func TestPartitionInUseMakesItsDiskRefused(t *testing.T) {
	need(t, "losetup", "mkfs.ext4", "partx")
	needRoot(t)
	dir := t.TempDir()
	image := filepath.Join(dir, "vm.raw")
	content := make([]byte, 16*mib)
	entry := content[446:] // of the MBR: Linux, from sector 2048 on
	entry[4] = 0x83
	binary.LittleEndian.PutUint32(entry[8:], 2048)
	binary.LittleEndian.PutUint32(entry[12:], 8*mib/512)
	content[510], content[511] = 0x55, 0xaa
	if err := os.WriteFile(image, content, 0o600); err != nil {
		t.Fatal(err)
	}
	device := loopDevice(t, image, "--partscan")
	part := device + "p1"
	if !exists(part) { // a kernel that reads no such tables is told of the partition
		must(t, soon, "partx", "--add", device)
	}
	if !exists(part) { // no devtmpfs
		lacking(t, "no %s after losetup --partscan and partx", part)
	}
	must(t, soon, "mkfs.ext4", "-q", part)
	at := filepath.Join(dir, "mnt")
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	must(t, soon, "mount", part, at)
	state := []string{"--state", filepath.Join(dir, "s")}
	refused(t, 1, sourceOf(t, device, state...), "in use: it is mounted at "+at)
	must(t, soon, "umount", at)
	whole, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer whole.Close()
	refused(t, 1, sourceOf(t, part, state...), "in use: process ", "has it open for writing")
}
