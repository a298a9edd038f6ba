package lives

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	hostRoom    = 6 << 20 // bytes, of each host's own file system
	mapSuffix   = ".silo-nbd"
	stateSuffix = ".silo-nbd-source"
	fillName    = "fill"
)

// host is a host: a directory on a file system of its own, if that can be had.
type host struct {
	name    string
	dir     string // of the disks
	run     string // lives as long as the boot
	state   string // for what does not lie beside a disk
	saved   string // of the snapshots, on another file system
	mounted bool
	xattrs  bool

	// Of one run:
	files map[string]*file  // by name in dir
	links map[string]string // names of symbolic links, and to what
	noted map[string]bool   // by name: the state file beside it says that it was handed off
	snaps map[string]*snap
	full  bool
	ro    bool // mounted for reading only
}

// stuck reports whether nothing can be made on the host's file system.
func (h *host) stuck() bool { return h.full || h.ro }

// snap is what was there of a disk at some time.
type snap struct {
	file         *file
	disk         string // its name
	dir          string // of the copies: disk, map, state
	owner, whole bool
	noted        [2]bool // file, state file
	life         int
	ended        bool  // the handoff that is noted has ended since, by a reclaim
	line         *line // as it was, if the file was the owner
	// maybe is the line as it was if the file was perhaps the owner already, of
	// which nothing had been seen yet.
	maybe *line
	of    *line
	parts string // which of d, m, s there were
	attrs map[string][]byte
}

func newHost(name, dir, saved string) (*host, error) {
	h := &host{name: name, dir: filepath.Join(dir, name), run: filepath.Join(dir, name+"-run"), state: filepath.Join(dir, name+"-state"), saved: saved}
	for _, d := range []string{h.dir, h.run, h.state} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	if os.Geteuid() == 0 {
		err := unix.Mount("lives", h.dir, "tmpfs", 0, fmt.Sprintf("size=%d", hostRoom))
		h.mounted = err == nil // a container may not: then it is never full
	}
	probe := filepath.Join(h.dir, "probe")
	if err := os.WriteFile(probe, nil, 0o600); err != nil {
		return nil, err
	}
	h.xattrs = unix.Setxattr(probe, "user.silo-nbd-probe", []byte("1"), 0) == nil
	return h, h.reset()
}

// reset removes all that a run has left.
func (h *host) reset() error {
	if err := h.remount(false); err != nil {
		return err
	}
	h.files, h.links, h.noted, h.snaps, h.full = map[string]*file{}, map[string]string{}, map[string]bool{}, map[string]*snap{}, false
	err := errors.Join(empty(h.dir), empty(h.run), empty(h.state))
	within(startBound, h.roomy) // what those had that were killed may still be given back
	return err
}

// roomy reports whether the host's file system is empty.
func (h *host) roomy() bool {
	var st unix.Statfs_t
	return !h.mounted || unix.Statfs(h.dir, &st) == nil && st.Bfree == st.Blocks
}

func (h *host) close() error {
	if h.mounted {
		return unix.Unmount(h.dir, unix.MNT_DETACH)
	}
	return nil
}

