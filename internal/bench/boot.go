package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/link"
)

const (
	bootRate  = 20e6                  // of the source's link, bytes per second each way
	bootDelay = 20 * time.Millisecond // of the link, one way: a round trip is 40 ms
	bootGoal  = 1.3                   // times a local boot and the transfer of what it reads
	bootMost  = 3                     // rounds: one takes some two minutes
)

// bootWay is a way for a machine to get at its root disk, which is at the source.
type bootWay struct {
	name string
	// start starts what serves the disk, and the machine.
	start func(context.Context, *bootBench, *bootRun) error
}

var bootWays = []bootWay{
	{"silo-nbd: boots while the disk moves", bootMigrating},
	{"the disk is already local", bootLocal},
	{"plain NBD to the source", bootPlain},
	{"qemu: copy-on-read and block-stream", bootCopyOnRead},
}

// bootBench is what all boots have in common.
type bootBench struct {
	*bench
	image bootImage
	disk  string // the root disk: nobody writes to it
	full  int64  // bytes that it takes on a disk
}

// bootRun is one boot under way.
type bootRun struct {
	began   time.Time // when the first program at the destination was started
	vm      *child
	link    *link.Link                // to the source; nil: the source is not needed
	local   string                    // what is local of the disk; empty: nothing is, ever
	reads   func() (bootReads, error) // nil: none
	closers []func()
}

// stop ends all that was started, the last first.
func (r *bootRun) stop() {
	for _, closer := range slices.Backward(r.closers) {
		closer()
	}
	r.closers = nil
}

func (r *bootRun) onStop(closer func()) { r.closers = append(r.closers, closer) }

// bootFigures is what one boot showed: at the first line of user space, and at the end of the workload.
type bootFigures struct {
	took    [2]float64 // seconds from the start of the first program at the destination
	local   [2]float64 // share of the disk's data
	crossed [2]float64 // MB that came over the link
	bootReads
}

// bootReads is the reads of a boot that could not be answered where the machine is.
type bootReads struct {
	reads  float64 // how many
	waited float64 // seconds that they took altogether; NaN if it is not known
}

func bootPart(ctx context.Context, b *bench) error {
	image, lacks, err := guestImage(ctx)
	if err != nil {
		return err
	}
	if lacks != "" {
		fmt.Printf("   %s: left out\n", lacks)
		return nil
	}
	bb := &bootBench{bench: b, image: image, disk: filepath.Join(b.memory, "root.raw")}
	if err := b.bootDisk(ctx, image.busybox, bb.disk); err != nil {
		return err
	}
	defer os.Remove(bb.disk)
	if bb.full, err = allocated(bb.disk); err != nil {
		return err
	}
	fmt.Printf("   %d rounds; a guest (qemu, tcg) boots from a disk of %d MiB with %d MiB of data; link %.0f MB/s, delay %v one way (round trip %v)\n",
		min(b.rounds, bootMost), bootSize/mib, bb.full/mib, bootRate/1e6, bootDelay, 2*bootDelay)
	figures := make([][]bootFigures, len(bootWays))
	for range min(b.rounds, bootMost) {
		for i, w := range bootWays {
			f, err := bb.boot(ctx, w)
			if err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
			figures[i] = append(figures[i], f)
		}
	}
	rows := make([]bootFigures, len(figures))
	for i, f := range figures {
		rows[i] = bootMedian(f)
	}
	fmt.Print(bootTable(rows))
	return nil
}

// boot boots once, and looks at the two moments.
func (b *bootBench) boot(ctx context.Context, w bootWay) (f bootFigures, err error) {
	r := &bootRun{}
	defer r.stop()
	if err := w.start(ctx, b, r); err != nil {
		return f, err
	}
	for i, prefix := range []string{bootFirst, bootDone} {
		if err := b.says(r.vm, prefix); err != nil {
			return f, err
		}
		f.took[i] = time.Since(r.began).Seconds()
		if r.link != nil {
			_, from := r.link.Bytes()
			f.crossed[i] = float64(from) / 1e6
		}
		if r.local != "" {
			n, err := allocated(r.local)
			if err != nil {
				return f, err
			}
			f.local[i] = min(1, float64(n)/float64(b.full))
		}
	}
	if r.reads != nil {
		f.bootReads, err = r.reads()
	}
	return f, err
}
