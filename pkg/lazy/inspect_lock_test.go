package lazy

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Who looks at a map holds its lock for a moment, and who wants to begin just then waits
// for that; an owner is told of at once.
func TestInspectionDoesNotKeepAnOwnerOut(t *testing.T) {
	path := onDisk(t, testID, Options{}, nil)
	f, err := openFile(path, os.O_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.lock(unix.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	opened := make(chan error)
	go func() {
		m, err := OpenMap(path, Identity{})
		if err == nil {
			err = m.Close()
		}
		opened <- err
	}()
	select {
	case err := <-opened:
		t.Fatalf("opened under an inspection: %v", err)
	default:
	}
	if err := f.lock(unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	if err := <-opened; err != nil {
		t.Errorf("after the inspection: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// What a process that was killed has left of a map that it made is removed by the next
// one, but not what another one is making, nor anything else.
func TestLeftoversOfMapsAreRemoved(t *testing.T) {
	for _, name := range []string{"disk.silo-nbd", strings.Repeat("d", 255)} {
		dir := t.TempDir()
		temp := tempName(name)
		for _, n := range []string{temp + "123", temp + "456", "." + "other.silo-nbd.new-1", temp[1:] + "1"} {
			if err := os.WriteFile(filepath.Join(dir, n), []byte("silo-map"), 0o600); err != nil {
				if len(n) > 255 {
					continue
				}
				t.Fatal(err)
			}
		}
		f, err := os.Open(filepath.Join(dir, temp+"456"))
		if err != nil {
			t.Fatal(err)
		}
		if err := (osFile{f}).lock(unix.LOCK_SH); err != nil {
			t.Fatal(err)
		}
		m := must(t)(CreateMap(filepath.Join(dir, name), testID))
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		for n, want := range map[string]bool{temp + "123": false, temp + "456": true, ".other.silo-nbd.new-1": true, name: true} {
			if _, err := os.Stat(filepath.Join(dir, n)); (err == nil) != want {
				t.Errorf("%.40s: %v", n, err)
			}
		}
	}
}