func empty(dir string) error {
	all, err := os.ReadDir(dir)
	for _, e := range all {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return err
}

func (h *host) path(name string) string { return filepath.Join(h.dir, name+".raw") }

// real follows symbolic links.
func (h *host) real(name string) string {
	if to, ok := h.links[name]; ok {
		return to
	}
	return name
}

// file returns the file of a name; nil if there is none.
func (h *host) file(name string) *file { return h.files[h.real(name)] }

// namesOf are the names of a file.
func (h *host) namesOf(f *file) (all []string) {
	for n, g := range h.files {
		if g == f {
			all = append(all, n)
		}
	}
	slices.Sort(all)
	return all
}

// knows reports whether a note says that the file was handed off, which a
// program finds by this name.
func (h *host) knows(name string) bool {
	f := h.file(name)
	return f != nil && f.noted && h.xattrs || h.noted[h.real(name)]
}

// takes reports whether there is something by a name, also if that was not seen yet: a
// destination makes its file before it has said a word.
func (h *host) takes(name string) bool {
	return h.files[name] != nil || h.links[name] != "" || exists(h.path(name))
}

// contents reads a disk's file, past all programs.
func (h *host) contents(name string) ([]token, error) {
	b, err := os.ReadFile(h.path(name))
	if err != nil {
		return nil, err
	}
	return names(b, 0), nil
}

// set keeps a copy of disk, map and state file.
func (h *host) snapshot(name, id string) error {
	name = h.real(name)
	f := h.files[name]
	if f == nil {
		return nil
	}
	s := &snap{file: f, disk: diskName(name), dir: filepath.Join(h.saved, h.name+"-"+id), whole: f.whole, noted: [2]bool{f.noted, h.noted[name]}, of: f.line, life: f.life}
	if l := f.line; l != nil && l.owner == f {
		s.owner, s.line = true, l.clone(l.id)
	} else if l != nil && f.dest && l.offered && !l.sure {
		s.maybe = l.clone(l.id)
	}
	if err := os.RemoveAll(s.dir); err != nil {
		return err
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	for _, part := range parts {
		switch err := copyFile(h.path(name)+part.suffix, filepath.Join(s.dir, part.letter), false); {
		case err == nil:
			s.parts += part.letter
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
	}
	var err error
	s.attrs, err = attrs(h.path(name))
	if err != nil {
		return err
	}
	h.snaps[id] = s
	return nil
}

// parts are the files of a disk.
var parts = []struct{ letter, suffix string }{{"d", ""}, {"m", mapSuffix}, {"s", stateSuffix}}

// put lays parts of a snapshot at a name: on the same inode, or as new files.
func (s *snap) put(h *host, name, which string, inPlace, withAttrs bool) error {
	for _, part := range parts {
		if !strings.Contains(which, part.letter) {
			continue
		}
		to := h.path(name) + part.suffix
		if !strings.Contains(s.parts, part.letter) {
			if err := os.Remove(to); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			continue
		}
		if err := copyFile(filepath.Join(s.dir, part.letter), to, inPlace); err != nil {
			return err
		}
		if part.letter == "d" && withAttrs {
			if err := setAttrs(to, s.attrs); err != nil {
				return err
			}
		}
	}
	return nil
}

// copyFile copies contents, holes too; inPlace keeps the inode of what is there.
func copyFile(from, to string, inPlace bool) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	flags := os.O_CREATE | os.O_WRONLY
	if !inPlace {
		if err := os.Remove(to); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	f, err := os.OpenFile(to, flags, 0o600)
	if err != nil {
		return err
	}
	err = f.Truncate(0)
	for off := 0; err == nil && off < len(b); off += blockSize {
		piece := b[off:min(len(b), off+blockSize)]
		if slices.ContainsFunc(piece, func(c byte) bool { return c != 0 }) {
			_, err = f.WriteAt(piece, int64(off))
		}
	}
	if err == nil {
		err = f.Truncate(int64(len(b)))
	}
	return errors.Join(err, f.Close())
}

func attrs(path string) (map[string][]byte, error) {
	list := make([]byte, 4096)
	n, err := unix.Listxattr(path, list)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	all := map[string][]byte{}
	for _, k := range strings.Split(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		if !strings.HasPrefix(k, "user.") {
			continue
		}
		v := make([]byte, 4096)
		n, err := unix.Getxattr(path, k, v)
		if err != nil {
			return nil, err
		}
		all[k] = v[:n]
	}
	return all, nil
}

// setAttrs makes the extended attributes of a file those of a snapshot.
func setAttrs(path string, want map[string][]byte) error {
	have, err := attrs(path)
	for k := range have {
		if _, ok := want[k]; !ok {
			err = errors.Join(err, unix.Removexattr(path, k))
		}
	}
	for k, v := range want {
		err = errors.Join(err, unix.Setxattr(path, k, v, 0))
	}
	return err
}

// fill takes all the room of the host; free gives it back.
func (h *host) fill() error {
	if !h.mounted || h.full {
		return nil
	}
	f, err := os.Create(filepath.Join(h.dir, fillName))
	if err != nil {
		return err
	}
	_, err = io.Copy(f, io.LimitReader(zeroes{}, 2*hostRoom))
	h.full = true
	if errors.Is(err, unix.ENOSPC) {
		err = nil
	}
	return errors.Join(err, f.Close())
}

func (h *host) free() error {
	if !h.full {
		return nil
	}
	h.full = false
	return os.Remove(filepath.Join(h.dir, fillName))
}

// remount lets the file system be read only, or written again.
func (h *host) remount(ro bool) error {
	if !h.mounted || h.ro == ro {
		return nil
	}
	flags := uintptr(unix.MS_REMOUNT)
	if ro {
		flags |= unix.MS_RDONLY
	}
	err := unix.Mount("lives", h.dir, "tmpfs", flags, fmt.Sprintf("size=%d", hostRoom))
	if err == nil {
		h.ro = ro
	}
	return err
}

type zeroes struct{}

func (zeroes) Read(p []byte) (int, error) { clear(p); return len(p), nil }
