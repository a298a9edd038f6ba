package soak

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
)

// fioSize is the part of its disk that fio writes to, in bytes.
const fioSize = 6 * mib

// fioDisk is a disk that fio writes to, in passes: what a pass has written and
// flushed has to be there when the destination is back.
type fioDisk struct {
	*disk
	uri   string
	seed  int  // of the last pass that has begun
	whole bool // that pass has come to its end

	stop context.CancelFunc
	wg   sync.WaitGroup

	mu sync.Mutex
	// Guarded by mu:
	dying bool  // the destination is about to be killed: an error means nothing
	err   error // what fio found wrong
}

// begin verifies what was written before, and makes passes until end.
func (d *fioDisk) begin(ctx context.Context, m *migration, uri string) {
	ctx, d.stop = context.WithCancel(ctx)
	d.uri = uri
	d.mu.Lock()
	d.dying = false
	d.mu.Unlock()
	pause := between(m.r, 50*time.Millisecond, time.Second)
	d.wg.Go(func() {
		for d.verify(ctx, m) == nil && d.pass(ctx, m) == nil && sleep(ctx, pause) == nil {
		}
	})
}

// pass writes to blocks of the disk, other ones each time, and flushes.
func (d *fioDisk) pass(ctx context.Context, m *migration) error {
	d.seed, d.whole = d.seed+1, false // from now on its blocks may be written over
	if err := d.run(ctx, m, "--do_verify=0", "--fsync=8"); err != nil {
		return err
	}
	// Fio 3.33 sends no flush at the end, whatever --end_fsync says.
	conn, err := nbdclient.Dial(ctx, d.uri)
	if err != nil {
		return err
	}
	err = conn.Flush()
	d.whole = err == nil
	_ = conn.Close() // the flush was answered, or not
	return err
}

// verify reads what the last pass has written, if it came to its end.
func (d *fioDisk) verify(ctx context.Context, m *migration) error {
	if !d.whole {
		return nil
	}
	if err := d.run(ctx, m, "--verify_only"); err != nil {
		return err
	}
	m.sum.FioPasses.Add(1)
	return nil
}

// run lets fio do its part.
func (d *fioDisk) run(ctx context.Context, m *migration, args ...string) error {
	cmd := exec.CommandContext(ctx, m.o.Fio, append([]string{
		"--name=soak", "--ioengine=nbd", "--uri=" + d.uri, "--rw=randwrite", "--bsrange=4k-16k", "--blockalign=4k",
		fmt.Sprintf("--size=%d", fioSize), "--io_size=512k", "--iodepth=4", "--verify=crc32c", "--verify_fatal=1",
		fmt.Sprintf("--randseed=%d", d.seed), "--fallocate=none", "--thread",
	}, args...)...)
	cmd.Dir = m.dir
	out, err := cmd.CombinedOutput()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.log(fmt.Sprintf("%v: %v, dying: %t\n%s", cmd.Args, err, d.dying, out))
	if err != nil && !d.dying && ctx.Err() == nil && d.err == nil {
		d.err = &mismatch{fmt.Errorf("%v: %w\n%s", cmd.Args, err, out)}
	}
	return err
}

// log keeps what fio says, for whoever looks into the files of a failed round.
func (d *fioDisk) log(text string) {
	f, err := os.OpenFile(d.dst+".fio.log", os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return
	}
	defer f.Close() // nothing depends on it
	fmt.Fprintf(f, "--- %s %s\n", time.Now().Format("15:04:05.000"), text)
}

// doomed is told that the destination is about to be killed.
func (d *fioDisk) doomed() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dying = true
}

// end waits for fio, which the destination's death has ended, and says what it
// found before.
func (d *fioDisk) end() error {
	d.stop()
	d.wg.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// last ends the passes and verifies once more.
func (d *fioDisk) last(ctx context.Context, m *migration) error {
	if err := d.end(); err != nil {
		return err
	}
	_ = d.verify(ctx, m) // said by end
	return d.end()
}

// compareRest holds what fio has not written to against the source's disk.
func (d *fioDisk) compareRest() error {
	f, err := os.Open(d.dst)
	if err != nil {
		return err
	}
	defer f.Close() // only read
	want := make([]byte, mib)
	return d.each(f, func(p []byte, off int64) error {
		if off < fioSize {
			return nil
		}
		if _, err := d.base.ReadAt(want[:len(p)], off); err != nil {
			return err
		}
		if !bytes.Equal(p, want[:len(p)]) {
			return fmt.Errorf("%s: what nobody wrote to, from %d on, is not the source's", d.dst, off)
		}
		return nil
	})
}
