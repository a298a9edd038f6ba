package migrate

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

var (
	liveRuns = flag.Int("migrate.live", 20, "how many random live migrations are run")
	liveSeed = flag.Uint64("migrate.liveseed", 0, "the first of them; 0: by chance")
)

// record is what a guest writes: numbered, so that no two are alike.
func record(p []byte, seq uint64) {
	for i := range p {
		p[i] = byte(seq>>(8*(uint(i)%4))) ^ byte(i>>2)*17
	}
}

type zeroTrimmer interface {
	ZeroAtContext(ctx context.Context, off, length int64, punch bool) error
	TrimAtContext(ctx context.Context, off, length int64) error
}

// chunk is what one of the two writers of a disk writes in.
const chunk = 4096

// cold is the size of a disk's end, in bytes, that is written now and then only, so
// that what is lost there is not written over.
const cold = 2 * chunk

// writeCold writes there, if the guests' disks are still the source's. The caller holds life.
func (w *world) writeCold() {
	for _, g := range w.guests {
		p := make([]byte, 512*(1+w.rnd.IntN(cold/512)))
		record(p, w.rnd.Uint64())
		off := int64(len(g.want)) - int64(len(p))
		ctx, cancel := context.WithTimeout(w.srcCtx, time.Millisecond)
		if _, err := w.trs[g.name].WriteAtContext(ctx, p, off); err == nil {
			w.wrote(g, p, off)
		}
		cancel()
	}
}

// guestLoop writes, and now and then reads back, as one of two writers of a
// disk, who share blocks.
func (w *world) guestLoop(g *guest, writer int64, pause time.Duration) {
	rnd := rand.New(rand.NewPCG(g.seed, uint64(writer)+100))
	size := int64(len(g.want)) - cold
	hot := rnd.Int64N(size / chunk / 2)
	began, looked := time.Now(), false
	for seq := uint64(1); ; seq++ {
		if !looked && w.hasMoved(g) { // before much is written over
			looked = true
			for off := writer * chunk; off < size; off += 2 * chunk {
				if !w.check(g, off, chunk) {
					return
				}
			}
		}
		n := rnd.Int64N(size / chunk / 2)
		if rnd.IntN(2) == 0 {
			n = hot
		}
		off := (2*n+writer)*chunk + 512*rnd.Int64N(4)
		length := 512 * (1 + rnd.Int64N(4))
		length = min(length, chunk-off%chunk)
		kind := rnd.IntN(10)
		if kind == 1 { // whole pages, which are holes then
			off, length = (2*n+writer)*chunk, chunk
		}
		p := make([]byte, length)
		if kind > 1 {
			record(p, seq<<2|uint64(writer)<<1|1)
		}
		do := func(ctx context.Context, d blockDevice) error {
			switch z, ok := d.(zeroTrimmer); {
			case kind == 0 && ok:
				return z.ZeroAtContext(ctx, off, length, true)
			case kind == 1 && ok:
				return z.TrimAtContext(ctx, off, length)
			}
			_, err := d.WriteAtContext(ctx, p, off)
			return err
		}
		if !w.write(g, do, func() { w.wrote(g, p, off) }) {
			return
		}
		if rnd.IntN(8) == 0 && !w.check(g, off, length) {
			return
		}
		if time.Since(began) > 5*time.Second { // there are long waits, and much is not needed for them
			pause = time.Second
		}
		select {
		case <-time.After(pause):
		case <-w.ctx.Done():
		}
	}
}

func (w *world) hasMoved(g *guest) bool {
	w.model.Lock()
	defer w.model.Unlock()
	return w.moved[g.name]
}

func (w *world) wrote(g *guest, p []byte, off int64) {
	w.model.Lock()
	defer w.model.Unlock()
	copy(g.want[off:], p)
}

// check reads back what this writer alone writes.
func (w *world) check(g *guest, off, length int64) bool {
	got := make([]byte, length)
	read := func(ctx context.Context, d blockDevice) error {
		if c, ok := d.(interface {
			ReadAtContext(ctx context.Context, p []byte, off int64) (int, error)
		}); ok {
			_, err := c.ReadAtContext(ctx, got, off)
			return err
		}
		_, err := d.ReadAt(got, off)
		return err
	}
	return w.write(g, read, func() {
		w.model.Lock()
		defer w.model.Unlock()
		if !bytes.Equal(g.want[off:off+length], got) {
			w.t.Errorf("%s: read back other bytes at %d", g.name, off)
		}
	})
}

