package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// execActivate does what systemd does for a .socket unit: it opens a socket and
// becomes the program: activate (PATH|HOST:PORT) NAME program args...
func execActivate() {
	err := activate(os.Args[1], os.Args[2], os.Args[3:])
	fmt.Fprintln(os.Stderr, "activate:", err)
	os.Exit(99)
}

func activate(address, name string, args []string) error {
	network := "tcp"
	if strings.HasPrefix(address, "/") {
		network = "unix"
	}
	ln, err := net.Listen(network, address)
	if err != nil {
		return err
	}
	file, err := ln.(interface{ File() (*os.File, error) }).File()
	if err != nil {
		return err
	}
	if err := unix.Dup3(int(file.Fd()), 3, 0); err != nil && int(file.Fd()) != 3 {
		return err
	}
	if _, err := unix.FcntlInt(3, unix.F_SETFD, 0); err != nil {
		return err
	}
	path, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	env := append(os.Environ(), "LISTEN_FDS=1", "LISTEN_PID="+strconv.Itoa(os.Getpid()), "LISTEN_FDNAMES="+name)
	return syscall.Exec(path, args, env)
}

// cmdNotified is the service manager: what it is told it writes to FILE, a line
// each, and $NOTIFY_SOCKET is where: notified FILE
func cmdNotified(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: notified FILE")
	}
	path := ts.MkAbs(args[0] + ".notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	ts.Check(err)
	file, err := os.Create(ts.MkAbs(args[0]))
	ts.Check(err)
	ts.Setenv("NOTIFY_SOCKET", path)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for b := make([]byte, 4096); ; {
			n, err := conn.Read(b)
			if err != nil {
				return
			}
			fmt.Fprintf(file, "%s\n", b[:n])
		}
	}()
	ts.Defer(func() {
		conn.Close()
		<-done
		file.Close()
	})
}
