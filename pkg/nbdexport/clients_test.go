//go:build integration

package nbdexport

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// fileDisk is a file served with all that an export can do.
type fileDisk struct{ *os.File }

func newFileDisk(t *testing.T, size int64) *fileDisk {
	f, err := os.Create(filepath.Join(t.TempDir(), "disk.raw"))
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	require.NoError(t, f.Truncate(size))
	return &fileDisk{f}
}

func (d *fileDisk) Size() (int64, error) {
	st, err := d.Stat()
	return st.Size(), err
}

func (d *fileDisk) fallocate(mode uint32, off, length int64) error {
	return unix.Fallocate(int(d.Fd()), mode|unix.FALLOC_FL_KEEP_SIZE, off, length)
}

func (d *fileDisk) ZeroAtContext(_ context.Context, off, length int64, punch bool) error {
	if err := d.fallocate(unix.FALLOC_FL_PUNCH_HOLE, off, length); err != nil || punch {
		return err
	}
	return d.fallocate(0, off, length)
}

func (d *fileDisk) CanFastZero() bool { return true }

func (d *fileDisk) FastZeroAtContext(ctx context.Context, off, length int64, punch bool) error {
	return d.ZeroAtContext(ctx, off, length, punch)
}

func (d *fileDisk) TrimAtContext(_ context.Context, off, length int64) error {
	return d.fallocate(unix.FALLOC_FL_PUNCH_HOLE, off, length)
}

func (d *fileDisk) Prefetch(int64, int64) error { return nil }

func (d *fileDisk) MetaContexts() []string { return []string{contextAllocation} }

func (d *fileDisk) BlockStatus(_ context.Context, _ string, off, length int64, yield func(int64, uint32) bool) error {
	for end := off + length; off < end; {
		data, err := unix.Seek(int(d.Fd()), off, unix.SEEK_DATA)
		if err == unix.ENXIO {
			data, err = end, nil
		}
		if err != nil {
			return err
		}
		next, flags := min(data, end), stateHole|stateZero
		if data == off {
			if next, err = unix.Seek(int(d.Fd()), off, unix.SEEK_HOLE); err != nil {
				return err
			}
			next, flags = min(next, end), 0
		}
		if !yield(next-off, flags) {
			return nil
		}
		off = next
	}
	return nil
}

// tool runs a client and returns what it says. A tool that is not installed
// skips the test, but fails it in CI.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := tryTool(t, name, args...)
	require.NoError(t, err, "%s %s:\n%s", name, strings.Join(args, " "), out)
	return out
}

func tryTool(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed, and CI has to have it", name)
		}
		t.Skipf("%s is not installed", name)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	// What a tool runs in turn is the one it was installed with.
	cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(path)+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// image makes a file of random data with holes.
func image(t *testing.T, size int) string {
	b := make([]byte, size)
	for off := 0; off < size; off += mib {
		if off/mib%3 != 1 {
			_, _ = rand.Read(b[off:min(off+mib-12345, size)]) // never fails
		}
	}
	path := filepath.Join(t.TempDir(), "image.raw")
	require.NoError(t, os.WriteFile(path, b, 0o600))
	return path
}

func equalFiles(t *testing.T, a, b string) {
	t.Helper()
	x, err := os.ReadFile(a)
	require.NoError(t, err)
	y, err := os.ReadFile(b)
	require.NoError(t, err)
	require.True(t, bytes.Equal(x, y), "%s and %s differ", a, b)
}

const imageSize = 65*mib + 512

// serveFile is a file disk served on a unix socket.
func serveFile(t *testing.T) (d *fileDisk, socket, uri string) {
	d = newFileDisk(t, imageSize)
	_, socket = newTestServer(t, Options{}, Export{Name: "disk", Description: "a disk", Backend: d})
	return d, socket, "nbd+unix:///disk?socket=" + socket
}

