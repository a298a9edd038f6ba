package sources

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// system is where the kernel shows who uses what.
type system struct {
	sys  string // /sys
	proc string // /proc
}

var thisSystem = system{sys: "/sys", proc: "/proc"}

// fileID is the identity of a file, or of a block device whatever its nodes are.
type fileID struct {
	block    bool
	dev, ino uint64 // of a block device its own number, and 0
}

// idOf does not ask a network file system.
func idOf(dirfd int, path string, flags int) (id fileID, ok bool) {
	var st unix.Statx_t
	flags |= unix.AT_STATX_DONT_SYNC
	if err := unix.Statx(dirfd, path, flags, unix.STATX_TYPE|unix.STATX_INO, &st); err != nil {
		return id, false // closed meanwhile, or not ours to see
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
		return fileID{block: true, dev: unix.Mkdev(st.Rdev_major, st.Rdev_minor)}, true
	case unix.S_IFREG:
		return fileID{dev: unix.Mkdev(st.Dev_major, st.Dev_minor), ino: st.Ino}, true
	}
	return id, false
}

func idOfOpen(fd int) (id fileID, ok bool) { return idOf(fd, "", unix.AT_EMPTY_PATH) }

func (id fileID) number() string {
	return fmt.Sprintf("%d:%d", unix.Major(id.dev), unix.Minor(id.dev))
}

// open is a file that a process has open.
type open struct {
	pid, fd string
	info    []string // the lines of its fdinfo
}

// writes reports whether it was opened for writing.
func (o open) writes() bool {
	for _, l := range o.info {
		if flags, ok := strings.CutPrefix(l, "flags:"); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(flags), 8, 64)
			return err == nil && n&unix.O_ACCMODE != unix.O_RDONLY
		}
	}
	return false
}

// anyhow is true of all that have a file open.
func anyhow(open) bool { return true }

// locked reports whether it holds a lock of a kind (FLOCK, OFDLCK, POSIX) on one
// of the bytes from first to last.
func (o open) locked(kind string, first, last int64) bool {
	for _, l := range o.info {
		// lock: 1: OFDLCK ADVISORY READ -1 08:01:1234 100 100
		f := strings.Fields(l)
		if len(f) < 9 || f[0] != "lock:" || f[2] != kind {
			continue
		}
		from, err := strconv.ParseInt(f[7], 10, 64)
		to, err2 := strconv.ParseInt(f[8], 10, 64)
		if err == nil && from <= last && (err2 != nil || first <= to) { // EOF is not a number
			return true
		}
	}
	return false
}

// holder returns who has one of the files open so that is is true of it, in words
// as in "process 12 (cat)"; empty if that cannot be seen.
func (s system) holder(ids []fileID, is func(open) bool) string {
	for _, pid := range s.processes() {
		dir, err := os.Open(filepath.Join(s.proc, pid, "fd"))
		if err != nil {
			continue // it has ended, or is not ours to see
		}
		fds, _ := dir.Readdirnames(0) // it may end meanwhile
		for _, fd := range fds {
			id, ok := idOf(int(dir.Fd()), fd, 0)
			if !ok || !slices.Contains(ids, id) {
				continue
			}
			if o := (open{pid, fd, s.fdinfo(pid, fd)}); is(o) {
				dir.Close() // only read
				return s.process(pid)
			}
		}
		dir.Close() // only read
	}
	return ""
}

// processes are the ids of all processes that can be seen.
func (s system) processes() (pids []string) {
	dir, err := os.Open(s.proc)
	if err != nil {
		return nil
	}
	defer dir.Close()               // only read
	names, _ := dir.Readdirnames(0) // what can be seen
	for _, n := range names {
		if n[0] >= '0' && n[0] <= '9' {
			pids = append(pids, n)
		}
	}
	return pids
}

// fdinfo is what the kernel tells of a descriptor, in lines; nothing if it was
// closed.
func (s system) fdinfo(pid, fd string) []string {
	b, err := os.ReadFile(filepath.Join(s.proc, pid, "fdinfo", fd))
	if err != nil {
		return nil
	}
	return strings.Split(string(b), "\n")
}

// flocker is the process that has the flock of a file, as the kernel's table of
// locks has it; empty if that shows none.
func (s system) flocker(id fileID) string {
	file := fmt.Sprintf("%02x:%02x:%d", unix.Major(id.dev), unix.Minor(id.dev), id.ino)
	for l := range strings.Lines(text(s.proc, "locks")) {
		// 1: FLOCK ADVISORY WRITE 1234 fe:00:9981105 0 EOF
		if f := strings.Fields(l); len(f) > 5 && f[1] == "FLOCK" && f[5] == file && f[4] > "0" {
			return s.process(f[4])
		}
	}
	return ""
}

const thisProcess = "this process"

func (s system) process(pid string) string {
	if pid == strconv.Itoa(os.Getpid()) {
		return thisProcess
	}
	return fmt.Sprintf("process %s (%s)", pid, text(s.proc, pid+"/comm"))
}

