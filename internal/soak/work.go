package soak

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
)

const (
	connections = 2 // to an export: a flush on one covers the writes on the other
	workers     = 4 // on each connection; one of them reads, and may wait for the source
	// maxThought is the longest pause of a worker between two operations. It
	// leaves the processor to the programs, and blocks of the disk to the source.
	maxThought = 16 * time.Millisecond
	// checkTime is how long the reads of what was flushed may take altogether:
	// all of that is here, so no source can hold them up.
	checkTime = 20 * time.Second
)

// counts is what the clients did.
type counts struct {
	writes, flushes, reads, written, checked atomic.Int64
}

// clients is the clients of an export, for one life of the destination.
type clients struct {
	model *model
	block int64 // the migration's unit, in bytes
	count *counts
	conns []*nbdclient.Client
	wg    sync.WaitGroup
	stop  context.CancelFunc

	mu sync.Mutex
	// Guarded by mu:
	err error // the first mismatch, or error that was not the end of the connection
}

// attach connects to an export.
func attach(ctx context.Context, uri string, m *model, block int64, count *counts) (*clients, error) {
	c := &clients{model: m, block: block, count: count}
	for range connections {
		conn, err := nbdclient.Dial(ctx, uri)
		if err != nil {
			c.close()
			return nil, err
		}
		c.conns = append(c.conns, conn)
	}
	if size := c.conns[0].Size(); size != m.size {
		c.close()
		return nil, fmt.Errorf("the export has %d bytes, the source's disk %d", size, m.size)
	}
	return c, nil
}

// check reads all that was flushed.
func (c *clients) check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	late := context.AfterFunc(ctx, func() { c.close() }) // wakes the reads
	defer late()
	runs := c.model.flushedRuns()
	next := make(chan [2]int64)
	var wg sync.WaitGroup
	for i := range connections * workers {
		wg.Go(func() {
			for r := range next {
				c.note(c.read(c.conns[i%connections], r[0], r[1]))
			}
		})
	}
	for _, r := range runs {
		next <- r
	}
	close(next)
	wg.Wait()
	if ctx.Err() != nil {
		return fmt.Errorf("what was flushed could not be read within %v", checkTime)
	}
	return c.failure()
}

// work begins to read, write and flush, until finish or until the destination
// has died.
func (c *clients) work(ctx context.Context, r *rand.Rand) {
	ctx, c.stop = context.WithCancel(ctx)
	for i := range connections * workers {
		r := rand.New(rand.NewPCG(r.Uint64(), uint64(i)))
		c.wg.Go(func() {
			pause := time.NewTimer(0)
			defer pause.Stop()
			for {
				select {
				case <-pause.C:
				case <-ctx.Done():
					return
				}
				do := c.change
				if i < connections {
					do = c.readSome
				}
				if err := do(c.conns[i%connections], r); err != nil {
					if ctx.Err() == nil {
						c.note(err)
					}
					return
				}
				pause.Reset(time.Duration(r.Int64N(int64(maxThought))))
			}
		})
	}
}

// finish lets the running operations end, and says what went wrong. What waits
// for the source waits until that is there.
func (c *clients) finish() error {
	c.stop()
	c.wg.Wait()
	return c.failure()
}

// abandon waits for the workers after the destination has died.
func (c *clients) abandon() error {
	c.stop()
	c.close()
	c.wg.Wait()
	return c.failure()
}

func (c *clients) close() {
	for _, conn := range c.conns {
		_ = conn.Close() // the destination may be dead
	}
}

// note remembers the first thing that went wrong. The end of a connection is
// not: whoever has killed the destination knows why.
func (c *clients) note(err error) {
	var refused *nbdclient.Error
	var wrong *mismatch
	if err == nil || !errors.As(err, &refused) && !errors.As(err, &wrong) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
	}
}

func (c *clients) failure() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// mismatch is a read that found what it must not.
type mismatch struct{ error }

func (m *mismatch) Unwrap() error { return m.error }

// read reads sectors, and looks at what comes. It does nothing if somebody else
// is at them.
func (c *clients) read(conn *nbdclient.Client, lo, hi int64) error {
	m := c.model
	if !m.lock(lo, hi) {
		return nil
	}
	off := lo * sector
	p := make([]byte, min(hi*sector, m.size)-off)
	if _, err := conn.ReadAt(p, off); err != nil {
		m.unlock(lo, hi)
		return err
	}
	err := m.read(lo, hi, p)
	m.unlock(lo, hi)
	if err != nil {
		return &mismatch{err}
	}
	c.count.reads.Add(1)
	c.count.checked.Add(int64(len(p)))
	return nil
}

// place is sectors to do something to: mostly few, at any sector, and sometimes
// whole blocks.
func (c *clients) place(r *rand.Rand) (lo, hi int64) {
	m := c.model
	_, sectors := span(0, m.size)
	if r.IntN(8) == 0 {
		lo, hi = span(r.Int64N(m.size)/c.block*c.block, c.block*(1+r.Int64N(2)))
	} else {
		lo = r.Int64N(sectors)
		if r.IntN(2) == 0 {
			lo = lo / 8 * 8 // a page, as of a file system
		}
		hi = lo + 1 + r.Int64N(16)
	}
	return lo, min(hi, sectors)
}

// readSome reads sectors, whether they are here or not.
func (c *clients) readSome(conn *nbdclient.Client, r *rand.Rand) error {
	lo, hi := c.place(r)
	return c.read(conn, lo, hi)
}

// change does one thing that never waits for the source.
func (c *clients) change(conn *nbdclient.Client, r *rand.Rand) error {
	lo, hi := c.place(r)
	for !c.model.ours(lo, hi) {
		lo, hi = c.place(r)
	}
	switch k := r.IntN(12); {
	case k < 8:
		return c.write(conn, lo, hi, firstRecord, k == 0)
	case k < 9:
		return c.write(conn, lo, hi, zeroes, false)
	case k < 10:
		return c.write(conn, lo, hi, zeroes, true)
	default:
		return c.flush(conn)
	}
}

// write writes sectors: records, through to the disk or not, or zeroes, by a
// trim or not.
func (c *clients) write(conn *nbdclient.Client, lo, hi int64, of uint32, other bool) error {
	m := c.model
	if !m.lock(lo, hi) {
		return nil
	}
	off := lo * sector
	length := min(hi*sector, m.size) - off
	p := m.write(lo, hi, of)
	var err error
	switch {
	case p == nil && other:
		err = conn.TrimAt(off, length)
	case p == nil:
		err = conn.ZeroAt(off, length)
	case other:
		_, err = conn.WriteThroughAt(p, off)
	default:
		_, err = conn.WriteAt(p, off)
	}
	if err != nil {
		return err // the sectors stay locked: nobody knows what they hold
	}
	through := m.wrote(lo, hi)
	if p != nil && other {
		m.flushed(through)
	}
	c.count.writes.Add(1)
	c.count.written.Add(length)
	return nil
}

func (c *clients) flush(conn *nbdclient.Client) error {
	covers := c.model.flushing()
	if err := conn.Flush(); err != nil {
		return err
	}
	c.model.flushed(covers)
	c.count.flushes.Add(1)
	return nil
}

// settle reads all of the disk and flushes: from then on one thing only is
// possible of each sector.
func (c *clients) settle() error {
	_, sectors := span(0, c.model.size)
	const step = 4 << 20 / sector
	for lo := int64(0); lo < sectors; lo += step {
		if err := c.read(c.conns[0], lo, min(lo+step, sectors)); err != nil {
			return err
		}
	}
	return c.flush(c.conns[0])
}
