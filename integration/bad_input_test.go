//go:build integration

package integration

import (
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// complains fails the test unless the command ended with the code and exactly one line on standard error, which holds
// all the parts, and offered no export.
func complains(t *testing.T, r result, code int, parts ...string) {
	t.Helper()
	if n := strings.Count(r.stderr, "\n"); n != 1 {
		t.Errorf("%d lines on standard error, want one:\n%s", n, r.stderr)
	}
	if strings.Contains(r.stdout, "ready ") {
		t.Errorf("an export was offered:\n%s", r.stdout)
	}
	gaveUp(t, r, code, parts...)
}

// gaveUp fails the test unless the command ended with the code, and what it said last is one line for people, which
// holds all the parts. Before it only log lines may have come, since it had begun its work.
func gaveUp(t *testing.T, r result, code int, parts ...string) {
	t.Helper()
	if r.code != code {
		t.Errorf("exit code %d, want %d", r.code, code)
	}
	lines := strings.Split(strings.TrimSuffix(r.stderr, "\n"), "\n")
	last := lines[len(lines)-1]
	if !strings.HasPrefix(last, "silo-nbd: ") {
		t.Errorf("the last line is not for people: %q", last)
	}
	for _, part := range parts {
		if !strings.Contains(last, part) {
			t.Errorf("the line does not name %q: %s", part, last)
		}
	}
	for _, l := range lines[:len(lines)-1] {
		if !strings.HasPrefix(l, "time=") {
			t.Errorf("neither a log line nor the last one: %q", l)
		}
	}
}

// TestSourceRefusesABadDisk starts a source on what is no disk to move.
func TestSourceRefusesABadDisk(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "empty"), "")
	for _, c := range []struct{ name, path string }{
		{"missing", filepath.Join(dir, "missing.raw")},
		{"empty", filepath.Join(dir, "empty")},
		{"directory", dir},
		{"through a file", filepath.Join(dir, "empty", "disk.raw")},
		{"terminal", "/dev/null"},
	} {
		t.Run(c.name, func(t *testing.T) {
			listen := address(t, false)
			r := command(t, soon, siloNBD(t), "source", "--disk", "a="+c.path, "--listen", listen)
			complains(t, r, 1, c.path)
			if exists(strings.TrimPrefix(listen, "unix://")) {
				t.Error("the socket is left behind")
			}
			if c.name == "missing" && exists(c.path) {
				t.Error("the source has made its disk")
			}
		})
	}
}

