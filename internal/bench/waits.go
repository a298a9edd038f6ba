package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
)

const (
	waitsCount = 64      // reads that wait on the connection
	waitsDepth = 32      // reads of local blocks at once on the same connection
	waitsRead  = 4 * kib // what each asks for
	waitsLocal = 32 * mib
)

// waitsPart measures reads of local blocks on a connection on which other reads wait for missing ones, against the same
// without them. The source is stopped meanwhile, so that what waits goes on waiting.
func waitsPart(ctx context.Context, b *bench) error {
	src, lasts := filepath.Join(b.memory, "src.raw"), time.Second
	if b.quick {
		lasts /= 5
	}
	if err := randomFile(src, 128*mib); err != nil {
		return err
	}
	defer os.Remove(src)
	s := setup{src: src, dst: filepath.Join(b.memory, "dst.raw"), sourceArgs: []string{"--rate", "64KiB"}}
	s.listen = "unix://" + filepath.Join(b.memory, "wire.sock")
	m, err := b.migrate(ctx, s)
	if err != nil {
		return err
	}
	defer os.Remove(s.dst)
	defer m.stop()
	if err := writeLocal(ctx, m.uri); err != nil {
		return err
	}
	source := m.source.cmd.Process
	if err := source.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	defer func() { _ = source.Signal(syscall.SIGCONT) }() // before it is stopped; it may be gone

	var rates [2][]float64 // without, with
	for range b.rounds {
		for i, waits := range []int{0, waitsCount} {
			rate, err := localReads(ctx, m.uri, waits, lasts)
			if err != nil {
				return err
			}
			rates[i] = append(rates[i], rate)
		}
	}
	without, with := median(rates[0]), median(rates[1])
	fmt.Printf("   reads of %d KiB of local blocks, %d at once: %.0f /s; with %d reads waiting on the same connection: %.0f /s, x %.2f\n",
		waitsRead/kib, waitsDepth, without, waitsCount, with, with/without)
	return nil
}

// writeLocal makes the first blocks of an export local, by writing them.
func writeLocal(ctx context.Context, uri string) error {
	c, err := nbdclient.Dial(ctx, uri)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.WriteAt(make([]byte, waitsLocal), 0)
	return err
}

// localReads attaches, lets some reads wait for missing blocks, and returns how many reads of local ones are answered a
// second beside them. All of it is on one connection.
func localReads(ctx context.Context, uri string, waits int, lasts time.Duration) (float64, error) {
	c, err := nbdclient.Dial(ctx, uri)
	if err != nil {
		return 0, err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer c.Close() // ends what waits
	var answered atomic.Int64
	for i := range waits {
		wg.Go(func() {
			if _, err := c.ReadAt(make([]byte, waitsRead), c.Size()/2+int64(i)*demandBlock); err == nil {
				answered.Add(1)
			}
		})
	}
	time.Sleep(100 * time.Millisecond) // until they wait
	n, err := readFor(c, lasts)
	if err == nil && answered.Load() > 0 {
		err = fmt.Errorf("%d of the reads that were to wait have been answered", answered.Load())
	}
	return float64(n) / lasts.Seconds(), err
}

// readFor reads local blocks for a time and returns how many reads were answered.
func readFor(c *nbdclient.Client, lasts time.Duration) (int64, error) {
	var wg sync.WaitGroup
	var count atomic.Int64
	var failed atomic.Pointer[error]
	end := time.Now().Add(lasts)
	for range waitsDepth {
		wg.Go(func() {
			buf := make([]byte, waitsRead)
			for time.Now().Before(end) && failed.Load() == nil {
				if _, err := c.ReadAt(buf, rand.Int64N(waitsLocal/waitsRead)*waitsRead); err != nil {
					failed.Store(&err)
					return
				}
				count.Add(1)
			}
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return 0, *err
	}
	return count.Load(), nil
}
