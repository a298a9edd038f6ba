package demo

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

const (
	blockSize = 64 << 10 // of the migration, in bytes
	ioSize    = 4 << 10  // of the demo's reads and writes, in bytes
)

// latencies are how long operations took, in the order in which they were done.
type latencies []time.Duration

// quantile gives the latency that the fraction q of all stayed within.
func (l latencies) quantile(q float64) time.Duration {
	if len(l) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(l))
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

func (l latencies) String() string {
	return fmt.Sprintf("p50 %s, p99 %s, max %s", short(l.quantile(0.5)), short(l.quantile(0.99)), short(l.quantile(1)))
}

// short writes a duration with three digits.
func short(d time.Duration) string {
	switch {
	case d < 10*time.Microsecond:
		return d.Round(10 * time.Nanosecond).String()
	case d < time.Millisecond:
		return d.Round(time.Microsecond).String()
	case d < 100*time.Millisecond:
		return d.Round(100 * time.Microsecond).String()
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	}
	return d.Round(10 * time.Millisecond).String()
}

// overlay is the source's disk with what was written at the destination laid
// over it: what the destination has to hold. Writes are of ioSize bytes at
// multiples of ioSize.
type overlay struct {
	source io.ReaderAt

	mu      sync.Mutex
	written map[int64][]byte // by offset; guarded by mu
}

func newOverlay(source io.ReaderAt) *overlay {
	return &overlay{source: source, written: make(map[int64][]byte)}
}

func (o *overlay) write(p []byte, off int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.written[off] = p
}

// ReadAt implements io.ReaderAt.
func (o *overlay) ReadAt(p []byte, off int64) (int, error) {
	n, err := o.source.ReadAt(p, off)
	o.mu.Lock()
	defer o.mu.Unlock()
	for at := off / ioSize * ioSize; at < off+int64(n); at += ioSize {
		w, ok := o.written[at]
		if !ok {
			continue
		}
		if at < off {
			copy(p[:n], w[off-at:])
		} else {
			copy(p[at-off:n], w)
		}
	}
	return n, err
}

// blocks is how many blocks of the migration were written to.
func (o *overlay) blocks() int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	touched := make(map[int64]bool)
	for off := range o.written {
		touched[off/blockSize] = true
	}
	return int64(len(touched))
}

// disk is what the workload uses of the export.
type disk interface {
	io.ReaderAt
	io.WriterAt
	Size() int64
}

// missing knows which blocks are not at the destination.
type missing interface {
	// EachMissing calls yield for the runs of missing blocks, until it
	// returns false.
	EachMissing(yield func(off, length int64) bool)
}

// workload reads and writes an export whose blocks are still arriving, and
// checks every byte that it reads.
type workload struct {
	disk    disk
	missing missing
	want    *overlay
	holes   []bool // by block: the source has nothing there, so that it would come too fast to be of interest
	rnd     *rand.Rand
}

// pick finds a piece in a missing block with data, anywhere on the disk; ok is
// false if there is none. Reads take the even pieces and writes the odd ones,
// so that they meet in blocks and never in a piece.
func (w *workload) pick(odd int64) (off int64, ok bool) {
	var blocks []int64
	w.missing.EachMissing(func(off, length int64) bool {
		for b := off / blockSize; b*blockSize+blockSize <= off+length; b++ {
			if !w.holes[b] {
				blocks = append(blocks, b)
			}
		}
		return true
	})
	if len(blocks) == 0 {
		return 0, false
	}
	piece := 2*w.rnd.Int64N(blockSize/ioSize/2) + odd
	return blocks[w.rnd.IntN(len(blocks))]*blockSize + piece*ioSize, true
}

// read reads a piece of a missing block and checks it; ok is false when nothing
// is missing any more.
func (w *workload) read() (off int64, took time.Duration, ok bool, err error) {
	off, ok = w.pick(0)
	if !ok {
		return 0, 0, false, nil
	}
	took, err = w.readAt(off)
	return off, took, true, err
}

func (w *workload) readAt(off int64) (time.Duration, error) {
	got, want := make([]byte, ioSize), make([]byte, ioSize)
	start := time.Now()
	_, err := w.disk.ReadAt(got, off)
	took := time.Since(start)
	if err != nil {
		return took, err
	}
	if _, err := w.want.ReadAt(want, off); err != nil {
		return took, err
	}
	if !bytes.Equal(got, want) {
		return took, fmt.Errorf("the read of %d bytes at %d returned other bytes than the disk's", ioSize, off)
	}
	return took, nil
}

// write writes a piece of a missing block; ok is false when nothing is missing
// any more.
func (w *workload) write() (off int64, took time.Duration, ok bool, err error) {
	off, ok = w.pick(1)
	if !ok {
		return 0, 0, false, nil
	}
	p := make([]byte, ioSize)
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], w.rnd.Uint64())
	}
	start := time.Now()
	_, err = w.disk.WriteAt(p, off)
	took = time.Since(start)
	if err == nil {
		w.want.write(p, off)
	}
	return off, took, true, err
}

// holesOf says for each block whether a disk has a hole there.
func holesOf(disk interface {
	ExtentAt(off int64) (end int64, hole bool, err error)
}, size int64) []bool {
	holes := make([]bool, (size+blockSize-1)/blockSize)
	for b := range holes {
		off := int64(b) * blockSize
		end, hole, err := disk.ExtentAt(off)
		holes[b] = err == nil && hole && end >= min(off+blockSize, size)
	}
	return holes
}

// every calls f at an interval until it says that it is done, fails, or ctx ends.
func every(ctx context.Context, interval time.Duration, f func() (done bool, err error)) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
		if done, err := f(); done || err != nil {
			return err
		}
	}
}
