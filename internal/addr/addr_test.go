package addr

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestParseTakesEveryForm(t *testing.T) {
	for text, want := range map[string]Addr{
		"localhost:10809":         {network: "tcp", host: "localhost", port: "10809"},
		"tcp://10.0.0.1:0":        {network: "tcp", host: "10.0.0.1", port: "0"},
		":10809":                  {network: "tcp", port: "10809"},
		"[::1]:1":                 {network: "tcp", host: "::1", port: "1"},
		"tcp://[fe80::1%eth0]:65": {network: "tcp", host: "fe80::1%eth0", port: "65"},
		"unix:///run/a.sock":      {network: "unix", path: "/run/a.sock"},
		"unix:///a//b/../c d":     {network: "unix", path: "/a/c d"},
	} {
		got, err := Parse(text)
		require.NoError(t, err, text)
		require.Equal(t, want, got, text)
		back, err := Parse(got.String())
		require.NoError(t, err, text)
		require.Equal(t, got, back, text)
	}
}

func TestParseSaysWhatIsWrong(t *testing.T) {
	for text, want := range map[string]string{
		"":                  "the address is empty: want host:port or unix:///path",
		"localhost":         `"localhost" is not an address: want host:port, [ipv6]:port or unix:///path`,
		"::1:80":            `"::1:80" is not an address: want host:port, [ipv6]:port or unix:///path`,
		"/run/a.sock":       `"/run/a.sock" is not an address: want host:port, [ipv6]:port or unix:///path`,
		"a/b:1":             `"a/b:1" is not an address: want host:port, [ipv6]:port or unix:///path`,
		"localhost:nbd":     `"localhost:nbd" has no usable port: want a number from 0 to 65535 after the last colon`,
		"localhost:65536":   `"localhost:65536" has no usable port: want a number from 0 to 65535 after the last colon`,
		"localhost:+1":      `"localhost:+1" has no usable port: want a number from 0 to 65535 after the last colon`,
		"http://a:1":        `"http://a:1" has an unknown scheme "http": want host:port, tcp://host:port or unix:///path`,
		"unix://run/a.sock": `"unix://run/a.sock" has no absolute path: want three slashes, as in unix:///run/silo.sock`,
		"unix://":           `"unix://" has no absolute path: want three slashes, as in unix:///run/silo.sock`,
		"unix:///run/":      `"unix:///run/" is a directory: want the path of a socket in it`,
	} {
		_, err := Parse(text)
		require.EqualError(t, err, want, text)
	}
	_, err := Parse("unix:///" + strings.Repeat("x", 107))
	require.ErrorContains(t, err, "the path has 108 bytes and a unix socket takes 107: choose a shorter one")
	_, err = Parse("unix:///" + strings.Repeat("x", 106))
	require.NoError(t, err)
}

func TestIsLocalIsOnlyWhatNoOtherHostReaches(t *testing.T) {
	for text, want := range map[string]bool{
		"unix:///a": true, "localhost:1": true, "127.0.0.1:1": true, "127.9.9.9:1": true, "[::1]:1": true,
		"[::ffff:127.0.0.1]:1": true,
		":1":                   false, "0.0.0.0:1": false, "[::]:1": false, "10.0.0.1:1": false, "localhost.evil.org:1": false,
	} {
		a, err := Parse(text)
		require.NoError(t, err)
		require.Equal(t, want, a.IsLocal(), text)
	}
}

func TestNBDURIIsWhatClientsTake(t *testing.T) {
	for _, c := range []struct{ addr, name, want string }{
		{"unix:///tmp/n.sock", "a", "nbd+unix:///a?socket=/tmp/n.sock"},
		{"unix:///tmp/n.sock", "", "nbd+unix:///?socket=/tmp/n.sock"},
		{"unix:///tmp/a b&c+d.sock", "x y/z?", "nbd+unix:///x%20y/z%3F?socket=/tmp/a%20b%26c%2Bd.sock"},
		{"host:10809", "vm-root", "nbd://host:10809/vm-root"},
		{":10809", "a", "nbd://localhost:10809/a"},
		{"[::]:1", "a", "nbd://localhost:1/a"},
		{"[::1]:1", "a", "nbd://[::1]:1/a"},
		{"[fe80::1%eth0]:1", "a", "nbd://[fe80::1%25eth0]:1/a"},
	} {
		a, err := Parse(c.addr)
		require.NoError(t, err)
		require.Equal(t, c.want, NBDURI(a, c.name))
		require.Equal(t, strings.Replace(c.want, "nbd", "nbds", 1), NBDSURI(a, c.name))
	}
}

func TestNamedKeepsTheHostName(t *testing.T) {
	for _, c := range [][3]string{
		{"localhost:0", "127.0.0.1:99", "tcp://localhost:99"},
		{"127.0.0.1:0", "127.0.0.1:99", "tcp://127.0.0.1:99"},
		{"[::1]:0", "[::1]:99", "tcp://[::1]:99"},
		{":0", "[::]:99", "tcp://[::]:99"},
		{"unix:///s", "unix:///s", "unix:///s"},
	} {
		a, err := Parse(c[0])
		require.NoError(t, err)
		bound, err := Parse(c[1])
		require.NoError(t, err)
		require.Equal(t, c[2], a.Named(bound).String())
	}
}

func TestAddrIsText(t *testing.T) {
	var a Addr
	require.True(t, a.IsZero())
	require.NoError(t, a.UnmarshalText([]byte("host:1")))
	text, err := a.MarshalText()
	require.NoError(t, err)
	require.Equal(t, "tcp://host:1", string(text))
	require.Error(t, a.UnmarshalText([]byte("host")))
}
