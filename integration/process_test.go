//go:build integration

package integration

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// process is a command that runs beside the test. It is killed, and shown if the test failed, at the test's end.
type process struct {
	t      *testing.T
	name   string // how it is called in messages
	cmd    *exec.Cmd
	stdout *output
	stderr *output
	quiet  bool          // not shown when the test fails: it did what it should
	exited chan struct{} // closed when it has ended; cmd.ProcessState is set before
}

// start runs a command in the background, with no standard input.
func start(t *testing.T, label, command string, args ...string) *process {
	t.Helper()
	p := &process{
		t:      t,
		name:   label,
		cmd:    exec.Command(command, args...),
		stdout: newOutput(),
		stderr: newOutput(),
		exited: make(chan struct{}),
	}
	p.cmd.Stdout, p.cmd.Stderr = p.stdout, p.stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("%s: %v", label, err)
	}
	go p.waitLoop()
	t.Cleanup(p.cleanup)
	return p
}

func (p *process) waitLoop() {
	// The error says no more than ProcessState does, which the tests look at.
	_ = p.cmd.Wait()
	close(p.exited)
}

func (p *process) cleanup() {
	if p.running() {
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) // with its children; it may just have ended: nothing to kill then
	}
	<-p.exited
	if p.t.Failed() && !p.quiet {
		p.t.Logf("%s: %s\nended: %v\nstdout:\n%sstderr:\n%s", p.name, strings.Join(p.cmd.Args, " "), p.cmd.ProcessState, p.stdout.tail(), p.stderr.tail())
	}
}

// running says whether the process has not ended yet.
func (p *process) running() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// line waits for a line on standard output that starts with prefix, and returns it.
func (p *process) line(prefix string, within time.Duration) string {
	p.t.Helper()
	late := time.After(within)
	for {
		more := p.stdout.changed()
		if l, ok := p.stdout.find(prefix); ok {
			return l
		}
		select {
		case <-more:
		case <-p.exited:
			if l, ok := p.stdout.find(prefix); ok { // printed just before it ended
				return l
			}
			p.t.Fatalf("%s ended (%v) and never printed a line %s...", p.name, p.cmd.ProcessState, prefix)
		case <-late:
			p.t.Fatalf("%s printed no line %s... within %v", p.name, prefix, within)
		}
	}
}

// wait waits for the end of the process and returns its exit code, -1 if a signal ended it.
func (p *process) wait(within time.Duration) int {
	p.t.Helper()
	select {
	case <-p.exited:
	case <-time.After(within):
		p.t.Fatalf("%s still runs after %v", p.name, within)
	}
	return p.cmd.ProcessState.ExitCode()
}

// succeeds waits for the end of the process and fails the test unless the exit code is 0.
func (p *process) succeeds(within time.Duration) {
	p.t.Helper()
	if code := p.wait(within); code != 0 {
		p.t.Fatalf("%s ended with %v, want exit code 0", p.name, p.cmd.ProcessState)
	}
}

// signal sends sig to the process.
func (p *process) signal(sig os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.t.Fatalf("%s: cannot send it %v: %v", p.name, sig, err)
	}
}

// result is what a command that has ended left behind.
type result struct {
	stdout, stderr string
	code           int
	took           time.Duration
}

// command runs a command to its end, which must come within the given time.
func command(t *testing.T, within time.Duration, name string, args ...string) result {
	t.Helper()
	began := time.Now()
	p := start(t, name, name, args...)
	code := p.wait(within)
	p.quiet = code == 0
	return result{stdout: p.stdout.String(), stderr: p.stderr.String(), code: code, took: time.Since(began)}
}

// must runs a command that has to succeed and returns its standard output.
func must(t *testing.T, within time.Duration, name string, args ...string) string {
	t.Helper()
	r := command(t, within, name, args...)
	if r.code != 0 {
		t.Fatalf("%s %s: exit code %d\n%s%s", name, strings.Join(args, " "), r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// output collects what a process writes and wakes those who wait for more.
type output struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	more chan struct{} // closed and replaced at each write
}

func newOutput() *output { return &output{more: make(chan struct{})} }

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	close(o.more)
	o.more = make(chan struct{})
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// tail returns the last lines written, for the report of a failed test.
func (o *output) tail() string {
	lines := strings.SplitAfter(o.String(), "\n")
	if more := len(lines) - 12; more > 0 {
		return fmt.Sprintf("(%d lines before)\n%s", more, strings.Join(lines[more:], ""))
	}
	return strings.Join(lines, "")
}

// find returns the first complete line with the prefix.
func (o *output) find(prefix string) (line string, ok bool) {
	for l := range strings.Lines(o.String()) {
		if strings.HasPrefix(l, prefix) && strings.HasSuffix(l, "\n") {
			return strings.TrimSuffix(l, "\n"), true
		}
	}
	return "", false
}

// changed returns a channel that is closed by the next write.
func (o *output) changed() <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.more
}

// eventually polls for a state of the outside world (a file, a socket) that nothing announces.
func eventually(t *testing.T, within time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(within); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", within, what)
		}
	}
}

// exists says whether a file is there.
func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
