package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/silo-nbd/silo-nbd/internal/addr"
	"github.com/silo-nbd/silo-nbd/internal/systemd"
	"github.com/silo-nbd/silo-nbd/internal/tlsdir"
)

// nbdFlag is where NBD is served: an address, or a socket that systemd has opened.
type nbdFlag struct {
	addrFlag
	systemd bool
	name    string // of its socket; empty: the only one
}

func (n *nbdFlag) Set(s string) error {
	name, named := strings.CutPrefix(s, "systemd:")
	if named && name == "" {
		return errors.New("the socket's name is empty: want systemd, or systemd:NAME")
	}
	if named || s == "systemd" {
		*n = nbdFlag{systemd: true}
		if named {
			n.name = name
		}
		return nil
	}
	*n = nbdFlag{}
	return n.addrFlag.Set(s)
}

func (n *nbdFlag) String() string {
	switch {
	case !n.systemd:
		return n.addrFlag.String()
	case n.name == "":
		return "systemd"
	}
	return "systemd:" + n.name
}

// IsZero says that nothing was given.
func (n *nbdFlag) IsZero() bool { return !n.systemd && n.addrFlag.IsZero() }

// listen opens the socket, or takes the one that systemd has opened, which must
// not be more public than one of ours may be.
func (n *nbdFlag) listen(ctx context.Context, w *wireFlags) (net.Listener, error) {
	if !n.systemd {
		return n.addrFlag.Listen(ctx)
	}
	ln, err := systemd.Listener(n.name)
	if err != nil {
		return nil, fmt.Errorf("--nbd %s: %w", n, err)
	}
	if err := w.checkListener("--nbd", addrFlag{addr.Of(ln.Addr())}); err != nil {
		return nil, errors.Join(err, ln.Close())
	}
	return addr.Adopt(ln), nil
}

// tlsListener lets in only who has a certificate of the CA.
func tlsListener(ln net.Listener, certs *tlsdir.Dir) net.Listener {
	return tls.NewListener(ln, certs.ServerConfig())
}
