package soak

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// readyTime is how long a program may take to start: the machine may be busy.
	readyTime = 30 * time.Second
	// endTime is how long one that was told to end may take.
	endTime = 30 * time.Second
)

// proc is a source or a destination that runs.
type proc struct {
	name  string
	cmd   *exec.Cmd
	log   *os.File
	began time.Time
	ready chan string   // what follows "ready " in a line of standard output
	ended chan struct{} // closed when it has ended
	wg    sync.WaitGroup
}

// launch starts a program. Its standard error goes to the end of the file log.
func launch(name, log, bin string, args ...string) (*proc, error) {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(f, "--- %s %s\n", time.Now().Format("15:04:05.000"), strings.Join(args, " "))
	p := &proc{name: name, cmd: exec.Command(bin, args...), log: f, began: time.Now(), ready: make(chan string, 16), ended: make(chan struct{})}
	p.cmd.Stderr = f
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := p.cmd.StdoutPipe()
	if err == nil {
		err = p.cmd.Start()
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	p.wg.Go(func() { p.waitLoop(out) })
	return p, nil
}

// waitLoop reads what the program prints, and waits for its end.
func (p *proc) waitLoop(out io.Reader) {
	for s := bufio.NewScanner(out); s.Scan(); {
		if rest, ok := strings.CutPrefix(s.Text(), "ready "); ok {
			select {
			case p.ready <- rest:
			default: // nobody waits for so many
			}
		}
	}
	_ = p.cmd.Wait() // what it says is in ProcessState
	fmt.Fprintf(p.log, "--- %s %v\n", time.Now().Format("15:04:05.000"), p.cmd.ProcessState)
	_ = p.log.Close() // for reading afterwards only
	close(p.ended)
}

// uris waits until so many disks can be attached, and returns their URIs by name.
func (p *proc) uris(disks int) (map[string]string, error) {
	all := make(map[string]string)
	for late := time.After(readyTime); len(all) < disks; {
		select {
		case line := <-p.ready:
			name, uri, _ := strings.Cut(line, " ")
			all[name] = uri
		case <-p.ended:
			if len(p.ready) == 0 {
				return nil, fmt.Errorf("%s ended (%v) before it was ready", p.name, p.cmd.ProcessState)
			}
		case <-late:
			return nil, fmt.Errorf("%s was not ready after %v: %s", p.name, readyTime, p.dump())
		}
	}
	return all, nil
}

// running says whether the program has not ended.
func (p *proc) running() bool {
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// code is the exit code of a program that has ended; -1: a signal.
func (p *proc) code() int { return p.cmd.ProcessState.ExitCode() }

// kill ends the program at once, and waits for that.
func (p *proc) kill() {
	if p == nil {
		return
	}
	_ = p.cmd.Process.Kill() // it may have ended
	p.wg.Wait()
}

// terminate asks the program to end, and returns its exit code.
func (p *proc) terminate() (int, error) {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	return p.wait(endTime)
}

// wait returns the exit code when the program has ended.
func (p *proc) wait(within time.Duration) (int, error) {
	select {
	case <-p.ended:
		return p.code(), nil
	case <-time.After(within):
		return 0, fmt.Errorf("%s still runs after %v: %s", p.name, within, p.dump())
	}
}

// dump makes a program that hangs write the stacks of its goroutines to its log.
func (p *proc) dump() string {
	_ = p.cmd.Process.Signal(syscall.SIGQUIT) // it may have ended
	select {
	case <-p.ended:
	case <-time.After(5 * time.Second):
	}
	return "the stacks are in " + p.log.Name()
}
