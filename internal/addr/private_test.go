package addr

import (
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestPrivateSocketIsForItsOwnerOnly also with a umask that takes nothing away.
func TestPrivateSocketIsForItsOwnerOnly(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	for _, before := range []bool{false, true} {
		a, err := Unix(filepath.Join(t.TempDir(), "control"))
		require.NoError(t, err)
		if before { // what a killed process has left behind
			ln, err := net.Listen("unix", a.Path())
			require.NoError(t, err)
			ln.(*net.UnixListener).SetUnlinkOnClose(false)
			require.NoError(t, ln.Close())
		}
		ln, err := a.ListenPrivate(t.Context())
		require.NoError(t, err)
		info, err := os.Stat(a.Path())
		require.NoError(t, err)
		require.Equal(t, os.ModeSocket|0o600, info.Mode())
		_, err = a.ListenPrivate(t.Context())
		require.ErrorIs(t, err, syscall.EADDRINUSE)
		connect(t, ln)
		require.NoError(t, ln.Close())
		require.NoFileExists(t, a.Path())
	}
	_, err := mustParse(t, "127.0.0.1:0").ListenPrivate(t.Context())
	require.ErrorContains(t, err, "no unix socket")
}

func TestUnixTakesAnyPath(t *testing.T) {
	t.Chdir(t.TempDir())
	here, err := os.Getwd()
	require.NoError(t, err)
	for path, want := range map[string]string{
		"/run/a.sock": "/run/a.sock", "unix:///run/a.sock": "/run/a.sock", "a.sock": here + "/a.sock", "./b/../a:1": here + "/a:1",
	} {
		a, err := Unix(path)
		require.NoError(t, err)
		require.Equal(t, want, a.Path())
		require.True(t, a.IsLocal())
	}
	for path, why := range map[string]string{
		"": "is empty", "/run/": "is a directory", "run/": "is a directory", "unix://a": "three slashes", "a\x00b": "NUL",
		"/" + string(make([]byte, 200)): "NUL", "unix:///": "is a directory",
	} {
		_, err := Unix(path)
		require.ErrorContains(t, err, why, "%q", path)
	}
}

func TestAdoptedListenerIsTuned(t *testing.T) {
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ln := Adopt(plain)
	_, accepted := connect(t, ln)
	requireTuned(t, accepted)
	require.NoError(t, ln.Close())
}
