package bootfile

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func mustOpen(t *testing.T, dir string, version uint64, size int64) *File {
	t.Helper()
	f, err := Open(dir, "a", version, size)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func mustClose(t *testing.T, f *File) {
	t.Helper()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// What one process stored is there for the next one of the same boot; memory of
// another layout, size or boot, and memory that was never made to count, is not.
// (trap I9)
func TestOnlyMemoryOfThisBootAndLayoutIsKept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	f := mustOpen(t, dir, 1, 3*pageSize)
	if f.Kept() {
		t.Error("new memory is kept memory")
	}
	if err := f.Reserve(pageSize, pageSize); err != nil {
		t.Fatal(err)
	}
	Words(f.Bytes()[pageSize:])[3].Store(42)
	mustClose(t, f)
	f = mustOpen(t, dir, 1, 3*pageSize)
	if f.Kept() {
		t.Error("memory that was not made to count is kept")
	}
	if err := f.Reserve(0, 3*pageSize); err != nil {
		t.Fatal(err)
	}
	Words(f.Bytes()[pageSize:])[3].Store(43)
	f.Validate()
	mustClose(t, f)

	f = mustOpen(t, dir, 1, 3*pageSize)
	if !f.Kept() || Words(f.Bytes()[pageSize:])[3].Load() != 43 {
		t.Error("the memory is forgotten")
	}
	mustClose(t, f)
	path := filepath.Join(dir, "a")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, open := range map[string]func() *File{
		"another version": func() *File { return mustOpen(t, dir, 2, 3*pageSize) },
		"another size":    func() *File { return mustOpen(t, dir, 1, 4*pageSize) },
		"another boot": func() *File {
			b := bytes.Clone(good)
			b[bootAt] ^= 1
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			return mustOpen(t, dir, 1, 3*pageSize)
		},
	} {
		if err := os.WriteFile(path, good, 0o600); err != nil {
			t.Fatal(err)
		}
		f := open()
		if err := f.Reserve(0, 3*pageSize); err != nil {
			t.Fatal(err)
		}
		if f.Kept() || !bytes.Equal(f.Bytes(), make([]byte, len(f.Bytes()))) {
			t.Errorf("memory of %s is kept", name)
		}
		mustClose(t, f)
	}
}

// One process has it, and the name may go while it is used.
func TestOneProcessHasIt(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	f := mustOpen(t, dir, 1, pageSize)
	f.Validate()
	if _, err := Open(dir, "a", 1, pageSize); !errors.Is(err, ErrInUse) {
		t.Errorf("a second process is told %v", err)
	}
	if err := f.Forget(); err != nil {
		t.Fatal(err)
	}
	g := mustOpen(t, dir, 1, pageSize)
	if g.Kept() {
		t.Error("what was removed is kept")
	}
	mustClose(t, g)
	mustClose(t, f)
	mustClose(t, f)
}

// A directory that others can write to, a link and what is not a file are refused,
// and are as they were.
func TestForeignPlacesAreRefused(t *testing.T) {
	base := t.TempDir()
	open := filepath.Join(base, "open")
	if err := os.Mkdir(open, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(base, "link")
	if err := os.Symlink(open, link); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{open, link} {
		if _, err := Open(dir, "a", 1, pageSize); err == nil {
			t.Errorf("%s is taken", dir)
		}
	}
	own := filepath.Join(base, "own")
	if err := os.Mkdir(own, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(base, "victim"), filepath.Join(own, "a")); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(own, "a", 1, pageSize); err == nil {
		t.Error("a link is followed")
	}
	for _, name := range []string{"", "../a", ".a"} {
		if _, err := Open(own, name, 1, pageSize); err == nil {
			t.Errorf("%q is taken for a name", name)
		}
	}
	if _, err := os.Lstat(filepath.Join(base, "victim")); !errors.Is(err, os.ErrNotExist) {
		t.Error("a file was made where a link leads")
	}
}

// No room is an error of Reserve, and not the end of the process: what cannot be
// reserved is never touched.
func TestNoRoomIsAnError(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can mount a small tmpfs")
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=32k,mode=0700", "none", dir).CombinedOutput(); err != nil {
		t.Skipf("mount a tmpfs: %v, %s", err, strings.TrimSpace(string(out)))
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v, %s", err, out)
		}
	})
	f := mustOpen(t, dir, 1, 16*pageSize)
	defer mustClose(t, f)
	if err := f.Reserve(0, 4*pageSize); err != nil {
		t.Fatal(err)
	}
	if err := f.Reserve(4*pageSize, 12*pageSize); err == nil {
		t.Error("64 KiB were taken of 32")
	}
	Words(f.Bytes())[0].Store(1)
	if err := f.Reserve(0, 17*pageSize); err == nil {
		t.Error("more than there is was taken")
	}
}
