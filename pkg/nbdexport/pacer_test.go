package nbdexport

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// slowDisk is a plain backend on a device that takes its time, but for any
// number of requests at once.
type slowDisk struct {
	*memory
	takes time.Duration
}

func (d *slowDisk) ReadAt(p []byte, off int64) (int, error) {
	pass(d.takes)
	return d.memory.ReadAt(p, off)
}

// A device that serves many requests at once is given many at once, also by
// a backend that does not say when it waits.
func TestSlowDevicesGetRequestsAtOnce(t *testing.T) {
	for _, takes := range []time.Duration{100 * time.Microsecond, 10 * time.Millisecond} {
		synctest.Test(t, func(t *testing.T) {
			s := NewServer(Options{})
			require.NoError(t, s.AddExport(Export{Backend: &slowDisk{newMemory(mib), takes}}))
			c := pipeClient(t, s).enter("", modeSimple)
			const requests, depth = 6000, 32
			room := make(chan struct{}, depth)
			go func() {
				for i := range requests {
					room <- struct{}{}
					if _, err := c.Write(packRequest(modeSimple, cmdRead, 0, uint64(i), 0, 512)); err != nil {
						return
					}
				}
			}()
			began := time.Now()
			for range requests {
				require.Equal(t, ok, c.chunk(512).err)
				<-room
			}
			alone := requests * takes
			require.Less(t, time.Since(began), alone/6, "%v a request", takes)
			require.NoError(t, s.Close())
		})
	}
}

// drive runs windows of requests that take so long with and without workers,
// and counts those with.
func drive(p *pacer, windows int, alone, workers time.Duration) (with int) {
	ended := uint64(0)
	for range windows {
		for range windowRequests {
			ended++
			if p.next(ended, false) {
				pass(workers)
			} else {
				pass(alone)
				p.ran(alone)
			}
		}
		if p.workers {
			with++
		}
	}
	return with
}

func TestPacer(t *testing.T) {
	for _, test := range []struct {
		name           string
		alone, workers time.Duration
		least, most    int // of 1000 windows with workers
	}{
		{"memory", 3 * time.Microsecond, 5 * time.Microsecond, 0, 0},
		{"a device", 100 * time.Microsecond, 5 * time.Microsecond, 950, 1000},
		{"a busy processor", 100 * time.Microsecond, 120 * time.Microsecond, 1, 15},
	} {
		synctest.Test(t, func(t *testing.T) {
			var p pacer
			with := drive(&p, 1000, test.alone, test.workers)
			require.GreaterOrEqual(t, with, test.least, test.name)
			require.LessOrEqual(t, with, test.most, test.name)
			// And back when the device is fast again.
			drive(&p, 300, 3*time.Microsecond, 5*time.Microsecond)
			require.Zero(t, drive(&p, 300, 3*time.Microsecond, 5*time.Microsecond), test.name)
		})
	}
}
