package tlsdir

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/internal/tlsdir/tlstest"
)

func authority(t *testing.T) *tlstest.Authority {
	t.Helper()
	a, err := tlstest.NewAuthority()
	require.NoError(t, err)
	return a
}

// certs is a directory with a certificate of a.
func certs(t *testing.T, a *tlstest.Authority, l tlstest.Leaf) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "c")
	require.NoError(t, a.Write(dir, l))
	return dir
}

func open(t *testing.T, dir string, o Options) *Dir {
	t.Helper()
	d, err := Open(dir, o)
	require.NoError(t, err)
	return d
}

// shake lets client connect to server by the name host, say a word and hear
// one. It returns why either did not get that far.
func shake(t *testing.T, server, client *Dir, host string) (serverErr, clientErr error) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	done := make(chan error, 1)
	go func() {
		done <- func() error {
			c, err := ln.Accept()
			if err != nil {
				return err
			}
			s, err := server.Server(t.Context(), c)
			if err != nil {
				return err
			}
			defer s.Close()
			var word [4]byte
			if _, err := io.ReadFull(s, word[:]); err != nil {
				return err
			}
			_, err = s.Write(word[:])
			return err
		}()
	}()
	clientErr = func() error {
		conn, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			return err
		}
		c, err := client.Client(t.Context(), conn, host)
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write([]byte("word")); err != nil {
			return err
		}
		_, err = io.ReadFull(c, make([]byte, 4))
		return err
	}()
	return <-done, clientErr
}

