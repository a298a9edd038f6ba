package sources

import (
	"bytes"
	"path/filepath"
	"testing"
)

// What was flushed is there after the cache was dropped, and a closed file refuses.
// (fault F3)
func TestDroppedCacheLosesNothingThatWasFlushed(t *testing.T) {
	f, err := OpenFile(filepath.Join(t.TempDir(), "disk"), FileOptions{Create: true, Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{7}, 8192)
	if _, err := f.WriteAt(want, 4096); err != nil {
		t.Fatal(err)
	}
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := f.DropCache(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, 4096); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %x..., %v", got[:4], err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if f.DropCache() == nil {
		t.Error("a closed file has a cache")
	}
}
