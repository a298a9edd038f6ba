//go:build integration

package integration

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

const (
	kib = 1 << 10
	mib = 1 << 20

	// oddSize is a multiple neither of a sector nor of a block.
	oddSize = 65_001_984 + 1234
)

// treeImage returns an ext4 image of 640 MiB made from the tree of the Go distribution: real files of all sizes in a
// real file system. It is a copy of the test's own: a disk that has moved belongs to its destination, also in the next
// run.
func treeImage(t *testing.T) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "tree.raw")
	must(t, time.Minute, "cp", "--sparse=always", madeTreeImage(t), image)
	return image
}

// madeTreeImage is the image that treeImage copies. It is made once for each version of Go and kept in .cache.
func madeTreeImage(t *testing.T) string {
	t.Helper()
	need(t, "mkfs.ext4", "go")
	root := strings.TrimSpace(must(t, time.Minute, "go", "env", "GOROOT"))
	dir := filepath.Join(top(), ".cache", "images")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(dir, "tree-"+runtime.Version()+".raw")
	if exists(image) {
		return image
	}
	began := time.Now()
	half := image + fmt.Sprint(".", os.Getpid()) // its name only when it is complete: a killed run leaves no half image
	defer os.Remove(half)
	must(t, time.Minute, "truncate", "-s", "640M", half)
	must(t, 5*time.Minute, "mkfs.ext4", "-q", "-L", "tree", "-d", root, half)
	if err := os.Rename(half, image); err != nil {
		t.Fatal(err)
	}
	t.Logf("made %s from %s in %v", image, root, time.Since(began).Round(time.Second))
	return image
}

// randomImage makes a disk of random data, with holes and with zeroes that are written out.
func randomImage(t *testing.T, path string, size int64) string {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	random := rand.NewChaCha8(sha256.Sum256([]byte(path[strings.LastIndexByte(path, '/'):])))
	lengths := rand.New(random)
	buf := make([]byte, 512*kib)
	for off, kind := int64(0), 0; off < size; kind++ {
		p := buf[:min(1+lengths.Int64N(int64(len(buf))), size-off)]
		switch kind % 8 {
		case 3: // a hole
			p = nil
			off += min(1+lengths.Int64N(2*mib), size-off)
		case 6:
			clear(p)
		default:
			_, _ = random.Read(p) // never fails
		}
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
		off += int64(len(p))
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return path
}

// sameBytes fails the test unless both files have the same size and content; it names the first difference.
func sameBytes(t *testing.T, a, b string) {
	t.Helper()
	if err := compareFiles(a, b, nil); err != nil {
		t.Fatal(err)
	}
}

// patch is what was written over a disk after it was copied.
type patch struct {
	off  int64
	data []byte
}

// compareFiles compares b with a, over which the patches were written in their order.
func compareFiles(a, b string, patches []patch) error {
	fa, err := os.Open(a)
	if err != nil {
		return err
	}
	defer fa.Close()
	fb, err := os.Open(b)
	if err != nil {
		return err
	}
	defer fb.Close()
	bufA, bufB := make([]byte, mib), make([]byte, mib)
	for off := int64(0); ; off += mib {
		na, errA := io.ReadFull(fa, bufA)
		nb, errB := io.ReadFull(fb, bufB)
		for _, p := range patches {
			overlay(bufA[:na], off, p)
		}
		if n := min(na, nb); !bytes.Equal(bufA[:n], bufB[:n]) {
			for i := range n {
				if bufA[i] == bufB[i] {
					continue
				}
				return fmt.Errorf("%s and %s differ first at byte %d", a, b, off+int64(i))
			}
		}
		if na != nb {
			return fmt.Errorf("%s and %s are of different size: one ends at byte %d, the other at %d", a, b, off+int64(na), off+int64(nb))
		}
		if isEnd(errA) && isEnd(errB) {
			return nil
		}
		if err := errors.Join(errA, errB); err != nil {
			return err
		}
	}
}

func isEnd(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }

// overlay lays the part of a patch that falls into buf, which lies at off, over it.
func overlay(buf []byte, off int64, p patch) {
	from, to := max(off, p.off), min(off+int64(len(buf)), p.off+int64(len(p.data)))
	if from < to {
		copy(buf[from-off:to-off], p.data[from-p.off:to-p.off])
	}
}

// pattern is length times the byte b, written at off.
func pattern(b byte, off, length int64) patch {
	return patch{off, bytes.Repeat([]byte{b}, int(length))}
}
