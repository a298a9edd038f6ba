package lives

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/control"
	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
)

// kind is what a process is.
type kind string

const (
	frozen kind = "source"
	live   kind = "live"
	golden kind = "clone"
	dest   kind = "dest"
)

// process is a running silo-nbd.
type process struct {
	label string
	kind  kind
	host  *host
	names []string // of its disks' files
	disks []*export
	port  *port // a source is reached there; a destination connects to it

	reclaim, overwrite, auto bool

	cmd     *exec.Cmd
	out     *output
	nbd     string
	control string
	ended   chan struct{} // closed after the process has been waited for
	killed  bool          // by us
	doomed  bool          // it is killed at any moment
	told    bool          // to end, by us
	seen    bool          // its end has been looked at
	// claimed tells that it has said that all is complete, and was right.
	claimed bool
	pending chan error // the answer to a handoff that is under way
	// met are the destinations that ran when it ended, of a source: one may say only
	// later what it has received.
	met map[*process]bool
}

// export is a disk of a process and how it is used over NBD.
type export struct {
	name string // of the disk
	file *file
	as   string // the file's name
	conn *nbdclient.Client
	// probe is a write to the last block that was not answered yet.
	probe   chan error
	accepts bool // the last probe was answered without an error
	ready   bool // it has said so
	begun   bool // its file is in another life
	// answered tells that a write was answered once.
	answered bool
	fresh    bool // what the file holds is to be replaced, or there is none
}

// output is what a process has said.
type output struct {
	mu    sync.Mutex
	lines bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.lines.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.lines.String()
}

func (o *output) has(s string) bool { return strings.Contains(o.String(), s) }

// launch starts a process and waits until it can be used or has ended.
func (r *run) launch(p *process, args ...string) error {
	r.sockets++
	p.nbd = filepath.Join(r.dir, fmt.Sprintf("n%d", r.sockets))
	p.control = filepath.Join(r.dir, fmt.Sprintf("c%d", r.sockets))
	wire := filepath.Join(r.dir, fmt.Sprintf("w%d", r.sockets))
	command := []string{string(dest), "--control", p.control}
	switch p.kind {
	case dest:
		command = append(command, "--nbd", "unix://"+p.nbd, "--connect", "unix://"+p.port.path)
	case live:
		command = append(command, "--nbd", "unix://"+p.nbd, "--listen", "unix://"+wire)
	case golden:
		command = append(command, "--clone", "--listen", "unix://"+wire)
	default:
		command = append(command, "--listen", "unix://"+wire)
	}
	if p.kind != dest {
		command[0] = string(frozen)
		command = append(command, "--block-size", "4KiB")
	}
	for _, n := range p.names {
		e := &export{name: diskName(n), as: n, file: p.host.file(n)}
		e.fresh = p.kind == dest && (e.file == nil || p.overwrite)
		p.disks = append(p.disks, e)
		command = append(command, "--disk", e.name+"="+p.host.path(n))
	}
	p.cmd = exec.Command(r.bin, append(command, args...)...)
	p.out = &output{}
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.out
	p.cmd.Env = append(os.Environ(), "SILO_NBD_STATE_DIR="+p.host.state, "SILO_NBD_RUN_DIR="+p.host.run)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p.ended = make(chan struct{})
	if err := p.cmd.Start(); err != nil {
		return err
	}
	r.procs = append(r.procs, p)
	r.started++
	go func() {
		_ = p.cmd.Wait() // its exit code is looked at by check
		close(p.ended)
	}()
	if !within(startBound, func() bool { return p.hasEnded() || exists(p.control) }) {
		return violatedf("hang", "%s has neither started nor ended within %v", p.label, startBound)
	}
	if p.kind != dest && p.running() {
		p.port.lead(wire)
	}
	return nil
}

func diskName(file string) string { return "d" + file[len(file)-1:] }

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// within reports whether something comes to be in time.
func within(bound time.Duration, is func() bool) bool {
	for end := time.Now().Add(bound); ; time.Sleep(500 * time.Microsecond) {
		if is() {
			return true
		}
		if time.Now().After(end) {
			return false
		}
	}
}

func (p *process) hasEnded() bool {
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}

func (p *process) running() bool { return !p.hasEnded() }

// code is the exit code of a process that has ended; -1 if a signal ended it.
func (p *process) code() int { return p.cmd.ProcessState.ExitCode() }

// stands reports whether no thread of the process runs: SIGSTOP does not wait for that.
func (p *process) stands() bool {
	all, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", p.cmd.Process.Pid)) // the pattern is right
	for _, path := range all {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		_, state, _ := strings.Cut(string(b[bytes.LastIndexByte(b, ')')+1:]), " ")
		if !strings.ContainsAny(state[:1], "TtZX") {
			return false
		}
	}
	return true
}

// kill ends the process at once.
func (p *process) kill() {
	p.killed = true
	_ = p.cmd.Process.Kill() // it may have ended by itself
	<-p.ended
	p.close()
}

// terminate asks the process to end, and reports whether it does.
func (p *process) terminate() bool {
	p.told = true
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended by itself
	return within(endBound, p.hasEnded)
}

// close ends what we have of the process.
func (p *process) close() {
	for _, e := range p.disks {
		if e.conn != nil {
			e.conn.Close() // its server has gone
			e.conn = nil
		}
	}
}

// uses reports whether the process has a file.
func (p *process) uses(f *file) bool {
	for _, e := range p.disks {
		if e.file == f {
			return true
		}
	}
	return false
}

// readyLine matches what is said of a disk that can be attached.
var readyLine = regexp.MustCompile(`(?m)^ready (\S+) nbd`)

// look notes what the process has said of its disks.
func (p *process) look() {
	for _, m := range readyLine.FindAllStringSubmatch(p.out.String(), -1) {
		for _, e := range p.disks {
			if e.name == m[1] {
				e.ready = true
			}
		}
	}
}

// connect attaches to an export; it reports whether that is there.
func (p *process) connect(e *export) bool {
	if e.conn != nil {
		return true
	}
	if p.kind != live && !e.ready || p.kind == frozen || p.kind == golden {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), answerBound)
	defer cancel()
	conn, err := nbdclient.Dial(ctx, fmt.Sprintf("nbd+unix:///%s?socket=%s", e.name, p.nbd))
	if err != nil {
		return false
	}
	e.conn = conn
	return true
}

// steer asks for something at the control socket, for as long as bound.
func (p *process) steer(bound time.Duration, do func(context.Context, *control.Client) error) error {
	c, err := control.NewClient(p.control)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), bound)
	defer cancel()
	return do(ctx, c)
}

// answer waits for what do returns, for as long as bound.
func answer(bound time.Duration, do func() error) (error, bool) {
	c := make(chan error, 1)
	go func() { c <- do() }()
	t := time.NewTimer(bound)
	defer t.Stop()
	select {
	case err := <-c:
		return err, true
	case <-t.C:
		return nil, false
	}
}

// violation is what a run has found.
type violation struct {
	kind string // two-owners, takeover, lost, false-success, hang, crash
	text string
}

func (v *violation) Error() string { return v.kind + ": " + v.text }

func violatedf(kind, format string, args ...any) error {
	return &violation{kind, fmt.Sprintf(format, args...)}
}

// kindOf is the kind of a violation; empty if err is none.
func kindOf(err error) string {
	var v *violation
	if errors.As(err, &v) {
		return v.kind
	}
	return ""
}