func TestUnreadableDiskIsRefused(t *testing.T) {
	disk := filepath.Join(socketDir(t), "secret.raw")
	writeFile(t, disk, strings.Repeat("secret", 1000))
	if err := os.Chmod(disk, 0); err != nil {
		t.Fatal(err)
	}
	args := []string{siloNBD(t), "source", "--disk", disk, "--listen", "tcp://127.0.0.1:0"}
	if os.Geteuid() == 0 { // root may read everything
		need(t, "setpriv")
		if err := os.Chmod(filepath.Dir(disk), 0o755); err != nil {
			t.Fatal(err)
		}
		args = append([]string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"}, args...)
	}
	complains(t, command(t, soon, args[0], args[1:]...), 1, disk, "permission denied")
}

// TestDestinationRefusesABadDisk offers a disk of one MiB to a destination that must not touch what it has.
func TestDestinationRefusesABadDisk(t *testing.T) {
	dir := t.TempDir()
	source := randomImage(t, filepath.Join(dir, "source.raw"), mib)
	other := randomImage(t, filepath.Join(dir, "other.raw"), mib)
	for _, c := range []struct {
		name, path string
		more       []string
	}{
		{"exists, no --overwrite", other, nil},
		{"directory", dir, []string{"--overwrite"}},
		{"in a directory that is not there", filepath.Join(dir, "none", "disk.raw"), nil},
		{"in a file", filepath.Join(other, "disk.raw"), nil},
		{"the source's own disk", source, []string{"--overwrite"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := ""
			if fi, err := os.Stat(c.path); err == nil && fi.Mode().IsRegular() {
				before = fileSum(t, c.path)
			}
			listen, nbd := address(t, false), address(t, false)
			src := start(t, "source", siloNBD(t), "source", "--disk", source, "--listen", listen)
			waitListening(t, listen)
			args := append([]string{"dest", "--disk", c.path, "--connect", listen, "--nbd", nbd}, c.more...)
			complains(t, command(t, soon, siloNBD(t), args...), 1, filepath.Dir(c.path))
			if before != "" && fileSum(t, c.path) != before {
				t.Error("the file was changed")
			}
			if before == "" && c.path != dir && exists(c.path) {
				t.Error("the file was made")
			}
			if exists(strings.TrimPrefix(nbd, "unix://")) {
				t.Error("the NBD socket is left behind")
			}
			if !src.running() && src.cmd.ProcessState.ExitCode() == 0 {
				t.Error("the source says that its disk was moved")
			}
		})
	}
}

// TestDiskInUseIsRefused starts a second destination on a disk that the first one is filling.
func TestDiskInUseIsRefused(t *testing.T) {
	disk := randomImage(t, filepath.Join(t.TempDir(), "disk.raw"), 4*mib)
	m := migrate(t, how{rate: mib / 2}, disk)
	listen := address(t, false)
	other := randomImage(t, filepath.Join(t.TempDir(), "other.raw"), 4*mib)
	start(t, "second source", siloNBD(t), "source", "--disk", "disk0="+other, "--listen", listen)
	waitListening(t, listen)
	r := command(t, soon, siloNBD(t), "dest", "--disk", "disk0="+m.copies[0], "--overwrite", "--connect", listen, "--nbd", address(t, false))
	complains(t, r, 1, m.copies[0], "in use")
	r = command(t, soon, siloNBD(t), "source", "--disk", disk, "--listen", address(t, false))
	complains(t, r, 1, disk, "a source has this disk already")
	m.streaming("the second destination")
	m.link.SetRate(0)
	m.finish()
	sameBytes(t, disk, m.copies[0])
}

// TestBlockDeviceIsADisk moves a file onto a loop device, which a second destination cannot have.
func TestBlockDeviceIsADisk(t *testing.T) {
	needRoot(t)
	need(t, "losetup", "blockdev")
	dir := t.TempDir()
	disk := randomImage(t, filepath.Join(dir, "disk.raw"), 8*mib)
	device := loopDevice(t, randomImage(t, filepath.Join(dir, "backing.raw"), 9*mib))
	listen, second := address(t, false), address(t, false)
	source := start(t, "source", siloNBD(t), "source", "--disk", disk, "--listen", listen, "--rate", "1MiB")
	waitListening(t, listen)
	dest := start(t, "dest", siloNBD(t), "dest", "--disk", device, "--overwrite", "--connect", listen, "--nbd", address(t, false), "--exit-when-complete")
	readyURI(dest, "disk")
	other := randomImage(t, filepath.Join(dir, "other.raw"), 8*mib)
	start(t, "second source", siloNBD(t), "source", "--disk", "disk="+other, "--listen", second)
	waitListening(t, second)
	complains(t, command(t, soon, siloNBD(t), "dest", "--disk", device, "--overwrite", "--connect", second, "--nbd", address(t, false)), 1, device, "in use")
	if !source.running() {
		t.Fatal("the transfer had finished before the second destination started")
	}
	source.succeeds(time.Minute)
	dest.succeeds(soon)
	must(t, soon, "cmp", "-n", "8388608", disk, device)
}

// TestTooSmallDeviceIsRefused moves a disk onto a block device that lacks one sector.
func TestTooSmallDeviceIsRefused(t *testing.T) {
	needRoot(t)
	need(t, "losetup")
	dir := t.TempDir()
	disk := randomImage(t, filepath.Join(dir, "disk.raw"), mib)
	backing := randomImage(t, filepath.Join(dir, "backing.raw"), mib-512)
	before := fileSum(t, backing)
	device := loopDevice(t, backing)
	listen := address(t, false)
	start(t, "source", siloNBD(t), "source", "--disk", disk, "--listen", listen)
	waitListening(t, listen)
	gaveUp(t, command(t, soon, siloNBD(t), "dest", "--disk", device, "--overwrite", "--connect", listen, "--nbd", address(t, false)), 1, "1048064")
	if fileSum(t, backing) != before {
		t.Error("the device was changed")
	}
}

// loopDevice gives a block device with the content of a file, until the test's end.
func loopDevice(t *testing.T, backing string, flags ...string) string {
	t.Helper()
	r := command(t, soon, "losetup", append(flags, "--find", "--show", backing)...)
	if r.code != 0 {
		lacking(t, "no loop device: %s", r.stderr)
	}
	device := strings.TrimSpace(r.stdout)
	t.Cleanup(func() { must(t, soon, "losetup", "--detach", device) })
	return device
}

// TestBadAddressIsRefused tries addresses that nothing can be made of, or that belong to somebody else.
func TestBadAddressIsRefused(t *testing.T) {
	disk := randomImage(t, filepath.Join(t.TempDir(), "disk.raw"), mib)
	copied := filepath.Join(t.TempDir(), "copy.raw")
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	path := filepath.Join(socketDir(t), "socket")
	takenUnix, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer takenUnix.Close()
	for _, c := range []struct {
		name string
		args []string
		code int
		part string
	}{
		{"no port", []string{"source", "--disk", disk, "--listen", "localhost"}, 2, "localhost"},
		{"port out of range", []string{"source", "--disk", disk, "--connect", "localhost:99999"}, 2, "99999"},
		{"unknown scheme", []string{"dest", "--disk", copied, "--connect", "http://localhost:80", "--nbd", "unix:///n"}, 2, "http"},
		{"port in use", []string{"source", "--disk", disk, "--listen", taken.Addr().String()}, 1, taken.Addr().String()},
		{"NBD port in use", []string{"dest", "--disk", copied, "--connect", "unix://" + path, "--nbd", taken.Addr().String()}, 1, taken.Addr().String()},
		{"socket in use", []string{"source", "--disk", disk, "--listen", "unix://" + path}, 1, path},
		{"socket in no directory", []string{"source", "--disk", disk, "--listen", "unix://" + path + ".d/s"}, 1, path},
		{"nobody there", []string{"dest", "--disk", copied, "--connect", "unix://" + path + ".not", "--nbd", "unix://" + path + ".nbd", "--connect-timeout", "1s"}, 1, path + ".not"},
		{"no such host", []string{"source", "--disk", disk, "--connect", "no-such-host.invalid:1", "--connect-timeout", "1s"}, 1, "no-such-host.invalid"},
		{"neither way", []string{"source", "--disk", disk}, 2, "--listen"},
		{"both ways", []string{"source", "--disk", disk, "--listen", ":1", "--connect", ":2"}, 2, "--connect"},
		{"no disk", []string{"source", "--listen", "unix://" + path}, 2, "--disk"},
		{"unknown flag", []string{"source", "--disks", disk}, 2, "--disks"},
		{"unknown command", []string{"move"}, 2, "move"},
	} {
		t.Run(c.name, func(t *testing.T) {
			complains(t, command(t, soon, siloNBD(t), c.args...), c.code, c.part)
		})
	}
	if exists(copied) {
		t.Error("a disk was made")
	}
	if c, err := net.Dial("unix", path); err != nil {
		t.Errorf("somebody else's socket was taken away: %v", err)
	} else {
		c.Close()
	}
}

// TestPeerThatSpeaksSomethingElse connects both ends to servers that are no peer, or say nothing at all.
func TestPeerThatSpeaksSomethingElse(t *testing.T) {
	need(t, "nbdkit")
	web := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(web.Close)
	nbdkit := address(t, false)
	start(t, "nbdkit", "nbdkit", "-f", "-U", strings.TrimPrefix(nbdkit, "unix://"), "memory", "1M")
	waitListening(t, nbdkit)
	disk := randomImage(t, filepath.Join(t.TempDir(), "disk.raw"), mib)
	for _, c := range []struct{ name, address string }{
		{"HTTP", strings.TrimPrefix(web.URL, "http://")},
		{"NBD", nbdkit},
		{"nothing", silent(t)},
	} {
		t.Run("source to "+c.name, func(t *testing.T) {
			t.Parallel() // they wait for what does not come
			gaveUp(t, command(t, time.Minute, siloNBD(t), "source", "--disk", disk, "--connect", c.address), 1)
		})
		t.Run("dest to "+c.name, func(t *testing.T) {
			t.Parallel()
			copied := filepath.Join(t.TempDir(), "copy.raw")
			r := command(t, time.Minute, siloNBD(t), "dest", "--disk", copied, "--connect", c.address, "--nbd", address(t, false))
			gaveUp(t, r, 1)
			if exists(copied) {
				t.Error("a disk was made")
			}
			if strings.Contains(r.stdout, "ready ") {
				t.Errorf("an export was offered:\n%s", r.stdout)
			}
		})
	}
}
