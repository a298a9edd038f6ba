//go:build integration

package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/tlsdir/tlstest"
)

// identities are directories for --tls and for clients.
type identities struct{ good, expired, stranger, none string }

// newIdentities makes certificates: of one authority but for the stranger's.
func newIdentities(t *testing.T) identities {
	t.Helper()
	dir := t.TempDir()
	var as [2]*tlstest.Authority
	for i := range as {
		a, err := tlstest.NewAuthority()
		if err != nil {
			t.Fatal(err)
		}
		as[i] = a
	}
	make := func(name string, a *tlstest.Authority, ends time.Duration) string {
		path := filepath.Join(dir, name)
		if err := a.Write(path, tlstest.Leaf{CommonName: name, DNSNames: []string{"localhost"}, Ends: ends}); err != nil {
			t.Fatal(err)
		}
		return path
	}
	ids := identities{good: make("good", as[0], 0), expired: make("expired", as[0], -time.Hour), stranger: make("stranger", as[1], 0)}
	// One that knows the authority and has nothing to show; the stranger is to get as far as showing its certificate.
	ids.none = filepath.Join(dir, "none")
	if err := os.Mkdir(ids.none, 0o700); err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(filepath.Join(ids.good, "ca-cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{ids.none, ids.stranger} {
		if err := os.WriteFile(filepath.Join(to, "ca-cert.pem"), ca, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return ids
}

// tlsClient is a program that attaches by TLS, with the certificates of a directory.
type tlsClient struct {
	name string
	args func(host, port, dir string) []string
}

func tlsURI(host, port, dir string) string {
	return "nbds://" + host + ":" + port + "/disk0?tls-certificates=" + dir
}

var tlsClients = []tlsClient{
	{name: "nbdinfo", args: func(host, port, dir string) []string { return []string{"--size", tlsURI(host, port, dir)} }},
	{name: "nbdcopy", args: func(host, port, dir string) []string { return []string{tlsURI(host, port, dir), "null:"} }},
	{name: "qemu-img", args: func(host, port, dir string) []string {
		return []string{"info", "--object", "tls-creds-x509,id=t,endpoint=client,dir=" + dir,
			"--image-opts", "driver=nbd,host=" + host + ",port=" + port + ",export=disk0,tls-creds=t"}
	}},
	{name: "qemu-img", args: func(host, port, _ string) []string { // in plain text
		return []string{"info", "--image-opts", "driver=nbd,host=" + host + ",port=" + port + ",export=disk0"}
	}},
	{name: "nbdinfo", args: func(host, port, _ string) []string { // in plain text
		return []string{"--size", "nbd://" + host + ":" + port + "/disk0"}
	}},
	{name: "nbdcopy", args: func(host, port, _ string) []string { // in plain text
		return []string{"nbd://" + host + ":" + port + "/disk0", "null:"}
	}},
}

// TestTLSWithRealClients moves a disk by TLS, and lets clients attach by TLS meanwhile: those with a certificate of the
// authority get in, nobody else does, and the one who is not let in disturbs nobody.
func TestTLSWithRealClients(t *testing.T) {
	need(t, "nbdinfo", "nbdcopy", "qemu-img")
	ids := newIdentities(t)
	disk := randomImage(t, filepath.Join(t.TempDir(), "odd.raw"), oddSize)
	m := migrate(t, how{rate: 16 * mib, tcp: true, stay: true,
		sourceArgs: []string{"--tls", ids.good, "--tls-allow", "good"}, destArgs: []string{"--tls", ids.good}}, disk)
	rest, found := strings.CutPrefix(m.uris[0], "nbds://127.0.0.1:")
	port, _, _ := strings.Cut(rest, "/")
	if !found || port == "" {
		t.Fatalf("ready with %s, want nbds://127.0.0.1:PORT/disk0", m.uris[0])
	}
	for _, c := range tlsClients[:2] {
		r := command(t, patient, c.name, c.args("localhost", port, ids.good)...)
		if r.code != 0 {
			t.Errorf("%s with a good certificate: exit code %d\n%s%s", c.name, r.code, r.stdout, r.stderr)
		}
	}
	for i, c := range tlsClients {
		for what, dir := range map[string]string{"expired": ids.expired, "of another CA": ids.stranger, "none": ids.none} {
			r := command(t, soon, c.name, c.args("localhost", port, dir)...)
			if r.code == 0 {
				t.Errorf("%s (client %d) with a certificate that is %s got in:\n%s", c.name, i, what, r.stdout)
			}
		}
	}
	// libnbd checks names: an address that is not in the certificate is none of the server's.
	if r := command(t, soon, "nbdinfo", "--size", tlsURI("127.0.0.1", port, ids.good)); r.code == 0 {
		t.Error("nbdinfo took a certificate for localhost as one for 127.0.0.1")
	}
	must(t, patient, "qemu-img", "compare", "--object", "tls-creds-x509,id=t,endpoint=client,dir="+ids.good, "--image-opts",
		"driver=raw,file.filename="+disk, "driver=nbd,host=localhost,port="+port+",export=disk0,tls-creds=t")
	m.source.succeeds(patient)
	copied := filepath.Join(t.TempDir(), "nbdcopy.raw")
	must(t, patient, "nbdcopy", "--connections=4", tlsURI("localhost", port, ids.good), copied)
	sameBytes(t, disk, copied)
	must(t, patient, siloNBD(t), "verify", "--tls", ids.good, disk, "nbds://localhost:"+port+"/disk0")
	m.dest.signal(os.Interrupt)
	m.dest.succeeds(soon)
	sameBytes(t, disk, m.copies[0])
	if log := m.dest.stderr.String(); !strings.Contains(log, "certificate has expired") || !strings.Contains(log, "didn't provide a certificate") {
		t.Errorf("the log does not say why clients were not let in:\n%s", m.dest.stderr.tail())
	}
}

// TestTLSOverUnixSockets is the same over sockets, where there is no host name to check.
func TestTLSOverUnixSockets(t *testing.T) {
	need(t, "nbdinfo", "nbdcopy", "qemu-img")
	ids := newIdentities(t)
	disk := randomImage(t, filepath.Join(t.TempDir(), "odd.raw"), oddSize)
	m := migrate(t, how{rate: 16 * mib, destListens: true,
		sourceArgs: []string{"--tls", ids.good}, destArgs: []string{"--tls", ids.good, "--tls-allow", "good"}}, disk)
	uri := m.uris[0] + "&tls-certificates="
	if !strings.HasPrefix(uri, "nbds+unix:///disk0?socket=") {
		t.Fatalf("ready with %s", m.uris[0])
	}
	var list struct {
		TLS     bool `json:"TLS"`
		Exports []struct {
			Name string `json:"export-name"`
		} `json:"exports"`
	}
	if err := json.Unmarshal([]byte(must(t, soon, "nbdinfo", "--list", "--json", uri+ids.good)), &list); err != nil {
		t.Fatal(err)
	}
	if !list.TLS || len(list.Exports) != 1 || list.Exports[0].Name != "disk0" {
		t.Errorf("nbdinfo --list says %+v, want TLS and disk0", list)
	}
	for _, dir := range []string{ids.expired, ids.stranger, ids.none} {
		if r := command(t, soon, "nbdinfo", "--size", uri+dir); r.code == 0 {
			t.Errorf("nbdinfo got in with %s:\n%s", filepath.Base(dir), r.stdout)
		}
	}
	socket := strings.TrimPrefix(m.uris[0], "nbds+unix:///disk0?socket=")
	must(t, patient, "qemu-img", "compare", "--object", "tls-creds-x509,id=t,endpoint=client,dir="+ids.good, "--image-opts",
		"driver=raw,file.filename="+disk, "driver=nbd,path="+socket+",export=disk0,tls-creds=t,tls-hostname=localhost")
	m.finish()
	sameBytes(t, disk, m.copies[0])
}
