package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
	"github.com/silo-nbd/silo-nbd/internal/tlsdir/tlstest"
	"github.com/silo-nbd/silo-nbd/internal/units"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"silo-nbd": main, "pid": execPid, "activate": execActivate})
}

// TestScripts runs testdata/*.txtar, one behaviour each, as a user would see it.
func TestScripts(t *testing.T) {
	images, err := filepath.Abs("../../internal/firstblocks/testdata")
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, params("testdata", images))
}

// params are those of the scripts in dir.
func params(dir, images string) testscript.Params {
	return testscript.Params{
		Dir:                 dir,
		RequireExplicitExec: true,
		Condition:           condition,
		Setup: func(e *testscript.Env) error {
			e.Values[authorities{}] = make(map[string]*tlstest.Authority)
			e.Values[programs{}] = make(map[string]*begun)
			e.Setenv("IMAGES", images)
			e.Setenv("SILO_NBD_STATE_DIR", filepath.Join(e.WorkDir, ".states"))
			e.Setenv("SILO_NBD_RUN_DIR", filepath.Join(e.WorkDir, "run"))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"code":   cmdCode,
			"certs":  cmdCerts,
			"mkdisk": cmdMkdisk,
			"attach": cmdAttach,
			"nbd":    cmdNBD,
			"port":   cmdPort,
			"peer":   cmdPeer,
			"await":  cmdAwait,
			"until":  cmdUntil,
			"loop":   cmdLoop,

			"begin":     cmdBegin,
			"beginwith": cmdBeginWith,
			"send":      cmdSend,
			"ended":     cmdEnded,
			"silence":   cmdSilence,

			"sigterm":  cmdSigterm,
			"notified": cmdNotified,
			"scrape":   cmdScrape,
		},
	}
}

// execPid leaves its process id in NAME.pid and becomes the program: pid NAME program args...
func execPid() {
	path, err := exec.LookPath(os.Args[2])
	if err == nil {
		err = os.WriteFile(os.Args[1]+".pid", []byte(strconv.Itoa(os.Getpid())), 0o600)
	}
	if err == nil {
		err = syscall.Exec(path, os.Args[2:], os.Environ())
	}
	fmt.Fprintln(os.Stderr, "pid:", err)
	os.Exit(99)
}

// cmdSigterm sends SIGTERM to a program that was started by pid: sigterm NAME
func cmdSigterm(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: sigterm NAME")
	}
	pid, err := strconv.Atoi(ts.ReadFile(args[0] + ".pid"))
	ts.Check(err)
	ts.Check(syscall.Kill(pid, syscall.SIGTERM))
}

// condition knows [loop]: there are loop devices. In CI there have to be.
func condition(name string) (bool, error) {
	if name != "loop" {
		return false, fmt.Errorf("%q is no condition", name)
	}
	err := exec.Command("losetup", "--find").Run()
	if os.Geteuid() != 0 {
		err = errors.New("it needs root")
	}
	if err != nil && os.Getenv("CI") == "true" {
		return false, fmt.Errorf("CI must have loop devices: %w", err)
	}
	return err == nil, nil
}

// cmdLoop makes a file a block device: loop VARIABLE FILE
func cmdLoop(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: loop VARIABLE FILE")
	}
	out, err := exec.Command("losetup", "--find", "--show", ts.MkAbs(args[1])).CombinedOutput()
	if err != nil {
		ts.Fatalf("losetup: %v: %s", err, out)
	}
	device := strings.TrimSpace(string(out))
	ts.Setenv(args[0], device)
	ts.Defer(func() {
		if out, err := exec.Command("losetup", "--detach", device).CombinedOutput(); err != nil {
			ts.Logf("losetup --detach %s: %v: %s", device, err, out)
		}
	})
}

// cmdCode runs a program and wants its exit code: code N program args...
func cmdCode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: code N program args...")
	}
	err := ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if strconv.Itoa(got) != args[0] {
		ts.Fatalf("exit code %d, want %s", got, args[0])
	}
}

// cmdMkdisk makes a disk with random content, a hole and some zeroes: mkdisk FILE SIZE
func cmdMkdisk(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: mkdisk FILE SIZE")
	}
	size, err := units.Parse(args[1])
	ts.Check(err)
	b := make([]byte, size)
	seed := [32]byte{byte(size), byte(size >> 8)}
	copy(seed[2:], args[0])
	rand.NewChaCha8(seed).Read(b)
	clear(b[size/4 : size/3])
	f, err := os.Create(ts.MkAbs(args[0]))
	ts.Check(err)
	_, err = f.Write(b[:size/2])
	ts.Check(err)
	_, err = f.WriteAt(b[size/8*5:], size/8*5)
	ts.Check(err)
	ts.Check(f.Close())
}

