package demo

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/silo-nbd/silo-nbd/internal/units"
)

// fill is how much of the disk the files may take: the rest is left to the
// file system, and to be empty as on most disks.
const fill = 0.75

// content is what the demo's disk holds.
type content struct {
	Files int
	Bytes int64 // in the files
	From  string
	As    string // "ext4" or "tar"
}

func (c content) String() string {
	return fmt.Sprintf("%s with %d files of %s, %s", c.As, c.Files, c.From, units.Human(c.Bytes))
}

// makeDisk makes a disk of size bytes at path, with real files in a real file
// system where mkfs.ext4 is installed, and in a tar stream elsewhere.
func makeDisk(ctx context.Context, path string, size int64) (content, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return content{}, err
	}
	defer f.Close() // closed below when it matters
	if err := f.Truncate(size); err != nil {
		return content{}, err
	}
	c := content{From: tree(ctx)}
	if mkfs := findTool("mkfs.ext4"); mkfs != "" {
		c.As = "ext4"
		err = c.makeExt4(ctx, mkfs, path, size)
	} else {
		c.As = "tar stream"
		err = c.makeTar(ctx, f, size)
	}
	if err != nil {
		return content{}, fmt.Errorf("making a disk from %s: %w", c.From, err)
	}
	return c, f.Close()
}

// tree is a directory with many real files: the Go distribution if it is at
// hand, else the working directory.
func tree(ctx context.Context) string {
	if out, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output(); err == nil {
		if root := strings.TrimSpace(string(out)); root != "" {
			return root
		}
	}
	if wd, err := os.Getwd(); err == nil {
		return wd
	}
	return "."
}

// findTool looks where administrators' programs are too, which are not on
// everybody's path.
func findTool(name string) string {
	for _, p := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		if found, err := exec.LookPath(p); err == nil {
			return found
		}
	}
	return ""
}

// makeExt4 copies files to a directory of their own, as many as fit, and has
// a file system made of it.
func (c *content) makeExt4(ctx context.Context, mkfs, path string, size int64) error {
	files := path + ".files"
	defer os.RemoveAll(files) // what is left is in the demo's directory, which is removed too
	err := c.eachFile(ctx, size, 4096, func(name string, info fs.FileInfo, from *os.File) error {
		to := filepath.Join(files, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
			return err
		}
		f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		_, err = io.CopyN(f, from, info.Size())
		return errors.Join(err, f.Close())
	})
	if err != nil {
		return err
	}
	inodes := fmt.Sprint(2*c.Files + 1024)
	cmd := exec.CommandContext(ctx, mkfs, "-q", "-F", "-m", "0", "-N", inodes, "-d", files, path)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", mkfs, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// makeTar writes files one behind the other.
func (c *content) makeTar(ctx context.Context, f *os.File, size int64) error {
	w := tar.NewWriter(f)
	err := c.eachFile(ctx, size, 512, func(name string, info fs.FileInfo, from *os.File) error {
		if err := w.WriteHeader(&tar.Header{Name: name, Size: info.Size(), Mode: 0o644, ModTime: info.ModTime()}); err != nil {
			return err
		}
		_, err := io.CopyN(w, from, info.Size())
		return err
	})
	return errors.Join(err, w.Close())
}

// eachFile calls add for the regular files of the tree that fit on a disk of
// size bytes in units of block bytes, and counts them.
func (c *content) eachFile(ctx context.Context, size, block int64, add func(string, fs.FileInfo, *os.File) error) error {
	room := int64(float64(size) * fill)
	return filepath.WalkDir(c.From, func(path string, d fs.DirEntry, err error) error {
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil, !d.Type().IsRegular():
			return nil // a part that cannot be read is left out: any files will do
		}
		info, err := d.Info()
		if err != nil {
			return nil
		}
		// The file's blocks, and a share of its directory and inode.
		need := (info.Size()+block-1)/block*block + 2*block
		if need > room {
			return nil
		}
		from, err := os.Open(path)
		if err != nil {
			return nil
		}
		defer from.Close() // only read from
		name, err := filepath.Rel(c.From, path)
		if err != nil {
			return err
		}
		if err := add(filepath.ToSlash(name), info, from); err != nil {
			return err
		}
		room -= need
		c.Files++
		c.Bytes += info.Size()
		return nil
	})
}
