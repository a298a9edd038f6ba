// Package verify compares two disks: files, block devices or NBD exports.
package verify

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/bits"
	"sync"

	"golang.org/x/sync/errgroup"
)

const (
	// BlockSize is the unit in which differences are counted, in bytes.
	BlockSize = 64 << 10

	bufferSize     = 1 << 20 // bytes read at once; a multiple of BlockSize
	defaultWorkers = 4
)

// Options says how to compare. The zero value works.
type Options struct {
	Workers int // comparisons at once; 0 means 4
}

// Result is what a comparison found.
type Result struct {
	SizeA, SizeB int64 // bytes
	Compared     int64 // bytes looked at: the smaller of the two sizes
	Blocks       int64 // blocks of BlockSize bytes in what was compared
	Differing    int64 // how many of them differ
	First        int64 // offset of the first byte that differs, or -1
	A, B         byte  // what the two sides hold at First
}

// Equal says that the sides have the same size and content.
func (r Result) Equal() bool { return r.SizeA == r.SizeB && r.Differing == 0 }

// Compare reads both sides to the end of the smaller one. Ranges that are
// holes on both sides are not read; a hole on one side is compared as the
// zeroes that it reads as.
func Compare(ctx context.Context, a, b Side, o Options) (Result, error) {
	workers := o.Workers
	if workers <= 0 {
		workers = defaultWorkers
	}
	c := &comparison{a: a, b: b}
	c.result = Result{SizeA: a.Size(), SizeB: b.Size(), First: -1}
	c.result.Compared = min(a.Size(), b.Size())
	c.result.Blocks = (c.result.Compared + BlockSize - 1) / BlockSize

	g, ctx := errgroup.WithContext(ctx)
	jobs := make(chan job)
	g.Go(func() error {
		defer close(jobs)
		return c.walk(ctx, jobs)
	})
	for range workers {
		g.Go(func() error { return c.work(jobs) })
	}
	err := g.Wait()
	return c.result, err
}

// job is one range to compare, of at most bufferSize bytes. It starts at a
// multiple of BlockSize, so no block is counted twice.
type job struct {
	off, length  int64
	holeA, holeB bool // this side reads as zeroes, without looking
}

type comparison struct {
	a, b Side

	mu     sync.Mutex // never held over I/O
	result Result     // guarded by mu
}

// walk hands out the ranges that have to be looked at, in order.
func (c *comparison) walk(ctx context.Context, jobs chan<- job) error {
	endOf := c.result.Compared // set before the workers start
	a, b := extents{side: c.a}, extents{side: c.b}
	for off := int64(0); off < endOf; {
		endA, holeA, err := a.at(off, endOf)
		if err != nil {
			return err
		}
		endB, holeB, err := b.at(off, endOf)
		if err != nil {
			return err
		}
		if holeA && holeB {
			off = min(endA, endB)
			continue
		}
		end := min(off+bufferSize, endOf)
		if holeA {
			end = min(end, endA)
		}
		if holeB {
			end = min(end, endB)
		}
		select {
		case jobs <- job{off: off, length: end - off, holeA: holeA, holeB: holeB}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		off = end
	}
	return nil
}

// extents remembers the run that a side was last asked about.
type extents struct {
	side Side
	end  int64
	hole bool
}

// at says where the run at off ends, in whole blocks, and whether it is a
// hole. A hole that holds no whole block is as good as data.
func (e *extents) at(off, size int64) (end int64, hole bool, err error) {
	x, ok := e.side.(Extenter)
	if !ok {
		return size, false, nil
	}
	if off >= e.end {
		end, hole, err := x.ExtentAt(off)
		if err != nil {
			return 0, false, err
		}
		if hole && end < size {
			end -= end % BlockSize
		}
		if end <= off {
			end, hole = off+BlockSize, false
		}
		e.end, e.hole = end, hole
	}
	return min(e.end, size), e.hole, nil
}

// work compares ranges until there are no more.
func (c *comparison) work(jobs <-chan job) error {
	bufA, bufB := make([]byte, bufferSize), make([]byte, bufferSize)
	zeroes := make([]byte, bufferSize)
	for j := range jobs {
		a, b := zeroes[:j.length], zeroes[:j.length]
		if !j.holeA {
			a = bufA[:j.length]
			if err := readFull(c.a, a, j.off); err != nil {
				return fmt.Errorf("the first disk: %w", err)
			}
		}
		if !j.holeB {
			b = bufB[:j.length]
			if err := readFull(c.b, b, j.off); err != nil {
				return fmt.Errorf("the second disk: %w", err)
			}
		}
		if !bytes.Equal(a, b) {
			c.differ(j.off, a, b)
		}
	}
	return nil
}

// differ takes note of a range that differs.
func (c *comparison) differ(off int64, a, b []byte) {
	first, blocks := int64(math.MaxInt64), int64(0)
	for start := 0; start < len(a); start += BlockSize {
		end := min(start+BlockSize, len(a))
		if bytes.Equal(a[start:end], b[start:end]) {
			continue
		}
		blocks++
		if first == math.MaxInt64 {
			first = int64(start + firstDifference(a[start:end], b[start:end]))
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.result.Differing += blocks
	if at := off + first; c.result.First < 0 || at < c.result.First {
		c.result.First, c.result.A, c.result.B = at, a[first], b[first]
	}
}

// firstDifference finds the first byte in which two slices of the same length
// differ; they are known to.
func firstDifference(a, b []byte) int {
	lo, hi := 0, len(a) // the first difference lies in [lo, hi)
	for hi-lo > 1 {
		mid := lo + 1<<(bits.Len(uint(hi-lo-1))-1)
		if bytes.Equal(a[lo:mid], b[lo:mid]) {
			lo = mid
		} else {
			hi = mid
		}
	}
	return lo
}

func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = fmt.Errorf("read at %d: it ended after %d of %d bytes; did it shrink?", off, n, len(p))
	}
	return err
}