func TestNbdinfo(t *testing.T) {
	d, socket, uri := serveFile(t)
	_, err := d.WriteAt(make([]byte, 8192), 4096)
	require.NoError(t, err)
	require.Equal(t, fmt.Sprintln(imageSize), tool(t, "nbdinfo", "--size", uri))
	require.Contains(t, tool(t, "nbdinfo", "--list", "nbd+unix:///?socket="+socket), `export="disk"`)
	for _, can := range []string{"write", "flush", "fua", "trim", "zero", "fast-zero", "df", "multi-conn", "cache", "structured-reply"} {
		tool(t, "nbdinfo", "--can", can, uri)
	}
	var info struct {
		Exports []map[string]any
	}
	require.NoError(t, json.Unmarshal([]byte(tool(t, "nbdinfo", "--json", uri)), &info))
	require.Len(t, info.Exports, 1)
	require.Equal(t, "a disk", info.Exports[0]["description"])
	require.EqualValues(t, 1, info.Exports[0]["block_size_minimum"])
	require.EqualValues(t, maxPayload, info.Exports[0]["block_size_maximum"])
	require.Contains(t, tool(t, "nbdinfo", "--map", uri), "4096        8192    0  data")
}

func TestNbdcopyBothWays(t *testing.T) {
	for _, args := range [][]string{
		{"--connections=1"}, {"--connections=4"}, {"--connections=4", "--requests=64", "--request-size=4096"},
		{"--connections=2", "--request-size=33554432"}, {"--synchronous"}, {"--connections=4", "--flush", "--destination-is-zero"},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			d, _, uri := serveFile(t)
			from, to := image(t, imageSize), filepath.Join(t.TempDir(), "copy.raw")
			tool(t, "nbdcopy", append(args, from, uri)...)
			equalFiles(t, from, d.Name())
			tool(t, "nbdcopy", append(args, uri, to)...)
			equalFiles(t, from, to)
		})
	}
}

func TestQemuImg(t *testing.T) {
	d, _, uri := serveFile(t)
	from := image(t, imageSize)
	require.Contains(t, tool(t, "qemu-img", "info", uri), fmt.Sprintf("(%d bytes)", imageSize))
	tool(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", from, uri)
	equalFiles(t, from, d.Name())
	require.Contains(t, tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", from, uri), "identical")
	to := filepath.Join(t.TempDir(), "copy.raw")
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", "-W", "-m", "16", uri, to)
	equalFiles(t, from, to)
	require.Contains(t, tool(t, "qemu-img", "map", "--output=json", "-f", "raw", uri), `"zero": true, "data": false`)
	tool(t, "qemu-img", "bench", "-f", "raw", "-c", "2000", "-d", "64", uri)
	tool(t, "qemu-img", "bench", "-f", "raw", "-w", "-c", "2000", "-d", "64", "--flush-interval", "100", uri)
	require.Contains(t, tool(t, "qemu-nbd", "--list", "-k", strings.TrimPrefix(uri, "nbd+unix:///disk?socket=")), "export: 'disk'")
}

func TestQemuIO(t *testing.T) {
	d, _, uri := serveFile(t)
	out := tool(t, "qemu-io", "-f", "raw", "-d", "unmap",
		"-c", "aio_write -P 0xaa 0 1M", "-c", "aio_write -P 0xbb 1M 1M", "-c", "aio_flush",
		"-c", "aio_read -P 0xaa 0 1M", "-c", "aio_read -P 0xbb 1M 1M", "-c", "aio_flush",
		"-c", "write -z 4096 8192", "-c", "read -P 0 4096 8192", "-c", "write -z -u 512k 64k", "-c", "read -P 0 512k 64k",
		"-c", "discard 1M 512k", "-c", "write -f -P 0xcc 3000 5", "-c", "read -P 0xcc 3000 5", "-c", "read -P 0xaa 3005 1000",
		"-c", "writev -P 0xdd 2M 4096 8192", "-c", "flush", "-c", "read -P 0xdd 2M 12288", uri)
	require.NotContains(t, out, "verification failed")
	require.NotContains(t, out, "error")
	b := make([]byte, 5)
	_, err := d.ReadAt(b, 3000)
	require.NoError(t, err)
	require.Equal(t, bytes.Repeat([]byte{0xcc}, 5), b)
}

func TestNbdsh(t *testing.T) {
	_, _, uri := serveFile(t)
	tool(t, "nbdsh", "-u", uri, "-c", `
import errno
def fails(want, f):
    try: f()
    except nbd.Error as e:
        assert e.errnum == want, e
    else: assert False, "no error"
size = h.get_size()
h.set_strict_mode(0)
h.pwrite(b"x" * 512, 0, nbd.CMD_FLAG_FUA)
assert h.pread(512, 0) == b"x" * 512
assert h.pread(512, 0, nbd.CMD_FLAG_DF) == b"x" * 512
fails(errno.EINVAL, lambda: h.pread(512, size - 511))
fails(errno.ENOSPC, lambda: h.pwrite(b"x" * 512, size - 511))
fails(errno.ENOSPC, lambda: h.zero(512, size - 511))
fails(errno.EINVAL, lambda: h.trim(512, size - 511))
fails(errno.EINVAL, lambda: h.cache(512, size - 511))
fails(errno.EINVAL, lambda: h.trim(512, 0, 1 << 14))
h.zero(512, 0, nbd.CMD_FLAG_FAST_ZERO)
h.zero(512, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
assert h.pread(512, 0) == bytearray(512)
h.trim(size, 0)
h.cache(4096, 0)
h.flush()
`)
}

func TestFioVerify(t *testing.T) {
	_, _, uri := serveFile(t)
	tool(t, "fio", "--name=verify", "--ioengine=nbd", "--uri="+uri, "--rw=randwrite", "--bsrange=512-64k", "--bs_unaligned=0",
		"--size=16M", "--offset_increment=16M", "--iodepth=64", "--numjobs=4", "--verify=crc32c", "--do_verify=1",
		"--verify_fatal=1", "--verify_state_save=0", "--randrepeat=0", "--minimal")
}

func TestNbdClientList(t *testing.T) {
	s := NewServer(Options{})
	require.NoError(t, s.AddExport(Export{Name: "disk", Backend: newMemory(mib)}))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	_, port, err := net.SplitHostPort(ln.Addr().String())
	require.NoError(t, err)
	require.Contains(t, tool(t, "nbd-client", "-l", "127.0.0.1", "-p", port), "disk")
	require.NoError(t, s.Shutdown(t.Context()))
	require.ErrorIs(t, <-served, ErrServerClosed)
}

// writeCerts makes a directory as the clients of GnuTLS want it.
func writeCerts(t *testing.T, ca *x509.Certificate, cert *tls.Certificate) string {
	dir := t.TempDir()
	write := func(name, typ string, der []byte) {
		b := pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der})
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), b, 0o600))
	}
	write("ca-cert.pem", "CERTIFICATE", ca.Raw)
	if cert != nil {
		key, err := x509.MarshalECPrivateKey(cert.PrivateKey.(*ecdsa.PrivateKey))
		require.NoError(t, err)
		write("client-cert.pem", "CERTIFICATE", cert.Certificate[0])
		write("client-key.pem", "EC PRIVATE KEY", key)
	}
	return dir
}

