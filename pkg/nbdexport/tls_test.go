package nbdexport

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// authority signs certificates for a test.
type authority struct {
	t    testing.TB
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	pool *x509.CertPool
}

func newAuthority(t testing.TB) *authority {
	a := &authority{t: t, pool: x509.NewCertPool()}
	a.cert, a.key = a.sign(&x509.Certificate{
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, NotAfter: time.Now().Add(time.Hour),
	})
	a.pool.AddCert(a.cert)
	return a
}

func (a *authority) sign(template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(a.t, err)
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.Subject = pkix.Name{CommonName: "silo-nbd test"}
	template.NotBefore = time.Now().Add(-2 * time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	require.NoError(a.t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(a.t, err)
	return cert, key
}

func (a *authority) leaf(ends time.Duration) tls.Certificate {
	cert, key := a.sign(&x509.Certificate{
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, NotAfter: time.Now().Add(ends),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, KeyUsage: x509.KeyUsageDigitalSignature,
	})
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
}

func (a *authority) server() *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{a.leaf(time.Hour)}, ClientCAs: a.pool,
		ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13,
	}
}

// upgrade goes from NBD_OPT_STARTTLS into TLS.
func (c *rawClient) upgrade(config *tls.Config) *rawClient {
	require.Equal(c.t, repAck, c.outcome(optStartTLS, nil))
	return &rawClient{t: c.t, Conn: tls.Client(c.Conn, config)}
}

// N8
func TestTLSIsMandatoryAndForgetsWhatWasBefore(t *testing.T) {
	a := newAuthority(t)
	d := newDisk(mib)
	_, path := newTestServer(t, Options{TLS: a.server()}, Export{Name: "disk", Backend: d})
	c := dialRaw(t, path)
	c.greet(clientFixedNewstyle)
	for _, opt := range []uint32{
		optList, optInfo, optGo, optStructuredReply, optExtendedHeaders, optSetMetaContext, optListMetaContext, 99,
	} {
		require.Equal(t, repErrTLSReqd, c.outcome(opt, infoData("disk")), opt)
	}
	require.Equal(t, repErrInvalid, c.outcome(optStartTLS, []byte{0}))

	client := &tls.Config{RootCAs: a.pool, ServerName: "localhost", Certificates: []tls.Certificate{a.leaf(time.Hour)}}
	c = c.upgrade(client)
	require.Equal(t, repErrInvalid, c.outcome(optStartTLS, nil), "TLS twice")
	require.Equal(t, repErrInvalid, c.outcome(optSetMetaContext, metaData("disk", contextAllocation)), "structured replies outlived STARTTLS")
	require.Equal(t, repAck, c.outcome(optStructuredReply, nil))
	require.Equal(t, repAck, c.outcome(optGo, infoData("disk")))
	c.mode = modeStructured
	p := make([]byte, 300_000)
	for i := range p {
		p[i] = byte(i)
	}
	c.write(512, p)
	got, err := c.read(0, 512, uint64(len(p)))
	require.Equal(t, ok, err)
	require.Equal(t, p, got)
	c.request(cmdDisc, 0, 0, 0)
	c.wantEnd()
}

// N8: what is sent behind STARTTLS in the clear counts for nothing.
func TestPlaintextBehindStartTLSEndsTheConnection(t *testing.T) {
	a := newAuthority(t)
	d := newDisk(mib)
	_, path := newTestServer(t, Options{TLS: a.server()}, Export{Name: "disk", Backend: d})
	for _, injected := range [][]byte{
		pack(magicOption, uint32(optGo), uint32(len(infoData("disk"))), infoData("disk")), {0}, pack(magicOption),
	} {
		c := dialRaw(t, path)
		c.greet(clientFixedNewstyle)
		c.send(magicOption, uint32(optStartTLS), uint32(0), injected)
		c.wantEnd()
	}
	c := dialRaw(t, path)
	c.greet(0)
	c.send(magicOption, uint32(optExportName), uint32(4), "disk")
	c.wantEnd()
	require.Empty(t, d.called())
}

func TestCertificatesAreChecked(t *testing.T) {
	a, stranger := newAuthority(t), newAuthority(t)
	_, path := newTestServer(t, Options{TLS: a.server()}, Export{Name: "disk", Backend: newDisk(mib)})
	for name, certs := range map[string][]tls.Certificate{
		"none": nil, "of another authority": {stranger.leaf(time.Hour)}, "expired": {a.leaf(-time.Hour)},
	} {
		t.Run(name, func(t *testing.T) {
			c := dialRaw(t, path)
			c.greet(clientFixedNewstyle)
			c = c.upgrade(&tls.Config{RootCAs: a.pool, ServerName: "localhost", Certificates: certs})
			_, _ = c.Write(pack(magicOption, uint32(optList), uint32(0))) // the server may have gone by now
			_, err := c.Read(make([]byte, 1))                             // TLS 1.3: the client learns it here
			require.ErrorContains(t, err, "tls: ")
		})
	}
	t.Run("the server's, by the client", func(t *testing.T) {
		c := dialRaw(t, path)
		c.greet(clientFixedNewstyle)
		c = c.upgrade(&tls.Config{RootCAs: stranger.pool, ServerName: "localhost"})
		_, err := c.Write([]byte{0})
		require.ErrorContains(t, err, "unknown authority")
	})
}
