package tlsdir

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"syscall"
	"time"
)

// drainTime is how long one that was refused is listened to.
const drainTime = time.Second

// drain reads what one that was refused had sent already. To close with that
// unread would be a reset, which overtakes the alert that says why.
func drain(c net.Conn) {
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite() // it is closed in a moment anyway
	}
	if c.SetReadDeadline(time.Now().Add(drainTime)) == nil {
		_, _ = io.CopyN(io.Discard, c, 1<<20) // what it was does not matter
	}
}

// explainServer says what is wrong with the server at host, and what to do.
func (d *Dir) explainServer(err error, host string) error {
	var (
		stranger x509.UnknownAuthorityError
		name     x509.HostnameError
		invalid  x509.CertificateInvalidError
		record   tls.RecordHeaderError
	)
	switch {
	case errors.As(err, &stranger):
		err = fmt.Errorf("the other side's certificate is not signed by a CA of %s: use certificates of one CA on both sides", d.file(caFile))
	case errors.As(err, &name):
		err = fmt.Errorf("the other side's certificate is for %s, not for %q: connect by a name that it has, or give it one for this name (subjectAltName)",
			quoted(name.Certificate.DNSNames), host)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		err = fmt.Errorf("the other side's certificate %s: renew it there, or mend the clock here", validity(invalid.Cert))
	case errors.As(err, &invalid) && invalid.Reason == x509.IncompatibleUsage:
		err = errors.New("the other side's certificate may not be used by a server: make one with extendedKeyUsage=serverAuth,clientAuth")
	case isAlert(err):
		return d.explainRead(err)
	case errors.As(err, &record), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF),
		errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		// One that does not speak TLS may have said something before it hangs
		// up, or not: which of the two it was is chance. One that does speak it
		// and does not want us sends an alert.
		err = errNoTLSServer
	}
	return &HandshakeError{err}
}

// explainRead says what it means that the server sent an alert.
func (d *Dir) explainRead(err error) error {
	if !isAlert(err) {
		return err
	}
	var op *net.OpError
	errors.As(err, &op)
	return &HandshakeError{fmt.Errorf("the other side does not accept our certificate %s (%w): it has to be signed by its CA, valid by its clock and, if it has --tls-allow, be for one of these names",
		d.file(certFile), op.Err)}
}

// isAlert says that err is what the other side said before it closed.
func isAlert(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error"
}

// explainClient says why one that connected was not let in.
func explainClient(err error) error {
	var record tls.RecordHeaderError
	switch {
	case errors.As(err, &record):
		err = errNoTLS
	case errors.Is(err, io.EOF):
		err = errors.New("the other side closed the connection in the handshake")
	}
	return &HandshakeError{err}
}

// validity says when a certificate is not valid.
func validity(c *x509.Certificate) string {
	if now := time.Now(); now.Before(c.NotBefore) {
		return "is not valid before " + c.NotBefore.UTC().Format(time.RFC3339)
	}
	return "has expired on " + c.NotAfter.UTC().Format(time.RFC3339)
}

func (d *Dir) file(name string) string { return filepath.Join(d.path, name) }