func TestTLSClients(t *testing.T) {
	a, stranger := newAuthority(t), newAuthority(t)
	s := NewServer(Options{TLS: a.server()})
	d := newFileDisk(t, imageSize)
	require.NoError(t, s.AddExport(Export{Name: "disk", Backend: d}))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	t.Cleanup(func() {
		require.NoError(t, s.Close())
		require.ErrorIs(t, <-served, ErrServerClosed)
	})
	_, port, err := net.SplitHostPort(ln.Addr().String())
	require.NoError(t, err)
	good, expired, other := a.leaf(time.Hour), a.leaf(-time.Hour), stranger.leaf(time.Hour)
	uri := func(dir string) string { return "nbds://localhost:" + port + "/disk?tls-certificates=" + dir }

	from, to := image(t, imageSize), filepath.Join(t.TempDir(), "copy.raw")
	dir := writeCerts(t, a.cert, &good)
	require.Contains(t, tool(t, "nbdinfo", uri(dir)), "newstyle-fixed with TLS")
	tool(t, "nbdcopy", "--connections=4", from, uri(dir))
	equalFiles(t, from, d.Name())
	tool(t, "qemu-img", "convert", "--object", "tls-creds-x509,id=t,endpoint=client,dir="+dir, "--image-opts",
		"driver=nbd,host=localhost,port="+port+",export=disk,tls-creds=t", "-O", "raw", to)
	equalFiles(t, from, to)
	for name, dir := range map[string]string{
		"wrong CA of the server": writeCerts(t, stranger.cert, &good), "no certificate": writeCerts(t, a.cert, nil),
		"certificate of another CA": writeCerts(t, a.cert, &other), "expired certificate": writeCerts(t, a.cert, &expired),
	} {
		out, err := tryTool(t, "nbdinfo", uri(dir))
		require.Error(t, err, "%s: %s", name, out)
	}
	out, err := tryTool(t, "nbdinfo", "nbd://localhost:"+port+"/disk")
	require.Error(t, err, out)
	_, err = tryTool(t, "nbdinfo", uri(dir))
	require.NoError(t, err, "the server still serves")
}
