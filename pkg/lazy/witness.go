package lazy

import (
	"cmp"
	"context"
	"math/bits"
	"slices"
	"sync/atomic"
	"time"
)

// witnessEvery is how often the samples of a disk that changes are taken anew.
const witnessEvery = 30 * time.Second

// witness keeps the samples in a map those of blocks that nobody has written since:
// before a client's write reaches a block of which there is one, the map has durably
// dropped it. So whatever the end of a process was, each of them must be what it was.
type witness struct {
	watch atomic.Pointer[watch] // nil: the map is not bound, or not needed any more
	turn  chan struct{}         // capacity 1: held by whoever takes samples anew
	taken time.Time             // guarded by turn; zero: never by this process
}

// watch is the blocks of which the map has samples, or is about to.
type watch struct {
	blocks  []int64 // ascending; never changed
	writers *gate   // those who write to the disk and have looked at blocks
}

func (w *watch) touches(lo, hi int64) bool {
	i, _ := slices.BinarySearch(w.blocks, lo)
	return i < len(w.blocks) && w.blocks[i] < hi
}

// without is the blocks that keep says yes to, with the same writers.
func (w *watch) without(drop func(block int64) bool) *watch {
	return &watch{blocks: slices.DeleteFunc(slices.Clone(w.blocks), drop), writers: w.writers}
}

// watchBlocks watches the samples that the map has, and no other. The map's turn is
// held.
func (d *Device) watchBlocks(k *bond, writers *gate) {
	w := &watch{writers: writers}
	for _, s := range k.samples[:k.count] {
		w.blocks = append(w.blocks, s.block)
	}
	slices.Sort(w.blocks)
	d.witness.watch.Store(w)
}

// overwrite is put for a client's write. Samples that it would make wrong are dropped
// first, and fetched blocks become known as written. Of a revocable device that would
// say too much: that the whole block was.
func (d *Device) overwrite(f fill, off, end int64) error {
	if !d.revocable {
		d.state.overwrite(d.span(off, end))
	}
	w := d.witness.watch.Load()
	for ; w != nil && !w.writers.enter(); w = d.witness.watch.Load() {
	}
	if w == nil {
		return d.put(f, off, end)
	}
	defer w.writers.leave()
	if lo, hi := d.span(off, end); w.touches(lo, hi) {
		if err := d.dropSamples(lo, hi); err != nil {
			return err
		}
	}
	return d.put(f, off, end)
}

// dropSamples has the map forget, durably, what the blocks [lo, hi) were.
func (d *Device) dropSamples(lo, hi int64) error {
	return d.flush.aloneOnMap(d, func() error {
		inside := func(block int64) bool { return lo <= block && block < hi }
		if err := mayRetry(d.epoch.m.update(func(h *header) { h.bond.drop(inside) })); err != nil {
			return err
		}
		if w := d.witness.watch.Load(); w != nil {
			d.witness.watch.Store(w.without(inside))
		}
		return nil
	})
}

// drop drops the samples of some blocks.
func (k *bond) drop(which func(block int64) bool) {
	kept := bond{}
	for _, s := range k.samples[:k.count] {
		if !which(s.block) {
			kept.samples[kept.count] = s
			kept.count++
		}
	}
	k.count, k.samples = kept.count, kept.samples
}

// within reports whether a block lies in spans, which are sorted and do not touch.
func within(spans []span) func(block int64) bool {
	return func(block int64) bool {
		i, _ := slices.BinarySearchFunc(spans, block, func(s span, block int64) int { return cmp.Compare(s.hi-1, block) })
		return i < len(spans) && spans[i].lo <= block
	}
}

