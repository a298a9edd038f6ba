package main

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// patience is how long a script waits for what has to come.
const patience = 20 * time.Second

// begun is a program that a script has started.
type begun struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when cmd.ProcessState is set
}

// programs is the key of a script's programs by their names.
type programs struct{}

// cmdBegin starts a program, whose output goes to NAME.out and NAME.err: begin NAME program args...
func cmdBegin(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: begin NAME program args...")
	}
	stdout, err := os.Create(ts.MkAbs(args[0] + ".out"))
	ts.Check(err)
	stderr, err := os.Create(ts.MkAbs(args[0] + ".err"))
	ts.Check(err)
	beginTo(ts, args[0], stdout, stderr, args[1:])
	ts.Check(errors.Join(stdout.Close(), stderr.Close()))
}

// cmdBeginWith starts a program whose standard output and error are pipes that
// are full and never read, or whose reader has gone: beginwith (unread|gone) NAME program args...
func cmdBeginWith(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 {
		ts.Fatalf("usage: beginwith (unread|gone) NAME program args...")
	}
	r, w, err := os.Pipe()
	ts.Check(err)
	if args[0] == "gone" {
		ts.Check(r.Close())
	} else {
		ts.Defer(func() { r.Close() })
		ts.Check(w.SetWriteDeadline(time.Now().Add(100 * time.Millisecond)))
		for err == nil {
			_, err = w.Write(make([]byte, 4096))
		}
	}
	beginTo(ts, args[1], w, w, args[2:])
	ts.Check(w.Close())
}

func beginTo(ts *testscript.TestScript, name string, stdout, stderr *os.File, args []string) {
	path, err := exec.LookPath(args[0])
	ts.Check(err)
	b := &begun{cmd: exec.Command(path, args[1:]...), ended: make(chan struct{})}
	b.cmd.Dir, b.cmd.Stdout, b.cmd.Stderr = ts.MkAbs("."), stdout, stderr
	b.cmd.Env = append(os.Environ(), "TMPDIR="+ts.Getenv("TMPDIR"))
	b.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	ts.Check(b.cmd.Start())
	go func() {
		defer close(b.ended)
		_ = b.cmd.Wait() // says no more than ProcessState
	}()
	ts.Defer(func() {
		_ = b.cmd.Process.Kill() // it may have ended
		<-b.ended
	})
	ts.Value(programs{}).(map[string]*begun)[name] = b
}

func program(ts *testscript.TestScript, name string) *begun {
	b := ts.Value(programs{}).(map[string]*begun)[name]
	if b == nil {
		ts.Fatalf("no program %q was begun", name)
	}
	return b
}

var signals = map[string]syscall.Signal{
	"INT": syscall.SIGINT, "TERM": syscall.SIGTERM, "HUP": syscall.SIGHUP, "KILL": syscall.SIGKILL, "STOP": syscall.SIGSTOP, "CONT": syscall.SIGCONT,
}

// cmdSend sends a signal, or several one after another: send NAME SIGNAL...
func cmdSend(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: send NAME SIGNAL...")
	}
	for i, s := range args[1:] {
		err := program(ts, args[0]).cmd.Process.Signal(signals[s])
		if i == 0 || !errors.Is(err, os.ErrProcessDone) { // by the one before
			ts.Check(err)
		}
	}
}

// cmdEnded waits for a program's end and wants its exit code: ended NAME CODE
// With ! it wants that it still runs.
func cmdEnded(ts *testscript.TestScript, neg bool, args []string) {
	b := program(ts, args[0])
	if neg {
		select {
		case <-b.ended:
			ts.Fatalf("%s has ended: %v", args[0], b.cmd.ProcessState)
		default:
		}
		return
	}
	select {
	case <-b.ended:
	case <-time.After(patience):
		ts.Fatalf("%s has not ended within %v", args[0], patience)
	}
	if strconv.Itoa(b.cmd.ProcessState.ExitCode()) != args[1] {
		said, _ := os.ReadFile(ts.MkAbs(args[0] + ".err"))
		ts.Fatalf("%s: %v, want exit code %s\n%s", args[0], b.cmd.ProcessState, args[1], said)
	}
}

// cmdSilence keeps N connections to a TCP port open that say nothing, and makes
// them anew when they are closed: silence N PORT
func cmdSilence(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: silence N PORT")
	}
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	first := make(chan struct{}, n)
	for range n {
		wg.Go(func() {
			var d net.Dialer
			for ctx.Err() == nil {
				conn, err := d.DialContext(ctx, "tcp", "127.0.0.1:"+args[1])
				if err != nil {
					time.Sleep(time.Millisecond) // the program is on its way
					continue
				}
				select {
				case first <- struct{}{}:
				default:
				}
				end := context.AfterFunc(ctx, func() { conn.Close() })
				_, _ = io.Copy(io.Discard, conn) // until it is closed
				end()
				conn.Close()
			}
		})
	}
	ts.Defer(func() {
		stop()
		wg.Wait()
	})
	late := time.After(patience)
	for range n {
		select {
		case <-first:
		case <-late:
			ts.Fatalf("there are not %d connections to port %s within %v", n, args[1], patience)
		}
	}
}
