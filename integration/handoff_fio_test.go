//go:build integration

package integration

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

const (
	fioDiskSize = 32 * mib
	fioSize     = 12 * mib // the part of the disk that fio uses
)

// fioJob writes the blocks of its part again and again, in an order of its own, and verifies what it has written.
func fioJob(uri string, seed uint64, args ...string) []string {
	return slices.Concat([]string{
		"--name=moves", "--ioengine=nbd", "--uri=" + uri, "--thread", "--fallocate=none",
		"--rw=randwrite", "--norandommap", "--bs=4k", "--iodepth=16", "--serialize_overlap=1", "--fsync=500",
		fmt.Sprintf("--size=%d", fioSize), fmt.Sprintf("--io_size=%d", 6*fioSize), "--rate_iops=0,2000",
		fmt.Sprintf("--randseed=%d", seed), "--verify=crc32c", "--verify_fatal=1", "--aux-path=" + scratch,
	}, args)
}

// TestFioVerifiesAcrossAHandoff lets two fio write two disks of one virtual machine while they move: each is one process
// from the first write at the source to the last read at the destination, with requests in flight in the handoff. The
// first verifies when it has written all, and a new one does so once more at the destination's export itself; the second
// verifies while it writes (what it has written is nothing that another fio could know then).
func TestFioVerifiesAcrossAHandoff(t *testing.T) {
	need(t, "fio")
	for _, handoff := range []string{"manual", "auto"} {
		t.Run(handoff, func(t *testing.T) {
			m := moveLive(t, fioDisks(t), "--rate", "1MiB", "--block-size", "4KiB", "--handoff", handoff, "--max-downtime", "50ms")
			seed := rand.Uint64N(1 << 32)
			t.Logf("seed %d", seed)
			var fios []*process
			for i, r := range m.relays {
				args := fioJob(m.relayed[i], seed+uint64(i), "--do_verify=1")
				if i == 1 {
					args = append(args, "--verify_backlog=256", "--verify_backlog_batch=64")
				}
				fios = append(fios, start(t, fmt.Sprintf("fio%d", i), "fio", args...))
				eventually(t, soon, "fio writes", func() bool { return r.before.Load() > 500 })
			}
			must(t, soon, siloNBD(t), "rate", "--control", m.control, "32MiB")
			if handoff == "manual" {
				time.Sleep(rand.N(2 * time.Second)) // in the first pass, or after it
				must(t, soon, siloNBD(t), "handoff", "--control", m.control)
			}
			for i, f := range fios {
				f.succeeds(patient)
				r := m.relays[i]
				t.Logf("fio%d: %d requests at the source, %d refused there in the handoff, %d at the destination", i, r.before.Load(), r.refused.Load(), r.after.Load())
				if r.before.Load() < 500 || r.refused.Load() == 0 || r.after.Load() < 500 {
					t.Error("fio did not use both exports")
				}
			}
			m.source.succeeds(patient)
			must(t, patient, "fio", fioJob(m.there[0], seed, "--verify_only")...)
			m.dest.signal(os.Interrupt)
			m.dest.succeeds(soon)
			for i, original := range fioDisks(t) {
				sameRest(t, original, m.copies[i], fioSize)
			}
		})
	}
}

// fioDisks makes two disks, which are the same each time.
func fioDisks(t *testing.T) []string {
	t.Helper()
	dir := t.TempDir()
	return []string{
		randomImage(t, filepath.Join(dir, "one.raw"), fioDiskSize),
		randomImage(t, filepath.Join(dir, "two.raw"), fioDiskSize),
	}
}

// sameRest compares what of two files comes at and after off.
func sameRest(t *testing.T, a, b string, off int) {
	t.Helper()
	want, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(b)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != len(want) || !slices.Equal(got[off:], want[off:]) {
		t.Errorf("%s is not as %s from %d on, where nobody has written", b, a, off)
	}
}
