// Package tlsdir makes mutual TLS 1.3 out of a directory with three files:
// ca-cert.pem, the certificates of those who sign; cert.pem and key.pem, who we
// are. It is the same directory for those who listen and those who connect.
package tlsdir

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
)

// Options say what the certificates are used for.
type Options struct {
	// Listen and Dial say on which end of connections the certificate is shown:
	// one that may not be used for it is refused by Open.
	Listen, Dial bool
	// Allow is the names of which the certificate of one who connects must have
	// one, as its common name or a DNS name; empty: everybody whom the CA signed.
	Allow []string
	Log   *slog.Logger // told when the files have become unusable; nil: nobody
}

// Dir is a directory of certificates. The files are read again for each
// connection, so that a certificate can be renewed under a running program.
// All methods may be called from any goroutine.
type Dir struct {
	path string
	o    Options

	mu     sync.Mutex // never held over I/O
	last   *identity  // the last that was usable; guarded by mu
	broken string     // what was said last about files that are not; guarded by mu
}

// Open reads the directory. Its errors name the file and what to do.
func Open(path string, o Options) (*Dir, error) {
	d := &Dir{path: path, o: o}
	var err error
	d.last, err = load(path, o)
	return d, err
}

// current is who we are now. When the files have become unusable it is who we
// were before, and the log says so.
func (d *Dir) current() *identity {
	id, err := load(d.path, d.o)
	d.mu.Lock()
	if err == nil {
		d.last, d.broken = id, ""
		d.mu.Unlock()
		return id
	}
	fresh := d.broken != err.Error()
	d.broken = err.Error()
	id = d.last
	d.mu.Unlock()
	if fresh && d.o.Log != nil {
		d.o.Log.Warn("the certificates that were read before are used on", "error", err)
	}
	return id
}

// ServerConfig is for one that listens: every client needs a certificate of the
// CA and, with Options.Allow, one of these names.
func (d *Dir) ServerConfig() *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return d.serverConfig(), nil },
	}
}

func (d *Dir) serverConfig() *tls.Config {
	id := d.current()
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{id.cert},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    id.authorities,
		// A certificate is looked at in each handshake, also at its names.
		SessionTicketsDisabled: true,
		VerifyConnection:       func(s tls.ConnectionState) error { return d.allowed(s.PeerCertificates[0]) },
	}
}

// allowed says why a client may not come in, if so.
func (d *Dir) allowed(cert *x509.Certificate) error {
	if len(d.o.Allow) == 0 {
		return nil
	}
	names := Names(cert)
	for _, name := range names {
		if slices.ContainsFunc(d.o.Allow, func(a string) bool { return strings.EqualFold(a, name) }) {
			return nil
		}
	}
	return fmt.Errorf("the certificate is for %s, which --tls-allow does not name", quoted(names))
}

// Names are what a certificate says of whom it is for: its common name and its
// DNS names.
func Names(cert *x509.Certificate) []string {
	names := slices.Clone(cert.DNSNames)
	if cn := cert.Subject.CommonName; cn != "" && !slices.Contains(names, cn) {
		names = slices.Insert(names, 0, cn)
	}
	return names
}

func quoted(names []string) string {
	if len(names) == 0 {
		return "nobody by name"
	}
	q := make([]string, len(names))
	for i, n := range names {
		q[i] = fmt.Sprintf("%.100q", n)
	}
	return strings.Join(q[:min(len(q), 8)], ", ")
}

// clientConfig is for one that connects to host. A host name must be one of
// the server's certificate. An IP address or a socket's path is no name that
// would be in one: there the CA's signature has to do.
func (d *Dir) clientConfig(host string) *tls.Config {
	id := d.current()
	c := &tls.Config{
		MinVersion: tls.VersionTLS13,
		RootCAs:    id.authorities,
		ServerName: host,
		// Shown whatever the server asks for: its answer says what is wrong with it.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &id.cert, nil },
	}
	if host == "" || net.ParseIP(strings.Split(host, "%")[0]) != nil {
		c.ServerName = ""
		c.InsecureSkipVerify = true // of the name alone: the rest is done here
		c.VerifyConnection = func(s tls.ConnectionState) error { return id.verifyServer(s.PeerCertificates) }
	}
	return c
}

// Client makes a connection to host one of TLS; host is empty for a unix
// socket. When it fails, and only then, it closes the connection.
func (d *Dir) Client(ctx context.Context, c net.Conn, host string) (net.Conn, error) {
	t := tls.Client(c, d.clientConfig(host))
	if err := t.HandshakeContext(ctx); err != nil {
		c.Close() // the error to report is the one before
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, d.explainServer(err, host)
	}
	return &clientConn{t, d}, nil
}

// clientConn is the end that connected. In TLS 1.3 it hears only from its first
// Read whether the server has taken its certificate.
type clientConn struct {
	*tls.Conn
	dir *Dir
}

// Read implements net.Conn.
func (c *clientConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil {
		err = c.dir.explainRead(err)
	}
	return n, err
}

// Server makes a connection that was accepted one of TLS. When it fails, and
// only then, it closes the connection.
func (d *Dir) Server(ctx context.Context, c net.Conn) (*tls.Conn, error) {
	t := tls.Server(c, d.ServerConfig())
	err := t.HandshakeContext(ctx)
	if err == nil {
		return t, nil
	}
	if ctx.Err() == nil {
		drain(c)
	}
	c.Close() // the error to report is the one before
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return nil, explainClient(err)
}

// HandshakeError is the end of a connection that was there, but came to
// nothing because of what the other side is: trying again soon does not help.
type HandshakeError struct{ Err error }

func (e *HandshakeError) Error() string { return "TLS: " + e.Err.Error() }

// Unwrap gives the reason.
func (e *HandshakeError) Unwrap() error { return e.Err }

// What a client is told of a server that does not speak TLS, and the log of the
// server of such a client.
var (
	errNoTLSServer = errors.New("the other side does not speak TLS, or hung up: give it --tls, or take it away here")
	errNoTLS       = errors.New("the other side does not speak TLS: give it --tls, or take it away here")
)
