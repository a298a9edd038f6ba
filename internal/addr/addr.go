// Package addr parses the addresses of the command line, and dials and listens
// on them: host:port, tcp://host:port or unix:///path.
package addr

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
)

// maxSocketPath is the longest path of a unix socket in bytes (sun_path
// without its final NUL).
const maxSocketPath = 107

// Addr is where to listen or what to dial. The zero value is no address.
type Addr struct {
	network string // "tcp" or "unix"
	host    string // tcp: name or IP without brackets; empty: every address
	port    string // tcp: a number
	path    string // unix: absolute
}

// Parse understands host:port, tcp://host:port and unix:///path.
func Parse(s string) (Addr, error) {
	scheme, rest, found := strings.Cut(s, "://")
	switch {
	case s == "":
		return Addr{}, errors.New("the address is empty: want host:port or unix:///path")
	case !found:
		return parseTCP(s, s)
	case scheme == "tcp":
		return parseTCP(s, rest)
	case scheme == "unix":
		return parseUnix(s, rest)
	}
	return Addr{}, fmt.Errorf("%q has an unknown scheme %q: want host:port, tcp://host:port or unix:///path", s, scheme)
}

func parseTCP(s, hostPort string) (Addr, error) {
	host, port, err := net.SplitHostPort(hostPort)
	if err != nil || strings.ContainsAny(host, "/ ") {
		return Addr{}, fmt.Errorf("%q is not an address: want host:port, [ipv6]:port or unix:///path", s)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || strconv.FormatUint(n, 10) != port {
		return Addr{}, fmt.Errorf("%q has no usable port: want a number from 0 to 65535 after the last colon", s)
	}
	return Addr{network: "tcp", host: host, port: port}, nil
}

// Unix is the address of the unix socket at path, which need not be absolute;
// unix:///path is understood, too.
func Unix(path string) (Addr, error) {
	if rest, found := strings.CutPrefix(path, "unix://"); found {
		return parseUnix(path, rest)
	}
	if path == "" {
		return Addr{}, errors.New("the path is empty: want that of a unix socket")
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return Addr{}, err
	}
	if strings.HasSuffix(path, "/") {
		abs += "/" // which Abs has removed
	}
	return parseUnix(path, abs)
}

func parseUnix(s, path string) (Addr, error) {
	switch {
	case !filepath.IsAbs(path):
		return Addr{}, fmt.Errorf("%q has no absolute path: want three slashes, as in unix:///run/silo.sock", s)
	case strings.ContainsRune(path, 0):
		return Addr{}, fmt.Errorf("%q holds a NUL byte: want a path", s)
	case strings.HasSuffix(path, "/"):
		return Addr{}, fmt.Errorf("%q is a directory: want the path of a socket in it", s)
	}
	path = filepath.Clean(path)
	if len(path) > maxSocketPath {
		return Addr{}, fmt.Errorf("%q: the path has %d bytes and a unix socket takes %d: choose a shorter one",
			s, len(path), maxSocketPath)
	}
	return Addr{network: "unix", path: path}, nil
}

// Of returns the Addr of a listener's or connection's own address; a listener
// on port 0 has its real port there. Other networks give the zero Addr.
func Of(a net.Addr) Addr {
	switch a := a.(type) {
	case *net.TCPAddr:
		host, port, err := net.SplitHostPort(a.String())
		if err != nil {
			return Addr{} // a TCPAddr prints as host:port
		}
		return Addr{network: "tcp", host: host, port: port}
	case *net.UnixAddr:
		return Addr{network: "unix", path: a.Name}
	}
	return Addr{}
}

// String writes the address so that Parse takes it back.
func (a Addr) String() string {
	switch a.network {
	case "tcp":
		return "tcp://" + a.hostPort()
	case "unix":
		return "unix://" + a.path
	}
	return ""
}

// Network is "tcp", "unix" or, of the zero Addr, "".
func (a Addr) Network() string { return a.network }

// Path is the path of a unix socket, else empty.
func (a Addr) Path() string { return a.path }

// Host is the name or IP address of a TCP address without brackets, else empty.
func (a Addr) Host() string { return a.host }

// Named is bound, the real address of a listener on a, with the host name by
// which a was given, if it was: that is what stands in a certificate.
func (a Addr) Named(bound Addr) Addr {
	if _, err := netip.ParseAddr(a.host); err != nil && a.host != "" {
		bound.host = a.host
	}
	return bound
}

// IsZero says that a is no address.
func (a Addr) IsZero() bool { return a.network == "" }

// IsLocal says that only processes of this machine can be at the other end: a
// unix socket or a loopback address. An empty host is every address and not local.
func (a Addr) IsLocal() bool {
	if a.network == "unix" || a.host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(a.host)
	return err == nil && ip.Unmap().IsLoopback()
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (a *Addr) UnmarshalText(text []byte) (err error) {
	*a, err = Parse(string(text))
	return err
}

// MarshalText implements encoding.TextMarshaler.
func (a Addr) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

func (a Addr) hostPort() string { return net.JoinHostPort(a.host, a.port) }

// dialTarget is what package net takes to reach a.
func (a Addr) dialTarget() string {
	if a.network == "unix" {
		return a.path
	}
	return a.hostPort()
}

// NBDURI is the URI under which an NBD client reaches the export called name on
// a server that listens on a. A server on every address is reached as localhost.
func NBDURI(a Addr, name string) string { return uri("nbd", a, name) }

// NBDSURI is NBDURI for a server that wants TLS.
func NBDSURI(a Addr, name string) string { return uri("nbds", a, name) }

func uri(scheme string, a Addr, name string) string {
	if a.network == "unix" {
		return scheme + "+unix:///" + Escape(name) + "?socket=" + Escape(a.path)
	}
	host := a.host
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		host = "localhost"
	}
	return scheme + "://" + escapeHost(net.JoinHostPort(host, a.port)) + "/" + Escape(name)
}

// Escape writes s as one word by percent-encoding that means the same in the
// path and in the query of a URI: no "+" for a space, and slashes stay readable.
func Escape(s string) string {
	return strings.NewReplacer("+", "%20", "%2F", "/").Replace(url.QueryEscape(s))
}

// escapeHost keeps the zone of a link-local IPv6 address valid (RFC 6874).
func escapeHost(s string) string { return strings.Replace(s, "%", "%25", 1) }
