//go:build integration

package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// patient bounds a client that reads a whole export over the link.
const patient = 4 * time.Minute

// TestMustShow runs the two commands as the README gives them.
func TestMustShow(t *testing.T) {
	bin := siloNBD(t)
	fastest := time.Hour
	for range 5 { // on a busy machine a process may start late; one quick run shows what the program needs
		dir := socketDir(t)
		a, b := randomImage(t, filepath.Join(dir, "a.raw"), oddSize), filepath.Join(dir, "b.raw")
		source := start(t, "source", bin, "source", "--disk", a, "--listen", "unix://"+dir+"/s.sock")
		waitListening(t, "unix://"+dir+"/s.sock")
		began := time.Now()
		dest := start(t, "dest", bin, "dest", "--disk", b, "--connect", "unix://"+dir+"/s.sock", "--nbd", "unix://"+dir+"/n.sock", "--exit-when-complete")
		line := dest.line("ready ", soon)
		fastest = min(fastest, time.Since(began))
		if want := "ready a nbd+unix:///a?socket=" + dir + "/n.sock"; line != want {
			t.Errorf("dest printed %q, want %q", line, want)
		}
		source.succeeds(soon)
		dest.succeeds(soon)
		sameBytes(t, a, b)
	}
	t.Logf("ready %v after dest was started", fastest.Round(time.Millisecond))
	if fastest > 100*time.Millisecond {
		t.Errorf("the export was ready %v after dest was started, want 100 ms", fastest)
	}
}

func TestCopyOfTheExportEqualsTheSource(t *testing.T) {
	need(t, "nbdinfo", "nbdcopy", "e2fsck")
	tree := treeImage(t)
	m := migrate(t, how{}, tree)
	var info struct {
		Exports []struct {
			Size int64 `json:"export-size"`
		} `json:"exports"`
	}
	if err := json.Unmarshal([]byte(must(t, soon, "nbdinfo", "--json", m.uris[0])), &info); err != nil {
		t.Fatal(err)
	}
	if size := fileSize(t, tree); len(info.Exports) != 1 || info.Exports[0].Size != size {
		t.Errorf("nbdinfo says %+v, want one export of %d bytes", info.Exports, size)
	}
	for _, can := range []string{"write", "flush", "fua", "trim", "zero", "fast-zero", "df", "multi-conn", "cache", "structured-reply"} {
		must(t, soon, "nbdinfo", "--can", can, m.uris[0]) // also what depends on the disk: files can punch holes
	}
	m.streaming("nbdinfo")

	// The copy reads every block, so the transfer ends with it at the latest. That nothing like all was there when it
	// began is what counts: the link has carried little by then.
	if got, all := m.arrived(), fileSize(t, tree); got > all/4 {
		t.Errorf("%d of %d bytes had arrived before the copy began", got, all)
	}
	copied := filepath.Join(t.TempDir(), "nbdcopy.raw")
	m.streaming("attaching nbdcopy")
	must(t, patient, "nbdcopy", m.uris[0], copied)
	sameBytes(t, tree, copied)
	m.finish()

	sameBytes(t, tree, m.copies[0])
	must(t, time.Minute, "e2fsck", "-fn", m.copies[0])
	must(t, time.Minute, siloNBD(t), "verify", tree, m.copies[0])
}

func TestQemuImgComparesEqualWhileItStreams(t *testing.T) {
	need(t, "qemu-img")
	disk := randomImage(t, filepath.Join(t.TempDir(), "odd.raw"), oddSize)
	m := migrate(t, how{rate: 8 * mib}, disk)
	m.streaming("attaching qemu-img")
	must(t, patient, "qemu-img", "compare", "-f", "raw", "-F", "raw", disk, m.uris[0])
	m.finish()
	sameBytes(t, disk, m.copies[0])
}

