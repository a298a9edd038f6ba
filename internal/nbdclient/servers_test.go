package nbdclient

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/internal/tlsdir"
	"github.com/silo-nbd/silo-nbd/internal/tlsdir/tlstest"
)

// needTool finds a program of the machine. Without it a test is skipped on a
// laptop and fails in CI, where a skip would look like a pass.
func needTool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed", name)
		}
		t.Skipf("%s is not installed", name)
	}
	return path
}

// serve starts a server and dials it until it answers.
func serve(t *testing.T, uri string, name string, args ...string) *Client {
	return serveTLS(t, uri, nil, name, args...)
}

func serveTLS(t *testing.T, uri string, secure Secure, name string, args ...string) *Client {
	t.Helper()
	cmd := exec.Command(needTool(t, name), args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
	})
	var c *Client
	require.Eventually(t, func() bool {
		var err error
		c, err = DialTLS(t.Context(), uri, secure)
		return err == nil
	}, 10*time.Second, 20*time.Millisecond, "%s: %s", name, &out)
	t.Cleanup(func() { c.Close() })
	return c
}

// exercise does everything that the client can do and checks what comes back.
func exercise(t *testing.T, c *Client, size int64) {
	require.Equal(t, size, c.Size())
	const workers, block = 8, 4096
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range 20 {
				off := int64(i*workers+w) * block
				want := bytes.Repeat([]byte{byte(w), byte(i)}, block/2)
				if _, err := c.WriteAt(want, off); err != nil {
					t.Error(err)
					return
				}
				got := make([]byte, block)
				if _, err := c.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
					t.Errorf("block at %d: %v, or other bytes than were written", off, err)
				}
			}
		})
	}
	wg.Wait()
	require.NoError(t, c.Flush())
	require.NoError(t, c.ZeroAt(block, block))
	got := make([]byte, block)
	_, err := c.ReadAt(got, block)
	require.NoError(t, err)
	require.Equal(t, make([]byte, block), got)
	require.NoError(t, c.TrimAt(0, block))
}

func TestAgainstNBDKit(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "n.sock")
	uri := fmt.Sprintf("nbd+unix:///any?socket=%s", sock)
	exercise(t, serve(t, uri, "nbdkit", "-f", "-U", sock, "memory", "4M"), 4<<20)
}

func TestAgainstQEMU(t *testing.T) {
	dir := t.TempDir()
	disk, sock := filepath.Join(dir, "d.raw"), filepath.Join(dir, "n.sock")
	require.NoError(t, os.WriteFile(disk, make([]byte, 4<<20), 0o600))
	uri := fmt.Sprintf("nbd+unix:///disk?socket=%s", sock)
	exercise(t, serve(t, uri, "qemu-nbd", "-f", "raw", "-t", "-e", "4", "-x", "disk", "--discard=unmap", "-k", sock, disk), 4<<20)
	_, err := Dial(t.Context(), fmt.Sprintf("nbd+unix:///other?socket=%s", sock))
	require.ErrorContains(t, err, "no such export")
}

// certificates are a directory with certificates of a, under the names that
// nbdkit and QEMU look for in servers too, and how to connect with them.
func certificates(t *testing.T, a *tlstest.Authority) (dir string, secure Secure) {
	t.Helper()
	dir = t.TempDir()
	require.NoError(t, a.Write(dir, tlstest.Leaf{DNSNames: []string{"localhost"}}))
	require.NoError(t, os.Link(filepath.Join(dir, "cert.pem"), filepath.Join(dir, "server-cert.pem")))
	require.NoError(t, os.Link(filepath.Join(dir, "key.pem"), filepath.Join(dir, "server-key.pem")))
	certs, err := tlsdir.Open(dir, tlsdir.Options{Dial: true})
	require.NoError(t, err)
	return dir, certs.Client
}

func TestAgainstNBDKitWithTLS(t *testing.T) {
	a, err := tlstest.NewAuthority()
	require.NoError(t, err)
	dir, secure := certificates(t, a)
	sock := filepath.Join(t.TempDir(), "n.sock")
	uri := fmt.Sprintf("nbds+unix:///any?socket=%s", sock)
	exercise(t, serveTLS(t, uri, secure, "nbdkit", "-f", "-U", sock, "--tls=require", "--tls-certificates="+dir, "--tls-verify-peer", "memory", "4M"), 4<<20)

	_, err = Dial(t.Context(), fmt.Sprintf("nbd+unix:///any?socket=%s", sock))
	require.ErrorContains(t, err, "the server wants TLS: want a URI of nbds://")
	_, err = Dial(t.Context(), uri)
	require.ErrorContains(t, err, "certificates are needed")

	other, err := tlstest.NewAuthority()
	require.NoError(t, err)
	_, stranger := certificates(t, other)
	_, err = DialTLS(t.Context(), uri, stranger)
	require.ErrorContains(t, err, "is not signed by a CA of")
}

func TestAgainstQEMUWithTLS(t *testing.T) {
	a, err := tlstest.NewAuthority()
	require.NoError(t, err)
	dir, secure := certificates(t, a)
	disk, sock := filepath.Join(t.TempDir(), "d.raw"), filepath.Join(t.TempDir(), "n.sock")
	require.NoError(t, os.WriteFile(disk, make([]byte, 4<<20), 0o600))
	uri := fmt.Sprintf("nbds+unix:///disk?socket=%s", sock)
	exercise(t, serveTLS(t, uri, secure, "qemu-nbd", "-f", "raw", "-t", "-e", "4", "-x", "disk", "--discard=unmap",
		"--object", "tls-creds-x509,id=t,endpoint=server,verify-peer=on,dir="+dir, "--tls-creds=t", "-k", sock, disk), 4<<20)
}

func TestServerWithoutTLSIsNamed(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "n.sock")
	serve(t, fmt.Sprintf("nbd+unix:///any?socket=%s", sock), "nbdkit", "-f", "-U", sock, "memory", "4M")
	a, err := tlstest.NewAuthority()
	require.NoError(t, err)
	_, secure := certificates(t, a)
	_, err = DialTLS(t.Context(), fmt.Sprintf("nbds+unix:///any?socket=%s", sock), secure)
	require.ErrorContains(t, err, "the server has no TLS")
}
