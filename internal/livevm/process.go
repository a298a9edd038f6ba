package livevm

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
)

// process is a program that runs beside us. Its standard error goes to a file.
type process struct {
	name string
	cmd  *exec.Cmd
	log  string
	in   io.WriteCloser
	wg   sync.WaitGroup

	done chan struct{} // closed when it has ended
	err  error         // how; read only after done
}

// launch starts a program; out gets what it prints.
func (m *move) launch(name string, out func(io.Reader), program string, args ...string) (*process, error) {
	p := &process{name: name, cmd: exec.Command(program, args...), log: m.path(name + ".log"), done: make(chan struct{})}
	log, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer log.Close() // the program has it for itself
	fmt.Fprintln(log, "+", strings.Join(p.cmd.Args, " "))
	p.cmd.Stderr = log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL} // Ctrl-C is for us alone
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	m.running = append(m.running, p)
	p.wg.Go(func() {
		out(stdout)
		p.err = p.cmd.Wait()
		close(p.done)
	})
	return p, nil
}

// wait returns how the program has ended: nil with exit code 0.
func (p *process) wait(ctx context.Context) error {
	select {
	case <-p.done:
		return p.failed()
	case <-ctx.Done():
		return fmt.Errorf("%s does not end: %w", p.name, context.Cause(ctx))
	}
}

// failed is what a program that has ended said last, or nil if it ended with 0.
func (p *process) failed() error {
	if p.err == nil {
		return nil
	}
	text, _ := os.ReadFile(p.log) // it is there for the message only
	lines := bytes.Split(bytes.TrimSpace(text), []byte("\n"))
	return fmt.Errorf("%s ended with %w: %s", p.name, p.err, lines[len(lines)-1])
}

// terminate asks the program to end, and returns how it did.
func (p *process) terminate(ctx context.Context) error {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	return p.wait(ctx)
}

// kill ends the program at once, if it runs.
func (p *process) kill() {
	_ = p.cmd.Process.Kill() // it may have ended
	p.wg.Wait()
}

// silo starts silo-nbd and waits until it serves.
func (m *move) silo(ctx context.Context, name string, args ...string) (*process, error) {
	ready := make(chan struct{})
	p, err := m.launch(name, func(out io.Reader) {
		lines := bufio.NewScanner(out)
		for first := true; lines.Scan(); first = false {
			if first && strings.HasPrefix(lines.Text(), "ready ") {
				close(ready)
			}
		}
	}, m.o.SiloNBD, append([]string{name}, args...)...)
	if err != nil {
		return nil, err
	}
	select {
	case <-ready:
		return p, nil
	case <-p.done:
		return nil, errors.Join(fmt.Errorf("%s ended before it was ready", name), p.failed())
	case <-ctx.Done():
		return nil, fmt.Errorf("%s is not ready: %w", name, context.Cause(ctx))
	}
}

func (m *move) path(name string) string { return filepath.Join(m.dir, name) }
