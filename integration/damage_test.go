//go:build integration

package integration

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"testing"
)

// halfMoved is a disk of which a part was received when both programs were killed.
func halfMoved(t *testing.T) (m *migration, mapPath string) {
	t.Helper()
	disk := randomImage(t, filepath.Join(t.TempDir(), "disk.raw"), 4*mib)
	m = migrate(t, how{rate: mib / 4, stay: true}, disk)
	must(t, soon, "qemu-io", "-f", "raw", "-c", "write -P 7 3M 4k", "-c", "flush", m.uris[0])
	m.streaming("the write")
	m.dest.signal(os.Kill)
	m.source.signal(os.Kill)
	m.dest.wait(soon)
	m.source.wait(soon)
	return m, m.copies[0] + ".silo-nbd"
}

// TestD7DamagedMapIsRefusedByTheCommand spoils the map of a disk in every way, and starts dest, inspect and source on
// it: each says in one line what is wrong with which file, and changes nothing.
func TestD7DamagedMapIsRefusedByTheCommand(t *testing.T) {
	need(t, "qemu-io")
	m, where := halfMoved(t)
	good, err := os.ReadFile(where)
	if err != nil {
		t.Fatal(err)
	}
	disk, err := os.ReadFile(m.copies[0])
	if err != nil {
		t.Fatal(err)
	}
	const slot, crcAt = 4096, 4092
	refused := func(what, say string, spoiled []byte) {
		t.Helper()
		if err := os.WriteFile(where, spoiled, 0o600); err != nil {
			t.Fatal(err)
		}
		listen := address(t, false)
		for _, args := range [][]string{
			{"dest", "--disk", "disk0=" + m.copies[0], "--connect", listen, "--nbd", address(t, false)},
			{"inspect", m.copies[0]},
			{"source", "--disk", m.copies[0], "--listen", listen},
		} {
			complains(t, command(t, soon, siloNBD(t), args...), 1, where, say)
			if t.Failed() {
				t.Fatalf("%s: %s", what, args[0])
			}
		}
		for path, want := range map[string][]byte{where: spoiled, m.copies[0]: disk} {
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%s: %s was touched (%v)", what, path, err)
			}
		}
	}
	for at := 0; at < slot; at += 1 + at/16 { // all that has a meaning, and some of the rest
		b := bytes.Clone(good)
		b[at] ^= 0x21
		b[slot+at] ^= 0x21
		say := "is a damaged map"
		if at < 8 {
			say = "is not a map"
		}
		refused(fmt.Sprintf("byte %d", at), say, b)
	}
	for _, n := range []int{0, 7, 100, slot, 2*slot - 1, len(good) - 1, len(good) + 1} {
		say := "is a damaged map"
		if n == 0 {
			say = "is not a map"
		}
		refused(fmt.Sprintf("%d of %d bytes", n, len(good)), say, append(bytes.Clone(good), 0)[:n])
	}
	refused("a letter", "is not a map", []byte("Dear Sir or Madam, this is no map at all.\n"))
	newer := bytes.Clone(good)
	for _, s := range [][]byte{newer[:slot], newer[slot : 2*slot]} {
		s[8]++
		binary.LittleEndian.PutUint32(s[crcAt:], crc32.Checksum(s[:crcAt], crc32.MakeTable(crc32.Castagnoli)))
	}
	refused("a newer version", "a later version", newer)

	// With its map back, it goes on.
	if err := os.WriteFile(where, good, 0o600); err != nil {
		t.Fatal(err)
	}
	listen := address(t, false)
	source := start(t, "source", siloNBD(t), "source", "--disk", "disk0="+m.disks[0], "--listen", listen)
	waitListening(t, listen)
	must(t, patient, siloNBD(t), "dest", "--disk", "disk0="+m.copies[0], "--connect", listen, "--nbd", address(t, false), "--exit-when-complete")
	source.succeeds(soon)
	if err := compareFiles(m.disks[0], m.copies[0], []patch{pattern(7, 3*mib, 4*kib)}); err != nil {
		t.Error(err)
	}
}

// TestD10DiskThatIsReceivedBelongsToOneDest: while it is received, and after dest was killed, nobody sends it on; a
// second dest is refused while the first runs, with --overwrite too.
func TestD10DiskThatIsReceivedBelongsToOneDest(t *testing.T) {
	disk := randomImage(t, filepath.Join(t.TempDir(), "disk.raw"), 4*mib)
	m := migrate(t, how{rate: mib / 4, stay: true}, disk)
	listen := address(t, false)
	dest := []string{"dest", "--disk", "disk0=" + m.copies[0], "--connect", listen, "--nbd", address(t, false)}
	source := []string{"source", "--disk", m.copies[0], "--listen", listen}
	for _, args := range [][]string{dest, append(dest, "--overwrite"), source, append(source, "--handoff", "auto", "--nbd", address(t, false))} {
		complains(t, command(t, soon, siloNBD(t), args...), 1, m.copies[0], "in use")
	}
	complains(t, command(t, soon, siloNBD(t), "dest", "--disk", "disk0="+disk, "--overwrite", "--connect", listen, "--nbd", address(t, false)), 1, disk, "in use")
	m.streaming("what was refused")
	m.dest.signal(os.Kill)
	m.dest.wait(soon)
	for _, args := range [][]string{source, append(source, "--handoff", "auto", "--nbd", address(t, false))} {
		complains(t, command(t, soon, siloNBD(t), args...), 1, m.copies[0], "is not whole")
	}
	m.source.signal(os.Kill)
	m.source.wait(soon)
}