// happen lets one of all the things happen that can.
func (w *world) happen() {
	if w.rolls && w.rnd.IntN(2) == 0 {
		w.life.Lock()
		w.writeCold()
		w.life.Unlock()
		<-time.After(time.Duration(w.rnd.IntN(4000)) * time.Millisecond) // it travels
		w.rollBackDest()
		return
	}
	switch w.rnd.IntN(8) {
	case 0, 1:
		w.wires.cut()
	case 2:
		w.killSource()
	case 3:
		w.killDest()
	case 4, 5:
		src := w.src
		ctx, cancel := context.WithTimeout(w.ctx, time.Duration(w.rnd.IntN(40))*time.Millisecond)
		w.wg.Go(func() {
			defer cancel()
			if err := src.Handoff(ctx); err == nil && !src.HandedOff() {
				w.t.Error("Handoff said nil, and the disks are served here")
			}
		})
	case 6:
		src := w.src
		w.wg.Go(func() {
			if err := src.AbortHandoff(); err == nil && src.HandedOff() {
				w.t.Error("AbortHandoff said nil, and the disks are the destination's")
			}
		})
	case 7:
		w.ledger.setFailing(w.rnd.IntN(3))
	}
}

// finish lets the migration end, and looks at the disks.
func (w *world) finish() {
	w.ledger.setFailing(0)
	deadline := time.After(24 * time.Hour)
	for handing := true; handing; {
		ctx, cancel := context.WithTimeout(w.ctx, time.Minute)
		err := w.src.Handoff(ctx)
		cancel()
		switch {
		case err == nil:
			handing = false
		case errors.Is(err, ErrNotConnected), errors.Is(err, errLost), errors.Is(err, context.DeadlineExceeded):
		default:
			w.t.Logf("once more, after: %v", err)
		}
		select {
		case <-deadline:
			w.t.Fatalf("a day later: no handoff: %v; source %+v, destination %+v", err, w.src.Status(), w.dst.Status())
		case err := <-w.dstDone: // it was complete before
			w.dstDone <- err
			handing = false
		case <-time.After(10 * time.Millisecond):
		}
	}
	select {
	case err := <-w.dstDone:
		require.NoError(w.t, err)
	case <-deadline:
		w.t.Fatalf("a day later: not complete: source %+v, destination %+v", w.src.Status(), w.dst.Status())
	}
	<-time.After(3 * time.Second) // the guests write on
	for name, tr := range w.trs {
		_, err := tr.ReadAt(make([]byte, 1), 0)
		require.ErrorIs(w.t, err, ErrHandedOff, name)
		require.True(w.t, w.moved[name], "%s: the guest found its disk", name)
	}
}

func (w *world) end() {
	w.stop()
	w.wires.cut()
	w.wg.Wait()
}

func (w *world) compare() {
	for _, g := range w.guests {
		d, _ := w.part(g.name)
		if !bytes.Equal(g.want, d.cache) {
			for i := range g.want {
				if g.want[i] != d.cache[i] {
					w.t.Errorf("%s differs at %d (block %d of %d bytes): %x, want %x", g.name, i, int64(i)/w.blockSize, w.blockSize, d.cache[i:i+4], g.want[i:i+4])
					break
				}
			}
		}
	}
}

func runLive(t *testing.T, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 2))
	w := newWorld(t, seed, 1+rnd.IntN(2), int64(16+16*rnd.IntN(4))<<10)
	defer w.end()
	w.auto = rnd.IntN(3) == 0
	w.rolls = !w.auto && rnd.IntN(2) == 0
	w.plug()
	w.life.Lock()
	w.startSource()
	w.startDest()
	w.life.Unlock()
	for _, g := range w.guests {
		for writer := range int64(2) {
			pause := time.Duration(300+rnd.IntN(3000)) * time.Microsecond
			w.wg.Go(func() { w.guestLoop(g, writer, pause) })
		}
	}
	for range rnd.IntN(12) {
		<-time.After(time.Duration(rnd.IntN(200)) * time.Millisecond)
		w.happen()
	}
	w.finish()
	w.end()
	w.compare()
	require.NoError(t, w.dst.Close())
}

// TestLiveMigrationLosesNothing lets guests write numbered records to disks that
// move, while the connection breaks, either side loses its power or its process, the
// destination is rolled back, and handoffs are asked for, aborted and fail. The disks
// hold what was written (traps M7, M14 and I5, fault A6).
func TestLiveMigrationLosesNothing(t *testing.T) {
	seed := *liveSeed
	if seed == 0 {
		seed = rand.Uint64N(1 << 32)
	}
	for i := range uint64(*liveRuns) {
		name := fmt.Sprintf("seed=%d", seed+i)
		ok := t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { runLive(t, seed+i) })
		})
		if !ok {
			t.Fatalf("run again with -migrate.live=1 -migrate.liveseed=%d", seed+i)
		}
	}
}
