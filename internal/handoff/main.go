// Command handoff moves a disk that a steady 4 KiB random writer uses, from the
// export of a source to that of a destination, and says what it cost. It is run
// by scripts/handoff.
package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/addr"
	"github.com/silo-nbd/silo-nbd/internal/control"
	"github.com/silo-nbd/silo-nbd/internal/link"
	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
)

const (
	block      = 4096
	flushEvery = 50 // writes
)

type options struct {
	program, dir  string
	size          int64
	pause         time.Duration
	before, after time.Duration
	rate          string
	cut           bool
	seed          uint64
}

func main() {
	var o options
	flag.StringVar(&o.program, "silo-nbd", "bin/silo-nbd", "the `program`")
	flag.StringVar(&o.dir, "dir", "", "where the disks lie (default: a new directory)")
	flag.Int64Var(&o.size, "size", 256<<20, "bytes of the disk")
	flag.DurationVar(&o.pause, "pause", time.Millisecond, "between two writes")
	flag.DurationVar(&o.before, "before", 3*time.Second, "from the start to the handoff")
	flag.DurationVar(&o.after, "after", time.Second, "that the writer goes on at the destination, at least")
	flag.StringVar(&o.rate, "rate", "100MiB", "bytes a second for the background")
	flag.BoolVar(&o.cut, "cut", false, "break the connection once, at some byte after the handoff was asked for")
	flag.Uint64Var(&o.seed, "seed", 1, "what is written where, and where -cut cuts")
	flag.Parse()
	if err := run(context.Background(), o, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "handoff:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options, out io.Writer) (err error) {
	if o.dir == "" {
		if o.dir, err = os.MkdirTemp("", "silo-nbd-handoff"); err != nil {
			return err
		}
		defer os.RemoveAll(o.dir)
	}
	want := make([]byte, o.size/block*block)
	_, _ = rand.NewChaCha8([32]byte{byte(o.seed)}).Read(want) // never fails
	disk := filepath.Join(o.dir, "vm.raw")
	if err := os.WriteFile(disk, want, 0o600); err != nil {
		return err
	}
	wire, socket := o.unix("wire"), filepath.Join(o.dir, "control.sock")
	source, first, err := start(ctx, o.program, "source", "--disk", disk, "--listen", wire, "--nbd", o.unix("src"),
		"--control", socket, "--rate", o.rate)
	if err != nil {
		return err
	}
	defer source.stop()
	between, err := o.link(ctx, wire)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, between.Close()) }()
	dest, second, err := start(ctx, o.program, "dest", "--disk", filepath.Join(o.dir, "moved.raw"), "--connect", between.Addr().String(), "--nbd", o.unix("dst"))
	if err != nil {
		return err
	}
	defer dest.stop()
	w := writer{want: want, pause: o.pause, seed: o.seed, stop: make(chan struct{})}
	wrote := make(chan error, 1)
	go func() { wrote <- w.run(ctx, first, second) }()
	time.Sleep(o.before)
	if o.cut {
		o.planCut(between)
	}
	r, err := handOff(ctx, socket)
	if err != nil {
		return err
	}
	if err := source.wait(); err != nil {
		return err
	}
	time.Sleep(o.after)
	close(w.stop)
	if err := <-wrote; err != nil {
		return err
	}
	bad, err := mismatches(ctx, second, want)
	if err != nil {
		return err
	}
	r.print(out)
	fmt.Fprintf(out, "the writer's longest pause: %v; it made %d writes, %d of them at the destination\n", w.longest, w.made, w.moved)
	fmt.Fprintf(out, "mismatches: %d\n", bad)
	if bad > 0 {
		return fmt.Errorf("%d of %d blocks differ", bad, len(want)/block)
	}
	return nil
}

func (o options) unix(name string) string { return "unix://" + filepath.Join(o.dir, name+".sock") }

// link is the network between the two.
func (o options) link(ctx context.Context, wire string) (*link.Link, error) {
	listen, err := addr.Parse(o.unix("link"))
	if err != nil {
		return nil, err
	}
	target, err := addr.Parse(wire)
	if err != nil {
		return nil, err
	}
	return link.Listen(ctx, link.Options{Listen: listen, Target: target})
}

// planCut chooses the byte at which the connection breaks: a handoff is some
// hundred bytes each way, with data before, between and after them.
func (o options) planCut(l *link.Link) {
	rnd := rand.New(rand.NewPCG(o.seed, 2))
	if rnd.IntN(2) == 0 {
		l.After(link.ToTarget, rnd.Int64N(200), l.Cut) // what dest answers
	} else {
		l.After(link.FromTarget, rnd.Int64N(256<<10), l.Cut)
	}
}