// cmdCerts makes a directory for --tls: certs DIR [ca=NAME] [cn=NAME] [dns=NAME] [ends=DURATION]
// The certificate is signed by the authority NAME of the script, which is made when it is new.
func cmdCerts(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: certs DIR [ca=NAME] [cn=NAME] [dns=NAME] [ends=DURATION]")
	}
	var leaf tlstest.Leaf
	ca := "ca"
	for _, arg := range args[1:] {
		key, value, _ := strings.Cut(arg, "=")
		switch key {
		case "ca":
			ca = value
		case "cn":
			leaf.CommonName = value
		case "dns":
			leaf.DNSNames = append(leaf.DNSNames, value)
		case "ends":
			ends, err := time.ParseDuration(value)
			ts.Check(err)
			leaf.Ends = ends
		default:
			ts.Fatalf("certs: %q is unknown", arg)
		}
	}
	all := ts.Value(authorities{}).(map[string]*tlstest.Authority)
	if all[ca] == nil {
		a, err := tlstest.NewAuthority()
		ts.Check(err)
		all[ca] = a
	}
	ts.Check(all[ca].Write(ts.MkAbs(args[0]), leaf))
}

// authorities is the key of a script's authorities by their names.
type authorities struct{}

// dial attaches to an export as soon as there is one, with the certificates of $CERTS.
func dial(ts *testscript.TestScript, uri string) *nbdclient.Client {
	secure, err := clientTLS(ts.Getenv("CERTS"))
	ts.Check(err)
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		c, err := nbdclient.DialTLS(context.Background(), uri, secure)
		if err == nil {
			return c
		}
		if time.Now().After(end) {
			ts.Fatalf("%v", err)
		}
	}
}

// cmdAttach waits until an export can be attached and stays attached: attach URI
// With ! it wants that nobody serves there.
func cmdAttach(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: attach URI")
	}
	if neg {
		if c, err := nbdclient.Dial(context.Background(), args[0]); err == nil {
			c.Close()
			ts.Fatalf("%s can be attached", args[0])
		}
		return
	}
	c := dial(ts, args[0])
	ts.Defer(func() { c.Close() })
}

// cmdNBD reads or writes an export: nbd URI (read|write|put) OFF TEXT
// write flushes, put does not.
// With ! it wants that this fails, and with ERROR that it says so: ! nbd URI (read|write) OFF TEXT [ERROR]
func cmdNBD(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 4 && (!neg || len(args) != 5) {
		ts.Fatalf("usage: [!] nbd URI (read|write) OFF TEXT [ERROR]")
	}
	c := dial(ts, args[0])
	defer c.Close()
	off, err := strconv.ParseInt(args[2], 10, 64)
	ts.Check(err)
	got := make([]byte, len(args[3]))
	if args[1] != "read" {
		_, err = c.WriteAt([]byte(args[3]), off)
	} else {
		_, err = c.ReadAt(got, off)
	}
	if neg {
		switch {
		case err == nil:
			ts.Fatalf("%s at %d went well", args[1], off)
		case len(args) == 5 && !strings.Contains(err.Error(), args[4]):
			ts.Fatalf("%s at %d: %v, want %q", args[1], off, err, args[4])
		}
		ts.Logf("%v", err)
		return
	}
	ts.Check(err)
	switch args[1] {
	case "write":
		ts.Check(c.Flush())
		return
	case "put":
		return
	}
	if string(got) != args[3] {
		ts.Fatalf("read %q at %d, want %q", got, off, args[3])
	}
}

// cmdPort puts a free TCP port into a variable: port VARIABLE
func cmdPort(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: port VARIABLE")
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Setenv(args[0], strconv.Itoa(ln.Addr().(*net.TCPAddr).Port))
	ts.Check(ln.Close())
}

// cmdPeer listens and is no peer of ours: peer SOCKET (http|silent|closing)
func cmdPeer(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: peer SOCKET (http|silent|closing)")
	}
	ln, err := net.Listen("unix", ts.MkAbs(args[0]))
	ts.Check(err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			switch args[1] {
			case "http":
				io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"+strings.Repeat("x", 100))
				conn.Close()
			case "closing":
				conn.Close()
			default:
				defer conn.Close()
			}
		}
	}()
	ts.Defer(func() {
		ln.Close()
		<-done
	})
}

// cmdAwait waits until a file holds a text: await FILE TEXT
func cmdAwait(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: await FILE TEXT")
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		b, err := os.ReadFile(ts.MkAbs(args[0]))
		if err == nil && strings.Contains(string(b), args[1]) {
			return
		}
		if time.Now().After(end) {
			ts.Fatalf("%s does not hold %q: %s %v", args[0], args[1], b, err)
		}
	}
}

// cmdUntil runs a program again and again until it prints a text: until TEXT program args...
func cmdUntil(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: until TEXT program args...")
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		err := ts.Exec(args[1], args[2:]...)
		if out := ts.ReadFile("stdout"); strings.Contains(out, args[0]) {
			return
		} else if time.Now().After(end) {
			ts.Fatalf("%s does not print %q: %s %v", args[1], args[0], out, err)
		}
	}
}

func TestReportIsOneLine(t *testing.T) {
	var b strings.Builder
	if code := report(errors.Join(errors.New("one"), fmt.Errorf("two\n")), &b); code != 1 || b.String() != "silo-nbd: one; two\n" {
		t.Errorf("code %d, %q", code, b.String())
	}
}
