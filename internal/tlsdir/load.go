package tlsdir

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// The files of a directory.
const (
	caFile   = "ca-cert.pem"
	certFile = "cert.pem"
	keyFile  = "key.pem"
)

// maxFile bounds what is read of one, in bytes.
const maxFile = 4 << 20

// identity is what the files hold.
type identity struct {
	cert        tls.Certificate
	authorities *x509.CertPool
}

// load reads the files, and checks what the other side would refuse: it can
// say here what to do, and would only be closed on there.
func load(dir string, o Options) (*identity, error) {
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		return nil, fmt.Errorf("%s: want a directory with %s, %s and %s", dir, caFile, certFile, keyFile)
	}
	ca, err := read(dir, caFile, "the certificate of the CA that signs for both sides")
	if err != nil {
		return nil, err
	}
	cert, err := read(dir, certFile, "this side's certificate, signed by that CA")
	if err != nil {
		return nil, err
	}
	key, err := read(dir, keyFile, "the private key of "+certFile)
	if err != nil {
		return nil, err
	}
	id := &identity{authorities: x509.NewCertPool()}
	if !id.authorities.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%s: holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)", filepath.Join(dir, caFile))
	}
	if id.cert, err = keyPair(dir, cert, key); err != nil {
		return nil, err
	}
	return id, id.check(dir, o)
}

func read(dir, name, what string) ([]byte, error) {
	path := filepath.Join(dir, name)
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a FIFO is no reason to hang
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%s: does not exist: put %s there, in PEM form", path, what)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s: may not be read by this user: it is %s", path, what)
	case err != nil:
		return nil, err
	}
	defer f.Close() // only read from
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxFile {
		return nil, fmt.Errorf("%s: is not a regular file of at most 4 MiB: want %s, in PEM form", path, what)
	}
	b := make([]byte, info.Size())
	n, err := f.ReadAt(b, 0)
	if n < len(b) {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return b, nil
}

// keyPair puts certificate and key together.
func keyPair(dir string, cert, key []byte) (tls.Certificate, error) {
	certPath, keyPath := filepath.Join(dir, certFile), filepath.Join(dir, keyFile)
	if b, _ := pem.Decode(cert); b == nil || b.Type != "CERTIFICATE" {
		return tls.Certificate{}, fmt.Errorf("%s: holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)", certPath)
	}
	switch b, _ := pem.Decode(key); {
	case b == nil:
		return tls.Certificate{}, fmt.Errorf("%s: holds no key in PEM form (-----BEGIN PRIVATE KEY-----)", keyPath)
	case b.Type == "ENCRYPTED PRIVATE KEY", b.Headers["DEK-Info"] != "":
		return tls.Certificate{}, fmt.Errorf("%s: is locked by a passphrase: store it without one, mode 0600 (openssl pkey -in %s)", keyPath, keyFile)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err == nil {
		return pair, nil
	}
	if leaf := firstCertificate(cert); leaf == nil {
		return pair, fmt.Errorf("%s: holds no certificate that can be understood: make it again", certPath)
	}
	return pair, fmt.Errorf("%s: is not the key of %s (%w): put the two that were made together there", keyPath, certPath, err)
}

func firstCertificate(b []byte) *x509.Certificate {
	block, _ := pem.Decode(b)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil
	}
	return cert
}

// check says what the other side would refuse.
func (id *identity) check(dir string, o Options) error {
	leaf, path := id.cert.Leaf, filepath.Join(dir, certFile)
	for _, use := range []struct {
		wanted bool
		usage  x509.ExtKeyUsage
		what   string
	}{
		{true, x509.ExtKeyUsageAny, ""},
		{o.Listen, x509.ExtKeyUsageServerAuth, "is not for one that listens: make it with extendedKeyUsage=serverAuth,clientAuth, or without"},
		{o.Dial, x509.ExtKeyUsageClientAuth, "is not for one that connects: make it with extendedKeyUsage=serverAuth,clientAuth, or without"},
	} {
		if !use.wanted {
			continue
		}
		_, err := leaf.Verify(x509.VerifyOptions{Roots: id.authorities, Intermediates: id.intermediates(), KeyUsages: []x509.ExtKeyUsage{use.usage}})
		var invalid x509.CertificateInvalidError
		switch {
		case err == nil:
		case errors.As(err, &invalid) && invalid.Reason == x509.Expired && invalid.Cert.Equal(leaf):
			return fmt.Errorf("%s: %s: renew it, or mend the clock", path, validity(leaf))
		case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
			return fmt.Errorf("%s: the CA's certificate %s: renew it, or mend the clock", filepath.Join(dir, caFile), validity(invalid.Cert))
		case use.what != "":
			return fmt.Errorf("%s: %s", path, use.what)
		default:
			return fmt.Errorf("%s: is not signed by a CA of %s (%w): put the CA that signed it there, or have it signed by that one",
				path, filepath.Join(dir, caFile), err)
		}
	}
	return nil
}

// intermediates are what follows our own certificate in its file.
func (id *identity) intermediates() *x509.CertPool {
	pool := x509.NewCertPool()
	for _, der := range id.cert.Certificate[1:] {
		if c, err := x509.ParseCertificate(der); err == nil {
			pool.AddCert(c) // one that cannot be understood signs nothing
		}
	}
	return pool
}

// verifyServer checks the certificates of a server but for its name.
func (id *identity) verifyServer(chain []*x509.Certificate) error {
	pool := x509.NewCertPool()
	for _, c := range chain[1:] {
		pool.AddCert(c)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{
		Roots: id.authorities, Intermediates: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	return err
}