func TestBothSidesAreChecked(t *testing.T) {
	a, other := authority(t), authority(t)
	good := certs(t, a, tlstest.Leaf{CommonName: "good", DNSNames: []string{"disk.example"}})
	// One who trusts everybody, and was signed by somebody else.
	stranger := certs(t, other, tlstest.Leaf{CommonName: "stranger", DNSNames: []string{"disk.example"}})
	mixed := certs(t, other, tlstest.Leaf{CommonName: "stranger", DNSNames: []string{"disk.example"}})
	ca, err := os.ReadFile(filepath.Join(good, caFile))
	require.NoError(t, err)
	f, err := os.OpenFile(filepath.Join(mixed, caFile), os.O_APPEND|os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = f.Write(ca)
	require.NoError(t, err)
	require.NoError(t, f.Close())

	for _, c := range []struct {
		name           string
		server, client string
		allow          []string
		host           string
		server1        string // what the server's error holds; empty: none
		client1        string
	}{
		{"all is well", good, good, nil, "disk.example", "", ""},
		{"no name of a socket", good, good, nil, "", "", ""},
		{"no name of an address", good, good, nil, "fe80::1%eth0", "", ""},
		{"wrong name", good, good, nil, "db.example", "bad certificate", `is for "disk.example", not for "db.example"`},
		{"server of another CA", mixed, good, nil, "disk.example", "bad certificate", "is not signed by a CA of " + good},
		{"server of another CA on a socket", mixed, good, nil, "", "bad certificate", "is not signed by a CA of " + good},
		{"client of another CA", good, mixed, nil, "disk.example", "unknown authority", "does not accept our certificate " + mixed},
		{"both of another CA", good, stranger, nil, "", "", "is not signed by a CA of " + stranger},
		{"allowed by common name", good, good, []string{"x", "Good"}, "", "", ""},
		{"allowed by DNS name", good, good, []string{"DISK.example"}, "", "", ""},
		{"not allowed", good, good, []string{"disk", "example"}, "", `is for "good", "disk.example", which --tls-allow does not name`, "does not accept our certificate"},
	} {
		t.Run(c.name, func(t *testing.T) {
			serverErr, clientErr := shake(t,
				open(t, c.server, Options{Listen: true, Allow: c.allow}), open(t, c.client, Options{Dial: true}), c.host)
			var failed *HandshakeError
			if c.client1 == "" {
				require.NoError(t, serverErr)
				require.NoError(t, clientErr)
				return
			}
			require.ErrorContains(t, clientErr, c.client1)
			require.ErrorAs(t, clientErr, &failed)
			require.ErrorContains(t, serverErr, c.server1)
			require.ErrorAs(t, serverErr, &failed)
		})
	}
}

// A certificate that expires while the program runs, or is renewed.
func TestFilesAreReadAgainForEachConnection(t *testing.T) {
	a := authority(t)
	dir := certs(t, a, tlstest.Leaf{CommonName: "first"})
	var log bytes.Buffer
	server := open(t, dir, Options{Listen: true, Log: slog.New(slog.NewTextHandler(&log, nil))})
	client := open(t, certs(t, a, tlstest.Leaf{}), Options{Dial: true})
	common := func() string {
		ours, theirs := net.Pipe()
		defer ours.Close()
		go func() {
			s, err := server.Server(t.Context(), theirs)
			if err == nil {
				s.Close()
			}
		}()
		c, err := client.Client(t.Context(), ours, "")
		require.NoError(t, err)
		return c.(*clientConn).ConnectionState().PeerCertificates[0].Subject.CommonName
	}
	require.Equal(t, "first", common())
	require.NoError(t, a.Write(dir, tlstest.Leaf{CommonName: "second"}))
	require.Equal(t, "second", common())
	require.Empty(t, log.String())

	require.NoError(t, os.WriteFile(filepath.Join(dir, keyFile), []byte("half a ke"), 0o600))
	for range 3 {
		require.Equal(t, "second", common())
	}
	require.Equal(t, 1, bytes.Count(log.Bytes(), []byte("key.pem: holds no key in PEM form")), log.String())
	require.NoError(t, a.Write(dir, tlstest.Leaf{CommonName: "third"}))
	require.Equal(t, "third", common())
}

func TestOldTLSIsRefused(t *testing.T) {
	a := authority(t)
	dir := certs(t, a, tlstest.Leaf{})
	server, id := open(t, dir, Options{Listen: true}), open(t, dir, Options{Dial: true}).current()
	ours, theirs := net.Pipe()
	defer ours.Close()
	failed := make(chan error, 1)
	go func() {
		_, err := server.Server(t.Context(), theirs)
		failed <- err
	}()
	c := tls.Client(ours, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, Certificates: []tls.Certificate{id.cert}})
	require.ErrorContains(t, c.HandshakeContext(t.Context()), "protocol version")
	ours.Close()
	require.ErrorContains(t, <-failed, "unsupported versions")
}

func TestHandshakeEndsWithItsContext(t *testing.T) {
	dir := certs(t, authority(t), tlstest.Leaf{})
	for name, shake := range map[string]func(context.Context, net.Conn) error{
		"server": func(ctx context.Context, c net.Conn) error {
			_, err := open(t, dir, Options{Listen: true}).Server(ctx, c)
			return err
		},
		"client": func(ctx context.Context, c net.Conn) error {
			_, err := open(t, dir, Options{Dial: true}).Client(ctx, c, "")
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := net.Pipe()
			defer theirs.Close()
			go io.Copy(io.Discard, theirs)
			ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Millisecond, io.ErrNoProgress)
			defer cancel()
			require.ErrorIs(t, shake(ctx, ours), io.ErrNoProgress)
			_, err := ours.Write([]byte{0})
			require.Error(t, err, "the connection is closed")
		})
	}
}

func TestPeerWithoutTLSIsNamed(t *testing.T) {
	dir := certs(t, authority(t), tlstest.Leaf{})
	for name, shake := range map[string]func(net.Conn) error{
		"server": func(c net.Conn) error {
			_, err := open(t, dir, Options{Listen: true}).Server(t.Context(), c)
			return err
		},
		"client": func(c net.Conn) error {
			_, err := open(t, dir, Options{Dial: true}).Client(t.Context(), c, "")
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := net.Pipe()
			go io.Copy(io.Discard, theirs)
			go theirs.Write(bytes.Repeat([]byte("no TLS"), 10))
			err := shake(ours)
			want := map[string]error{"server": errNoTLS, "client": errNoTLSServer}
			require.ErrorIs(t, err, want[name])
			theirs.Close()
		})
	}
}