// family returns a block device and what lies on the same bytes: its partitions,
// or the disk of which it is one.
func (s system) family(id fileID) []fileID {
	all := []fileID{id}
	dir, err := filepath.EvalSymlinks(filepath.Join(s.sys, "dev/block", id.number()))
	if err != nil {
		return all
	}
	dirs, _ := filepath.Glob(filepath.Join(dir, "*", "partition")) // a good pattern
	if text(dir, "partition") != "" {
		dirs = []string{dir} // the directory around it is the disk's
	}
	for _, d := range dirs {
		d = filepath.Dir(d)
		var major, minor uint32
		if _, err := fmt.Sscanf(text(d, "dev"), "%d:%d", &major, &minor); err == nil {
			all = append(all, fileID{block: true, dev: unix.Mkdev(major, minor)})
		}
	}
	return all
}

// claimer says who has claimed a block device: a file system, swap, or another
// device; empty if that cannot be seen.
func (s system) claimer(id fileID) string {
	ids := s.family(id)
	if at := s.mounted(ids); at != "" {
		return "it is mounted at " + at
	}
	if name := s.swap(ids); name != "" {
		return "it is swap space (" + name + ")"
	}
	for _, id := range ids {
		dir := filepath.Join(s.sys, "dev/block", id.number())
		if holders, _ := filepath.Glob(filepath.Join(dir, "holders", "*")); len(holders) > 0 { // a good pattern
			name := filepath.Base(holders[0])
			if dm := text(holders[0], "dm/name"); dm != "" {
				name += " (" + dm + ")"
			}
			return "it is a part of " + name
		}
	}
	return ""
}

// mounted returns where one of the devices is mounted, in whatever namespace.
func (s system) mounted(ids []fileID) string {
	numbers := make([]string, len(ids))
	for i, id := range ids {
		numbers[i] = id.number()
	}
	seen := make(map[string]bool) // namespaces
	for _, p := range append([]string{"self"}, s.processes()...) {
		p = filepath.Join(s.proc, p)
		ns, err := os.Readlink(filepath.Join(p, "ns/mnt"))
		if err != nil || seen[ns] {
			continue
		}
		seen[ns] = true
		for l := range strings.Lines(text(p, "mountinfo")) {
			f := strings.Fields(l)
			if len(f) < 5 {
				continue
			}
			if slices.Contains(numbers, f[2]) || s.mountedFrom(f, ids) {
				return f[4]
			}
		}
	}
	return ""
}

// mountedFrom reports whether a line of mountinfo names one of the devices as its
// source, as btrfs has it, whose own number is another.
func (s system) mountedFrom(fields []string, ids []fileID) bool {
	i := slices.Index(fields, "-")
	if i < 0 || i+2 >= len(fields) || !strings.HasPrefix(fields[i+2], "/dev/") {
		return false
	}
	id, ok := idOf(unix.AT_FDCWD, fields[i+2], 0)
	return ok && id.block && slices.Contains(ids, id)
}

// swap returns the path by which one of the files or devices is swap space.
func (s system) swap(ids []fileID) string {
	for l := range strings.Lines(text(s.proc, "swaps")) {
		f := strings.Fields(l)
		if len(f) == 0 || !strings.HasPrefix(f[0], "/") {
			continue
		}
		path := unescape(f[0])
		if id, ok := idOf(unix.AT_FDCWD, path, 0); ok && slices.Contains(ids, id) {
			return path
		}
	}
	return ""
}

// unescape undoes \040 and the like, as the kernel writes paths.
func unescape(s string) string {
	var b strings.Builder
	for len(s) > 0 {
		if s[0] == '\\' && len(s) >= 4 {
			if n, err := strconv.ParseUint(s[1:4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				s = s[4:]
				continue
			}
		}
		b.WriteByte(s[0])
		s = s[1:]
	}
	return b.String()
}

// loop is a loop device over a file.
type loopDevice struct {
	id       fileID
	name     string // loop0
	readOnly bool
}

// loopUsers reports whether a file cannot be used beside a loop device over it,
// and by whom that is used if it is. To write the file is never safe, since the
// device has pages of its own; to read it is, as long as the device is not written.
func (s system) loopUsers(l loopDevice, write bool) (by string, busy bool) {
	if write || !l.readOnly {
		by = s.claimer(l.id)
		if who := s.holder(s.family(l.id), open.writes); by == "" && who != "" {
			by = who + " has it open for writing"
		}
	}
	return by, write || by != ""
}

// loops returns the loop devices over a file.
func (s system) loops(id fileID) []loopDevice {
	var all []loopDevice
	files, _ := filepath.Glob(filepath.Join(s.sys, "block/loop*/loop/backing_file")) // a good pattern
	for _, f := range files {
		path := text(filepath.Dir(f), "backing_file")
		if behind, ok := idOf(unix.AT_FDCWD, path, 0); !ok || behind != id {
			continue
		}
		dir := filepath.Dir(filepath.Dir(f))
		var major, minor uint32
		if _, err := fmt.Sscanf(text(dir, "dev"), "%d:%d", &major, &minor); err != nil {
			continue // it went away
		}
		all = append(all, loopDevice{
			id:   fileID{block: true, dev: unix.Mkdev(major, minor)},
			name: filepath.Base(dir), readOnly: text(dir, "ro") == "1",
		})
	}
	return all
}
