package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/disks"
)

// commandTimeout is how long a command that was told to end may take.
const commandTimeout = 10 * time.Second

// startCommand runs a command by the shell once all disks are ready. What it
// returns waits for the command's end, and gives an exitError if that was not
// a good one. When ctx ends the command is told to end too.
func (r *receiver) startCommand(ctx context.Context, command string) (wait func() error) {
	ended := make(chan struct{})
	var err error
	r.loops.Go(func() {
		defer close(ended)
		select {
		case <-r.ready:
			err = r.runCommand(ctx, command)
		case <-ctx.Done():
		}
	})
	return func() error {
		<-ended
		return err
	}
}

func (r *receiver) runCommand(ctx context.Context, command string) error {
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", command)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), r.environment()...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = commandTimeout
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return nil // it was told to end
	case errors.As(err, &exit):
		code := exit.ExitCode()
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			code = 128 + int(ws.Signal()) // as the shell says it
		}
		r.console.log.Warn("the command has failed; dest ends with its exit code when all is complete", "code", code)
		return &exitError{code}
	case err != nil:
		return err
	}
	r.console.log.Info("the command has ended; dest ends when all is complete")
	return nil
}

// environment tells the command where the disks are.
func (r *receiver) environment() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	env := []string{"uri=" + r.uris[0].uri}
	for _, e := range r.uris {
		env = append(env, "uri_"+variable(e.name)+"="+e.uri)
	}
	return env
}

// distinctVariables refuses disks of which the shell could see only one.
func distinctVariables(specs []disks.Spec) error {
	names := make(map[string]string)
	for _, s := range specs {
		v := variable(s.Name)
		if other, taken := names[v]; taken {
			return usagef("--run: the disks %q and %q would both be $uri_%s: give one another name, as in --disk NAME=%s", other, s.Name, v, s.Path)
		}
		names[v] = s.Name
	}
	return nil
}

// variable makes a name fit for the shell.
func variable(name string) string {
	return strings.Map(func(c rune) rune {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
			return c
		}
		return '_'
	}, name)
}
