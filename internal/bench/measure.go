package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30
)

// median of figures; the mean of the middle two of an even number. NaN of none.
func median(figures []float64) float64 { return percentile(figures, 50) }

// ratio is the median of a round's figure by that of the other in the same round: what slows the machine for some
// seconds slows both.
func ratio(figures, others []float64) float64 {
	each := make([]float64, len(figures))
	for i, f := range figures {
		each[i] = f / others[i]
	}
	return median(each)
}

// turns are the numbers below n, in the order of a round: every other one begins at the end, so that none of them is
// always the one that comes after another.
func turns(round, n int) []int {
	order := make([]int, n)
	for i := range order {
		order[i] = i
		if round%2 == 1 {
			order[i] = n - 1 - i
		}
	}
	return order
}

// percentile p of figures, between its two neighbours where it falls between them.
func percentile(figures []float64, p float64) float64 {
	if len(figures) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(figures))
	at := p / 100 * float64(len(sorted)-1)
	low := int(at)
	if low+1 == len(sorted) {
		return sorted[low]
	}
	return sorted[low] + (at-float64(low))*(sorted[low+1]-sorted[low])
}

// child is a program that runs beside the measurement.
type child struct {
	cmd    *exec.Cmd
	lines  chan string // of standard output; closed at its end
	stderr strings.Builder
	ended  bool
}

// startChild starts a program; the context's end kills it.
func startChild(ctx context.Context, name string, args ...string) (*child, error) {
	c := &child{cmd: exec.CommandContext(ctx, name, args...), lines: make(chan string, 64)}
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	c.cmd.Stderr = &c.stderr
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	go c.readLoop(out)
	return c, nil
}

func (c *child) readLoop(out io.Reader) {
	defer close(c.lines)
	for s := bufio.NewScanner(out); s.Scan(); {
		select {
		case c.lines <- s.Text():
		default: // nobody waits for so many lines
		}
	}
}

// ready waits for a line that starts with prefix and returns the rest of it.
func (c *child) ready(prefix string) (string, error) {
	late := time.After(30 * time.Second)
	for {
		select {
		case line, ok := <-c.lines:
			if !ok {
				_, err := c.wait()
				return "", fmt.Errorf("%s ended without %q: %w", c.cmd.Args[0], prefix, err)
			}
			if rest, ok := strings.CutPrefix(line, prefix); ok {
				return rest, nil
			}
		case <-late:
			return "", fmt.Errorf("%s: no line %q within 30 s", c.cmd.Args[0], prefix)
		}
	}
}

// wait waits for the end of the child and returns the CPU time that it took, of user and system together.
func (c *child) wait() (time.Duration, error) {
	for range c.lines { // Wait closes the pipe: read it out before
	}
	err := c.cmd.Wait()
	c.ended = true
	if err != nil {
		err = fmt.Errorf("%s: %w\n%s", strings.Join(c.cmd.Args, " "), err, c.stderr.String())
	}
	return c.cmd.ProcessState.UserTime() + c.cmd.ProcessState.SystemTime(), err
}

// stop ends a server, whatever its exit code, and returns the CPU time that it took.
func (c *child) stop() time.Duration {
	if c.ended {
		return 0
	}
	_ = c.cmd.Process.Signal(syscall.SIGTERM) // it may have ended by itself
	kill := time.AfterFunc(10*time.Second, func() { _ = c.cmd.Process.Kill() })
	defer kill.Stop()
	cpu, _ := c.wait() // a server that a signal ends may say so
	return cpu
}

// output runs a program to its end and returns its standard output and CPU time.
func output(ctx context.Context, name string, args ...string) (string, time.Duration, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", 0, fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, stderr.String())
	}
	return string(out), cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), nil
}

// randomFile makes a file of random data.
func randomFile(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	random := rand.NewChaCha8(sha256.Sum256([]byte("silo-nbd bench")))
	_, err = io.CopyN(f, random, size)
	if err == nil {
		err = f.Sync() // its way to the disk must not fall into the measurement
	}
	if e := f.Close(); err == nil {
		err = e
	}
	return err
}

// sparseFile makes a file of holes with a little data at its beginning and end.
func sparseFile(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	edge := []byte(strings.Repeat("silo-nbd", 512))
	err = f.Truncate(size)
	for _, off := range []int64{0, size - int64(len(edge))} {
		if err == nil {
			_, err = f.WriteAt(edge, off)
		}
	}
	if e := f.Close(); err == nil {
		err = e
	}
	return err
}
