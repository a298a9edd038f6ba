package migrate

import (
	"fmt"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// cutWrites lets left more bytes be written, then breaks the connection.
type cutWrites struct {
	io.ReadWriteCloser
	left  int64
	fired *atomic.Bool
}

func (c *cutWrites) Write(p []byte) (int, error) {
	if int64(len(p)) <= c.left {
		n, err := c.ReadWriteCloser.Write(p)
		c.left -= int64(n)
		return n, err
	}
	n, _ := c.ReadWriteCloser.Write(p[:c.left]) // what counts is that it breaks
	c.left = 0
	c.fired.Store(true)
	<-time.After(10 * time.Millisecond) // what was written before still arrives
	_ = c.Close()                       // cannot fail
	return n, io.ErrClosedPipe
}

// runHandoffCut moves a small disk under two writers. The connection on which
// the handoff is asked for breaks after n bytes of one direction, and then,
// before it can be made again, one of the sides may die.
func runHandoffCut(t *testing.T, n int64, toDest bool, dies string) (fired bool) {
	var cut atomic.Bool
	w := newWorld(t, 5, 1, 16<<10)
	defer w.end()
	w.blockSize, w.rate, w.wires.lag = 2048, 0, time.Millisecond
	first := true
	w.wires.wrap = func(src, dst io.ReadWriteCloser) (io.ReadWriteCloser, io.ReadWriteCloser) {
		switch {
		case !first:
		case toDest:
			src = &cutWrites{src, n, &cut}
		default:
			dst = &cutWrites{dst, n, &cut}
		}
		first = false
		return src, dst
	}
	w.plug()
	w.life.Lock()
	w.startSource()
	w.startDest()
	w.life.Unlock()
	for writer := range int64(2) {
		w.wg.Go(func() { w.guestLoop(w.guests[0], writer, 3*time.Millisecond) })
	}
	<-time.After(150 * time.Millisecond)
	if dies == "destination, and a copy comes" {
		w.rollBackDest() // makes the copy
		<-time.After(150 * time.Millisecond)
	}
	_ = w.src.Handoff(w.ctx) // it may come to nothing
	if cut.Load() {
		switch dies {
		case "source":
			w.killSource()
		case "destination":
			w.killDest()
		case "destination, and a copy comes":
			w.copyComes()
		}
	}
	w.finish()
	w.end()
	w.compare()
	require.NoError(t, w.dst.Close())
	return cut.Load()
}

// copyComes starts a copy of the destination from before the handoff began in its
// place for a while. If the disks were handed off it must not go live.
func (w *world) copyComes() {
	w.life.Lock()
	defer w.life.Unlock()
	w.stopDest()
	original := w.copyDest()
	w.restoreDest(w.before)
	w.startDest()
	<-time.After(time.Second)
	if dev := w.devs[w.guests[0].name]; w.src.HandedOff() && isLive(dev) {
		w.t.Error("a copy has become an owner, too")
	}
	w.stopDest()
	w.restoreDest(original)
	w.startDest()
}

// TestHandoffMayBreakAtEveryByte is trap M7: the connection breaks at any byte of
// either direction, and either side may die at that moment. There are never two
// owners, there is one in the end, and it has all that was written (also trap I5).
func TestHandoffMayBreakAtEveryByte(t *testing.T) {
	stride := int64(1511)
	if *everyByte {
		stride = 1
	}
	for _, toDest := range []bool{true, false} {
		for _, dies := range []string{"nobody", "source", "destination", "destination, and a copy comes"} {
			t.Run(fmt.Sprintf("toDest=%v/%s", toDest, dies), func(t *testing.T) {
				for n := rand.Int64N(stride); ; n += stride {
					fired := false
					ok := t.Run(fmt.Sprint(n), func(t *testing.T) {
						synctest.Test(t, func(t *testing.T) { fired = runHandoffCut(t, n, toDest, dies) })
					})
					if !fired || !ok {
						break
					}
				}
			})
		}
	}
}