// report is what a handoff was like.
type report struct {
	before, last control.Status
	took         time.Duration
	attempts     int
}

// handOff asks for the handoff until there was one: the connection may break
// before it.
func handOff(ctx context.Context, socket string) (r report, err error) {
	c, err := control.NewClient(socket)
	if err != nil {
		return r, err
	}
	if r.before, err = c.Status(ctx); err != nil {
		return r, err
	}
	began := time.Now()
	for err = errors.New("not asked"); err != nil; {
		if r.attempts++; r.attempts > 1000 {
			return r, err
		}
		if err = c.Handoff(ctx); err != nil {
			time.Sleep(10 * time.Millisecond) // until there is a connection
		}
	}
	r.took = time.Since(began)
	if r.last, err = c.Status(ctx); err != nil {
		r.last = r.before // it was the last thing that it did
	}
	return r, nil
}

func (r report) print(out io.Writer) {
	d, last := r.before.Disks[0], r.last.Disks[0]
	fmt.Fprintf(out, "before the handoff: %d bytes in %d passes\n", d.Sent, d.Live.Pass)
	fmt.Fprintf(out, "handoff: %v, asked for %d times, over %d connections\n", r.took, r.attempts, 1+last.Reconnects)
	fmt.Fprintf(out, "after the handoff: %d bytes were missing at the destination\n", last.Size-last.Done)
}

// writer writes a block at a random place, again and again.
type writer struct {
	want  []byte
	pause time.Duration
	seed  uint64
	stop  chan struct{}

	made, moved int
	longest     time.Duration // from one answer to the next
}

func (w *writer) run(ctx context.Context, first, second string) error {
	c, err := nbdclient.Dial(ctx, first)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }() // the exports are done with
	there, err := nbdclient.Dial(ctx, second)
	if err != nil {
		return err
	}
	rnd := rand.New(rand.NewPCG(w.seed, 1))
	p := make([]byte, block)
	for last := time.Now(); ; {
		select {
		case <-w.stop:
			return c.Flush()
		case <-time.After(w.pause):
		}
		for i := range p {
			p[i] = byte(rnd.Uint32())
		}
		off := rnd.Int64N(int64(len(w.want)/block)) * block
		_, err := c.WriteAt(p, off)
		if errors.Is(err, syscall.ESHUTDOWN) && c != there {
			_ = c.Close() // it serves nothing any more
			c = there
			_, err = c.WriteAt(p, off)
		}
		if err != nil {
			return err
		}
		copy(w.want[off:], p)
		if w.made%flushEvery == 0 {
			// Not while the disk moves from one to the other: the next write finds that out.
			if err := c.Flush(); err != nil && !errors.Is(err, syscall.ESHUTDOWN) {
				return err
			}
		}
		now := time.Now()
		w.longest, last = max(w.longest, now.Sub(last)), now
		w.made++
		if c == there {
			w.moved++
		}
	}
}

func mismatches(ctx context.Context, uri string, want []byte) (bad int, err error) {
	c, err := nbdclient.Dial(ctx, uri)
	if err != nil {
		return 0, err
	}
	defer func() { _ = c.Close() }() // it was only read
	p := make([]byte, 1<<20)
	for off := 0; off < len(want); off += len(p) {
		p = p[:min(len(p), len(want)-off)]
		if _, err := c.ReadAt(p, int64(off)); err != nil {
			return bad, err
		}
		for i := 0; i < len(p); i += block {
			if !bytes.Equal(p[i:i+block], want[off+i:off+i+block]) {
				bad++
			}
		}
	}
	return bad, nil
}

// process is a silo-nbd that runs.
type process struct{ cmd *exec.Cmd }

// start runs the program and waits until it serves; uri is where.
func start(ctx context.Context, program string, args ...string) (p *process, uri string, err error) {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, "", err
	}
	if err := cmd.Start(); err != nil {
		return nil, "", err
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	fields := strings.Fields(line)
	if err != nil || len(fields) != 3 {
		_ = cmd.Process.Kill() // it did not get ready
		return nil, "", fmt.Errorf("%s does not get ready: %q: %w", args[0], line, errors.Join(err, cmd.Wait()))
	}
	return &process{cmd}, fields[2], nil
}

func (p *process) wait() error { return p.cmd.Wait() }

func (p *process) stop() {
	if p.cmd.ProcessState == nil {
		_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		_ = p.cmd.Wait()                          // how it ends is not the question here
	}
}
