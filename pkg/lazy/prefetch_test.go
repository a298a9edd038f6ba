package lazy

import (
	"slices"
	"testing"
	"testing/synctest"
)

// busySource takes its first call for as long as the test likes.
type busySource struct {
	asks
	busy chan struct{} // closed: no more
}

func (s *busySource) NeedAt(off, length int64) {
	<-s.busy
	s.asks.NeedAt(off, length)
}

func TestReadIsAskedForBesideAPrefetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, _ := newTestDevice(t, 256*testBlock, Options{BlockSize: testBlock})
		src := &busySource{busy: make(chan struct{})}
		s := d.Attach(src)
		first := run(func() { mustRead(t, d, 255*testBlock, filled(1, 1)) }) // occupies the ask loop
		synctest.Wait()
		if err := d.Prefetch(0, 128*testBlock); err != nil {
			t.Fatal(err)
		}
		second := run(func() { mustRead(t, d, 100*testBlock, filled(1, 1)) })
		synctest.Wait()
		close(src.busy)
		synctest.Wait()
		want := [][2]int64{{255 * testBlock, testBlock}, {100 * testBlock, testBlock}, {0, 128 * testBlock}}
		if got := src.needed(); !slices.Equal(got, want) {
			t.Errorf("asked for %v, want %v: what somebody waits for goes first and by itself", got, want)
		}
		mustWrite(t, s, 0, filled(1, 256*testBlock))
		<-first
		<-second
	})
}