// renewWitness takes samples anew, if it is time for that or at once: of blocks that
// are spread over what is here by now. It flushes.
func (d *Device) renewWitness(ctx context.Context, atOnce bool) error {
	d.witness.turn <- struct{}{}
	defer func() { <-d.witness.turn }()
	if d.witness.watch.Load() == nil || !atOnce && time.Since(d.witness.taken) < witnessEvery {
		return d.flush.flush(ctx, d, true)
	}
	d.witness.taken = time.Now()
	blocks := d.candidates(false)
	if err := d.watchMore(blocks); err != nil {
		return err
	}
	// What these blocks hold now is what they hold as long as they are watched: what was
	// taken back before that may just be arriving anew.
	blocks = slices.DeleteFunc(blocks, func(block int64) bool { return !d.state.isLocal(block) })
	if err := d.flush.flush(ctx, d, true); err != nil {
		return err
	}
	k, err := d.sample(blocks)
	if err != nil {
		k.count = 0 // who has to read these blocks will hear of the error
	}
	return d.flush.alone(d, func() error {
		w := d.witness.watch.Load()
		if w == nil {
			return nil
		}
		k.drop(func(block int64) bool { return !w.touches(block, block+1) })
		err := mayRetry(d.epoch.m.update(func(h *header) {
			if k.count >= min(h.bond.count, enoughSamples) {
				h.bond.count, h.bond.samples = k.count, k.samples
			}
		}))
		if err == nil {
			k := d.epoch.m.header().bond
			d.watchBlocks(&k, w.writers) // those that the next one has to wait for, too
		}
		return err
	})
}

// watchMore watches blocks, too, and waits for writes to them that were under way.
func (d *Device) watchMore(blocks []int64) error {
	var before *watch
	err := d.flush.alone(d, func() error {
		if before = d.witness.watch.Load(); before == nil {
			return nil
		}
		all := slices.Concat(before.blocks, blocks)
		slices.Sort(all)
		d.witness.watch.Store(&watch{blocks: slices.Compact(all), writers: newGate()})
		return nil
	})
	if err == nil && before != nil {
		before.writers.shut()
		<-before.writers.idle // they wait for nothing but the disk and the map
	}
	return err
}

// candidates are blocks that are here now, spread over the disk. Blocks that clients
// have written are left out, unless all is quiet: they are written again.
func (d *Device) candidates(quiet bool) (blocks []int64) {
	n := d.state.blocks
	for i := range int64(maxSamples) {
		lo, hi := share(n, i), share(n, i+1)
		for range 2 { // one of zeroes would say little
			block := d.state.nextFetchedOnly(lo, hi)
			if block == hi && quiet {
				block = d.state.nextLocal(lo, hi)
			}
			if block == hi {
				break
			}
			blocks = append(blocks, block)
			lo = max(block+1, (block+hi)/2)
		}
	}
	return blocks
}

// share is where the i-th of equal parts of n blocks begins.
func share(n, i int64) int64 { return n/maxSamples*i + n%maxSamples*i/maxSamples }

// sample reads what the blocks hold, and leaves out zeroes.
func (d *Device) sample(blocks []int64) (k bond, err error) {
	id := Identity{Size: d.size, BlockSize: d.blockSize}
	for _, block := range blocks {
		if k.count == maxSamples {
			break
		}
		sum, zero, err := sampleAt(d.disk, id, block)
		if err != nil {
			return k, err
		}
		if !zero {
			k.samples[k.count] = sample{block, sum}
			k.count++
		}
	}
	return k, nil
}

// bindCleanly has the map remember the disk as it is after its last write.
func (d *Device) bindCleanly() error {
	m := d.epoch.m
	if m == nil || m.backing == nil {
		return nil
	}
	k, err := d.sample(d.candidates(true))
	if err != nil {
		return err
	}
	if !d.complete.Load() {
		// Another mark: a map that was kept from before the end looks like one of a
		// process that was killed then, and must not pass for the present one.
		if err := d.flush.alone(d, func() error { return mayRetry(m.mark(func(*header) {})) }); err != nil {
			return err
		}
	}
	stamp, err := m.backing.Stamp(true) // after it, since it changes the change time; the mark is durable then
	if err != nil {
		return err
	}
	return d.flush.alone(d, func() error {
		return mayRetry(m.update(func(h *header) {
			h.bond.count, h.bond.samples, h.bond.stamp = k.count, k.samples, string(stamp)
			h.bond.flags |= bondClean
			h.boot = UUID{}
			if h.bond.mark == m.borne {
				h.bond.before = Mark{}
				h.bond.flags &^= bondMarking
			}
		}))
	})
}

// nextFetchedOnly is the first block of [lo, hi) that came from the source and was
// not wholly written here before, or hi.
func (s *state) nextFetchedOnly(lo, hi int64) int64 {
	for w := lo >> 6; w<<6 < hi; w++ {
		if m := wordMask(w, lo, hi) & s.fetched[w].Load() &^ s.written[w].Load(); m != 0 {
			return w<<6 + int64(bits.TrailingZeros64(m))
		}
	}
	return hi
}