func TestQemuIOWritesSurviveTheArrivalOfTheirBlocks(t *testing.T) {
	need(t, "qemu-io")
	disk := randomImage(t, filepath.Join(t.TempDir(), "odd.raw"), oddSize)
	m := migrate(t, how{rate: 4 * mib}, disk)
	writes := []patch{
		pattern(0x11, 60*mib, 64*kib),            // a whole block
		pattern(0x22, 60*mib+64*kib+512, 512),    // one sector of a block
		pattern(0x33, 59*mib+1000, 3000),         // edges inside sectors
		pattern(0x44, 58*mib-70*kib, 200*kib),    // several blocks and parts of two more
		pattern(0x00, 57*mib, mib/2),             // zeroes, by WRITE_ZEROES below
		pattern(0x55, oddSize/512*512-4096, 512), // in the last block, which is short
		pattern(0x66, 60*mib+4*kib, 512),         // over the first once more
	}
	args := []string{"-f", "raw", "-t", "writeback"}
	for _, w := range writes {
		if w.data[0] == 0 {
			args = append(args, "-c", fmt.Sprintf("write -z %d %d", w.off, len(w.data)))
			continue
		}
		args = append(args, "-c", fmt.Sprintf("write -P %#x %d %d", w.data[0], w.off, len(w.data)))
	}
	args = append(args, "-c", "flush")
	for _, w := range writes[1:] { // the first is partly overwritten
		args = append(args, "-c", fmt.Sprintf("read -P %#x %d %d", w.data[0], w.off, len(w.data)))
	}
	r := command(t, soon, "qemu-io", append(args, m.uris[0])...)
	if r.code != 0 || strings.Contains(r.stdout+r.stderr, "failed") {
		t.Fatalf("qemu-io: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	m.streaming("writes and reads by qemu-io")
	m.link.SetRate(0)
	m.finish()
	if err := compareFiles(disk, m.copies[0], writes); err != nil {
		t.Error(err)
	}
}

func TestFioVerifiesWhileItStreams(t *testing.T) {
	need(t, "fio")
	disk := randomImage(t, filepath.Join(t.TempDir(), "fio.raw"), 96*mib)
	m := migrate(t, how{rate: 4 * mib, stay: true}, disk)
	const from, size = 64 * mib, 8 * mib // a part that the stream, which runs in order, has not reached
	fio := func(name string, more ...string) {
		t.Helper()
		args := append([]string{
			"--name=" + name, "--ioengine=nbd", "--uri=" + m.uris[0], fmt.Sprintf("--offset=%d", from), fmt.Sprintf("--size=%d", size),
			"--verify=crc32c", "--verify_fatal=1", "--iodepth=16", "--bsrange=512-128k", "--bs_unaligned=0", "--randseed=7",
			"--rw=randwrite", "--fallocate=none", "--verify_state_save=0",
		}, more...)
		must(t, patient, "fio", args...)
	}
	must(t, patient, "fio", "--name=mixed", "--ioengine=nbd", "--uri="+m.uris[0], fmt.Sprintf("--offset=%d", from),
		fmt.Sprintf("--size=%d", size), "--rw=randrw", "--bs=4k", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--io_size=4m", "--fallocate=none", "--verify_state_save=0")
	m.streaming("random reads and writes by fio")
	fio("write-and-verify", "--do_verify=1")
	m.streaming("writes of all sizes and their verification by fio")

	m.link.SetRate(0)
	m.source.succeeds(patient)
	fio("verify-again", "--verify_only") // every block of it has arrived from the source meanwhile, or was dropped
	m.dest.signal(os.Interrupt)
	m.dest.succeeds(soon)

	written := patch{off: from, data: make([]byte, size)}
	f, err := os.Open(m.copies[0])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(written.data, from); err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(written.data, make([]byte, size)) {
		t.Error("what fio wrote is all zeroes")
	}
	if err := compareFiles(disk, m.copies[0], []patch{written}); err != nil {
		t.Errorf("outside of what fio wrote: %v", err)
	}
}

// arrived is how many bytes the link has carried to the destination.
func (m *migration) arrived() int64 {
	to, from := m.link.Bytes()
	return max(to, from)
}

func fileSize(t *testing.T, path string) int64 {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Size()
}
