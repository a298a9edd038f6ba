package nbdclient

import (
	"fmt"
	"net"
	"net/url"
	"strings"
)

// defaultPort is where a server listens whose URI names no port.
const defaultPort = "10809"

// Target is what an NBD URI names: an export and the socket it is reached by.
type Target struct {
	Network string // "tcp" or "unix", as net.Dial takes it
	Address string // host:port, or the path of the unix socket
	Host    string // the name or IP address of the host, empty for a unix socket
	TLS     bool   // the whole connection has to be TLS
	Export  string // the name of the export; "" is the server's default one
}

// IsURI says whether s looks like an NBD URI rather than a path.
func IsURI(s string) bool {
	scheme, _, found := strings.Cut(s, "://")
	return found && strings.HasPrefix(scheme, "nbd")
}

// ParseURI reads an NBD URI: nbd://HOST[:PORT]/EXPORT or
// nbd+unix:///EXPORT?socket=PATH, and with TLS nbds:// and nbds+unix://.
func ParseURI(s string) (Target, error) {
	u, err := url.Parse(s)
	if err != nil {
		return Target{}, fmt.Errorf("%q is no NBD URI: %w", s, err)
	}
	t := Target{Export: strings.TrimPrefix(u.Path, "/"), TLS: strings.HasPrefix(u.Scheme, "nbds")}
	switch u.Scheme {
	case "nbd", "nbd+tcp", "nbds", "nbds+tcp":
		if u.Hostname() == "" {
			return Target{}, fmt.Errorf("%q is no NBD URI: it names no host", s)
		}
		port := u.Port()
		if port == "" {
			port = defaultPort
		}
		t.Network, t.Address, t.Host = "tcp", net.JoinHostPort(u.Hostname(), port), u.Hostname()
	case "nbd+unix", "nbds+unix":
		t.Network, t.Address = "unix", u.Query().Get("socket")
		if t.Address == "" {
			return Target{}, fmt.Errorf("%q is no NBD URI: it names no socket (want nbd+unix:///EXPORT?socket=PATH)", s)
		}
	default:
		return Target{}, fmt.Errorf("%q is no NBD URI: want nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH", s)
	}
	return t, nil
}

// String is the URI of the target, the same for all ways to write it.
func (t Target) String() string {
	u := url.URL{Scheme: "nbd", Host: t.Address, Path: "/" + t.Export}
	if t.TLS {
		u.Scheme = "nbds"
	}
	if t.Network == "unix" {
		u.Scheme += "+unix"
		u.Host = ""
		return u.Scheme + "://" + u.EscapedPath() + "?" + url.Values{"socket": {t.Address}}.Encode()
	}
	return u.String()
}
