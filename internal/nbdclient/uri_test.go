package nbdclient

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestParseURI(t *testing.T) {
	for _, c := range []struct {
		uri  string
		want Target
	}{
		{"nbd://host", Target{"tcp", "host:10809", "host", false, ""}},
		{"nbd://host:99/a", Target{"tcp", "host:99", "host", false, "a"}},
		{"nbd://[::1]:99/a/b", Target{"tcp", "[::1]:99", "::1", false, "a/b"}},
		{"nbd+unix:///a?socket=/tmp/n.sock", Target{"unix", "/tmp/n.sock", "", false, "a"}},
		{"nbd+unix://?socket=/tmp/n.sock", Target{"unix", "/tmp/n.sock", "", false, ""}},
		{"nbd+unix:///a%20b?socket=/tmp/x%3Fy.sock", Target{"unix", "/tmp/x?y.sock", "", false, "a b"}},
		{"nbds://host/a", Target{"tcp", "host:10809", "host", true, "a"}},
		{"nbds+unix:///a?socket=/tmp/n.sock", Target{"unix", "/tmp/n.sock", "", true, "a"}},
	} {
		got, err := ParseURI(c.uri)
		require.NoError(t, err, c.uri)
		require.Equal(t, c.want, got, c.uri)
		require.True(t, IsURI(c.uri), c.uri)
	}
}

func TestParseURIRefuses(t *testing.T) {
	for uri, why := range map[string]string{
		"nbd+unix:///a": "no socket",
		"nbds://":       "no host",
		"nbdx://host/a": "no NBD URI",
		"http://host/a": "no NBD URI",
		"nbd:///a":      "no host",
		"/dev/sda":      "no NBD URI",
	} {
		_, err := ParseURI(uri)
		require.ErrorContains(t, err, why, uri)
	}
	require.False(t, IsURI("/dev/sda"))
	require.False(t, IsURI("a://b"))
}

func TestURIOfATarget(t *testing.T) {
	for in, want := range map[string]string{
		"nbd://host":                          "nbd://host:10809/",
		"nbd+tcp://[::1]:99/a/b":              "nbd://[::1]:99/a/b",
		"nbd+unix:///a%20b?socket=/tmp/x%3Fy": "nbd+unix:///a%20b?socket=%2Ftmp%2Fx%3Fy",
		"nbds+unix://?x=1&socket=/tmp/n":      "nbds+unix:///?socket=%2Ftmp%2Fn",
		"nbds://host:1/é":                     "nbds://host:1/%C3%A9",
	} {
		first, err := ParseURI(in)
		require.NoError(t, err)
		require.Equal(t, want, first.String())
		again, err := ParseURI(want)
		require.NoError(t, err)
		require.Equal(t, first, again)
	}
}
