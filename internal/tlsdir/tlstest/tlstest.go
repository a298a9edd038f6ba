// Package tlstest makes certificates for tests.
package tlstest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"time"
)

// Authority signs certificates.
type Authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// Leaf says what a certificate is like. The zero value: for "silo-nbd test",
// valid from an hour ago for a day, for servers and clients.
type Leaf struct {
	CommonName string
	DNSNames   []string
	Ends       time.Duration      // from now, may be negative; 0: a day
	Usage      []x509.ExtKeyUsage // nil: servers and clients
}

// NewAuthority makes one, with a key of its own.
func NewAuthority() (*Authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	a := &Authority{key: key}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "silo-nbd test CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotAfter: time.Now().Add(24 * time.Hour),
	}
	a.cert, err = a.sign(template, template, key)
	return a, err
}

func (a *Authority) sign(template, parent *x509.Certificate, key *ecdsa.PrivateKey) (*x509.Certificate, error) {
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore = time.Now().Add(-48 * time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, a.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// Write makes a certificate and puts it into dir, which is made: ca-cert.pem,
// cert.pem and key.pem, and the latter two once more under the names that
// libnbd and QEMU look for in clients.
func (a *Authority) Write(dir string, l Leaf) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	if l.CommonName == "" {
		l.CommonName = "silo-nbd test"
	}
	if l.Ends == 0 {
		l.Ends = 24 * time.Hour
	}
	if l.Usage == nil {
		l.Usage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	}
	cert, err := a.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: l.CommonName}, DNSNames: l.DNSNames, NotAfter: time.Now().Add(l.Ends),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: l.Usage, BasicConstraintsValid: true,
	}, a.cert, key)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for name, block := range map[string]*pem.Block{
		"ca-cert.pem":     {Type: "CERTIFICATE", Bytes: a.cert.Raw},
		"cert.pem":        {Type: "CERTIFICATE", Bytes: cert.Raw},
		"client-cert.pem": {Type: "CERTIFICATE", Bytes: cert.Raw},
		"key.pem":         {Type: "PRIVATE KEY", Bytes: private},
		"client-key.pem":  {Type: "PRIVATE KEY", Bytes: private},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			return err
		}
	}
	return nil
}