func TestPeerThatClosesIsNamed(t *testing.T) {
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	require.NoError(t, err)
	defer ln.Close()
	go func() {
		if c, err := ln.Accept(); err == nil {
			c.Close()
		}
	}()
	ours, err := net.Dial("unix", ln.Addr().String())
	require.NoError(t, err)
	_, err = open(t, certs(t, authority(t), tlstest.Leaf{}), Options{Dial: true}).Client(t.Context(), ours, "")
	require.ErrorIs(t, err, errNoTLSServer)
}

func TestUnusableFilesAreNamed(t *testing.T) {
	a := authority(t)
	both := Options{Listen: true, Dial: true}
	good := certs(t, a, tlstest.Leaf{})
	other := certs(t, authority(t), tlstest.Leaf{})
	for _, c := range []struct {
		name, file string
		content    string // a path of a file to take, else the text itself; "-" removes the file
		want       string
	}{
		{"no CA", caFile, "-", caFile + ": does not exist: put the certificate of the CA"},
		{"no certificate", certFile, "-", certFile + ": does not exist: put this side's certificate"},
		{"no key", keyFile, "-", keyFile + ": does not exist: put the private key"},
		{"empty CA", caFile, "", caFile + ": holds no certificate in PEM form"},
		{"CA that is a key", caFile, filepath.Join(good, keyFile), caFile + ": holds no certificate in PEM form"},
		{"certificate that is a key", certFile, filepath.Join(good, keyFile), certFile + ": holds no certificate in PEM form"},
		{"broken certificate", certFile, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", certFile + ": holds no certificate that can be understood"},
		{"key that is a certificate", keyFile, filepath.Join(good, certFile), keyFile + ": is not the key of"},
		{"key of another", keyFile, filepath.Join(other, keyFile), keyFile + ": is not the key of"},
		{"empty key", keyFile, "", keyFile + ": holds no key in PEM form"},
		{"locked key", keyFile, "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n", keyFile + ": is locked by a passphrase"},
		{"CA of another", caFile, filepath.Join(other, caFile), certFile + ": is not signed by a CA of "},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := certs(t, a, tlstest.Leaf{})
			path := filepath.Join(dir, c.file)
			require.NoError(t, os.Remove(path))
			if c.content != "-" {
				b, err := os.ReadFile(c.content)
				if err != nil {
					b = []byte(c.content)
				}
				// Certificate and key have to fit for what is behind them to be looked at.
				require.NoError(t, os.WriteFile(path, b, 0o600))
			}
			_, err := Open(dir, both)
			require.ErrorContains(t, err, dir+"/"+c.want)
		})
	}
	for _, c := range []struct {
		leaf tlstest.Leaf
		o    Options
		want string // empty: fine
	}{
		{tlstest.Leaf{Ends: -time.Hour}, both, "has expired on 20"},
		{tlstest.Leaf{Usage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, Options{Listen: true}, ""},
		{tlstest.Leaf{Usage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, both, "is not for one that connects"},
		{tlstest.Leaf{Usage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}, Options{Dial: true}, ""},
		{tlstest.Leaf{Usage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}, both, "is not for one that listens"},
	} {
		_, err := Open(certs(t, a, c.leaf), c.o)
		if c.want == "" {
			require.NoError(t, err)
			continue
		}
		require.ErrorContains(t, err, c.want)
	}
	for _, dir := range []string{filepath.Join(t.TempDir(), "none"), filepath.Join(good, certFile)} {
		_, err := Open(dir, both)
		require.EqualError(t, err, dir+": want a directory with ca-cert.pem, cert.pem and key.pem")
	}
}
