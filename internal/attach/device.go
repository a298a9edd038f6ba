package attach

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Auto is the device that the kernel chooses.
const Auto Device = -1

// Device is one of the kernel's NBD devices, by its number.
type Device int

// ParseDevice reads /dev/nbdN or nbdN.
func ParseDevice(s string) (Device, error) {
	digits, ok := strings.CutPrefix(strings.TrimPrefix(s, "/dev/"), "nbd")
	n, err := strconv.ParseUint(digits, 10, 16)
	if !ok || err != nil || strconv.FormatUint(n, 10) != digits {
		return 0, fmt.Errorf("%q is no NBD device: want /dev/nbd0 or the like", s)
	}
	return Device(n), nil
}

func (d Device) name() string   { return "nbd" + strconv.Itoa(int(d)) }
func (d Device) String() string { return "/dev/" + d.name() }

// openPatience is how long opening a device may take: it reads the partition
// table if nobody has, which waits for the server.
const openPatience = 5 * time.Second

// host is where the kernel shows its devices.
type host struct {
	block string // /sys/block
	proc  string // /proc
	dev   string // /dev
	// claim opens a device so that nobody can mount it meanwhile.
	claim func(path string) (release func(), err error)
}

func thisHost() host { return host{block: "/sys/block", proc: "/proc", dev: "/dev", claim: claim} }

// claim opens for reading only: a close after writing would make udev look at
// the device.
func claim(path string) (func(), error) {
	type opened struct {
		fd  int
		err error
	}
	got := make(chan opened, 1)
	go func() { // may outlive us, when a server does not answer: the end of the process ends it
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		got <- opened{fd, err}
	}()
	select {
	case o := <-got:
		if o.err != nil {
			return nil, &fs.PathError{Op: "open", Path: path, Err: o.err}
		}
		return func() { unix.Close(o.fd) }, nil // nothing was written
	case <-time.After(openPatience):
		return nil, fmt.Errorf("its server has not answered for %v", openPatience)
	}
}

// devices are those that there are, attached or not.
func (h host) devices() ([]Device, error) {
	entries, err := os.ReadDir(h.block)
	if err != nil {
		return nil, err
	}
	var all []Device
	for _, e := range entries {
		if d, err := ParseDevice(e.Name()); err == nil {
			all = append(all, d)
		}
	}
	slices.Sort(all)
	return all, nil
}

// attached says whether a device has connections, dead or alive.
func (h host) attached(d Device) bool {
	_, err := os.Stat(filepath.Join(h.block, d.name(), "pid"))
	return err == nil
}

// backend is to what a device is attached, as its client has told the kernel;
// empty if it has not.
func (h host) backend(d Device) string { return h.line(filepath.Join(h.block, d.name(), "backend")) }

// size is that of a device in bytes, -1 if there is none.
func (h host) size(d Device) int64 {
	n, err := strconv.ParseInt(h.line(filepath.Join(h.block, d.name(), "size")), 10, 64)
	if err != nil {
		return -1
	}
	return n * sector
}

func (h host) line(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "" // the device went away, or this kernel does not show it
	}
	return strings.TrimRight(string(b), "\n")
}

// hold claims a device for us. If somebody uses it, users says who, and the
// device is not held.
func (h host) hold(d Device) (release func(), users string, err error) {
	path := filepath.Join(h.dev, d.name())
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return func() {}, "", nil // nobody can use it
	}
	numbers := h.numbers(d)
	release, err = h.claim(path)
	switch {
	case errors.Is(err, unix.EBUSY):
		users = h.claimer(d, numbers)
	case errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return func() {}, "", nil // it goes away just now
	case err != nil:
		return nil, "", fmt.Errorf("%v: %w", d, noRoot(err))
	default:
		if users = h.opener(numbers); users == "" {
			return release, "", nil
		}
		release()
	}
	return nil, users, nil
}

// numbers are the major:minor of a device and of its partitions.
func (h host) numbers(d Device) []string {
	dir := filepath.Join(h.block, d.name())
	all := []string{h.line(filepath.Join(dir, "dev"))}
	parts, _ := filepath.Glob(filepath.Join(dir, d.name()+"p*", "dev")) // the pattern is a good one
	for _, p := range parts {
		all = append(all, h.line(p))
	}
	return all
}

// claimer says who has a device for himself alone.
func (h host) claimer(d Device, numbers []string) string {
	for l := range strings.Lines(h.line(filepath.Join(h.proc, "self", "mountinfo"))) {
		if f := strings.Fields(l); len(f) > 4 && slices.Contains(numbers, f[2]) {
			return "mounted at " + f[4]
		}
	}
	for l := range strings.Lines(h.line(filepath.Join(h.proc, "swaps"))) {
		if f := strings.Fields(l); len(f) > 0 && strings.HasPrefix(f[0], d.String()) {
			return "swap"
		}
	}
	for _, pattern := range []string{"holders/*", d.name() + "p*/holders/*"} {
		if holders, _ := filepath.Glob(filepath.Join(h.block, d.name(), pattern)); len(holders) > 0 { // a good pattern
			return "used by " + filepath.Base(holders[0])
		}
	}
	return "in use"
}

// opener says who has a device open, or a partition of it, without having
// claimed it: a virtual machine for one, or a loop device.
func (h host) opener(numbers []string) string {
	loops, _ := filepath.Glob(filepath.Join(h.block, "loop*", "loop", "backing_file")) // a good pattern
	for _, l := range loops {
		file := h.line(l)
		if base := filepath.Base(file); strings.HasPrefix(base, "nbd") && slices.Contains(numbers, numbersOf(file)) {
			return "used by " + filepath.Base(filepath.Dir(filepath.Dir(l)))
		}
	}
	fds, _ := filepath.Glob(filepath.Join(h.proc, "[0-9]*", "fd", "[0-9]*")) // a good pattern
	self := strconv.Itoa(os.Getpid())
	for _, fd := range fds {
		dir := filepath.Dir(filepath.Dir(fd))
		if filepath.Base(dir) != self && slices.Contains(numbers, numbersOf(fd)) {
			return fmt.Sprintf("open in process %s (%s)", filepath.Base(dir), h.line(filepath.Join(dir, "comm")))
		}
	}
	return ""
}

// numbersOf are the major:minor of a block device, from what the kernel knows
// without asking a network file system.
func numbersOf(path string) string {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st)
	if err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return "" // closed meanwhile, or something else
	}
	return fmt.Sprintf("%d:%d", st.Rdev_major, st.Rdev_minor)
}

// noRoot says what to do about a permission that is missing.
func noRoot(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("only root may do that (%w)", err)
	}
	return err
}
