//go:build integration

package integration

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"testing"
)

// extent is a line of nbdinfo --map.
type extent struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
	Type   int   `json:"type"`
}

// stateMap is what nbdinfo draws of a migration. It has to cover the disk without a gap.
func stateMap(t *testing.T, uri string, size int64) []extent {
	t.Helper()
	var all []extent
	if err := json.Unmarshal([]byte(must(t, soon, "nbdinfo", "--json", "--map=silo:state", uri)), &all); err != nil {
		t.Fatal(err)
	}
	at := int64(0)
	for i, e := range all {
		if e.Offset != at || e.Length <= 0 || i > 0 && e.Type == all[i-1].Type {
			t.Fatalf("the map has a gap, or neighbours that are the same, at %d:\n%+v", at, all)
		}
		at += e.Length
	}
	if at != size {
		t.Fatalf("the map ends at %d of %d bytes:\n%+v", at, size, all)
	}
	return all
}

// stateOf is the state of all of [off, off+length), or -1 if it has several.
func stateOf(all []extent, off, length int64) int {
	for _, e := range all {
		if e.Offset <= off && off < e.Offset+e.Length {
			if off+length > e.Offset+e.Length {
				return -1
			}
			return e.Type
		}
	}
	return -1
}

// TestNbdinfoDrawsTheMigration looks at silo:state while a disk moves.
func TestNbdinfoDrawsTheMigration(t *testing.T) {
	need(t, "nbdinfo", "qemu-io")
	const missing, fetched, written = 0, 1, 2
	disk := randomImage(t, filepath.Join(t.TempDir(), "odd.raw"), oddSize)
	m := migrate(t, how{rate: mib, stay: true}, disk)
	must(t, soon, "qemu-io", "-f", "raw", "-c", fmt.Sprintf("write -P 7 %d %d", 50*mib, mib), "-c", fmt.Sprintf("read %d 64k", 40*mib), m.uris[0])
	all := stateMap(t, m.uris[0], oddSize)
	m.streaming("drawing the map")
	for _, want := range []struct {
		what        string
		off, length int64
		state       int
	}{
		{"the write", 50 * mib, mib, written},
		{"what was read", 40 * mib, 64 * kib, fetched},
		{"before it", 39 * mib, 64 * kib, missing},
		{"the end", oddSize - 1234, 1234, missing},
	} {
		if got := stateOf(all, want.off, want.length); got != want.state {
			t.Errorf("%s: state %d, want %d:\n%+v", want.what, got, want.state, all)
		}
	}
	m.link.SetRate(0)
	m.source.succeeds(patient)
	for _, e := range stateMap(t, m.uris[0], oddSize) {
		if e.Type == missing {
			t.Errorf("complete, but missing: %+v", e)
		}
	}
}
