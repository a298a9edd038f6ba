package lazy

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
)

// Two writes of the same sectors at the same time: which of them the disk has is
// not known, so what is there after a flush is there after the power cut.
func TestWritesAtTheSameTimeAreNotLogged(t *testing.T) {
	for _, large := range []bool{false, true} { // the first one is not to be logged anyway
		synctest.Test(t, func(t *testing.T) {
			a := newLogged(t, 32, Options{})
			mustWrite(t, a.s, 0, filled(1, 32*testBlock))
			a.sync()
			n := int64(1024)
			if large {
				n = maxLogged + 512
			}
			goOn, once := make(chan struct{}), true
			a.p.after = func(what string) {
				if what == "write disk" && once { // the first is on the disk, and not answered
					once = false
					<-goOn
				}
			}
			first := run(func() { mustWrite(t, a.d, 0, filled(2, n)) })
			synctest.Wait()
			mustWrite(t, a.d, 512, filled(3, 512))
			close(goOn)
			<-first
			a.sync()
			a.cut(false, false)
			mustRead(t, a.d, 0, slices.Concat(filled(2, 512), filled(3, 512), filled(2, n-1024)))
		})
	}
}

// A write that ends between the beginning and the end of one that is not
// collected is tangled with it also if a flush comes between.
func TestWriteBesideOneThatIsNotLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newLogged(t, 32, Options{})
		mustWrite(t, a.s, 0, filled(1, 32*testBlock))
		a.sync()
		large, small := make(chan struct{}), make(chan struct{})
		n := 0
		a.p.hook = func(what string) error {
			if what == "write disk" {
				if n++; n == 1 {
					<-large
				}
			}
			return nil
		}
		a.p.after = func(what string) {
			if what == "write disk" && n == 2 {
				n++
				<-small
			}
		}
		first := run(func() { mustWrite(t, a.d, 0, filled(2, maxLogged+512)) })
		synctest.Wait()
		second := run(func() { mustWrite(t, a.d, 0, filled(3, 512)) })
		synctest.Wait() // the second is on the disk
		close(large)
		<-first // and the first over it
		a.sync()
		close(small)
		<-second
		a.sync()
		a.cut(false, false)
		mustRead(t, a.d, 0, filled(2, maxLogged+512))
	})
}

// Any number of writers of the same few sectors: when all have ended and a flush
// was answered, the power cut changes nothing of what is read.
func TestWhatIsReadAfterAFlushStays(t *testing.T) {
	r := rand.New(rand.NewPCG(*flagSeed, 3))
	rounds := 400
	if testing.Short() {
		rounds = 40
	}
	a := newLogged(t, 12, Options{})
	got := make([]byte, 12*testBlock)
	mustWrite(t, a.s, 0, got)
	a.sync()
	for range rounds {
		for range 1 + r.IntN(3) {
			var writers sync.WaitGroup
			a.p.after = func(string) { a.file.size() } // a place where another may go on
			for range 3 {
				rw := rand.New(rand.NewPCG(r.Uint64(), 1))
				writers.Go(func() {
					for range 4 {
						off := rw.Int64N(8) * 512
						n := 512 * (1 + rw.Int64N(4))
						if rw.IntN(30) == 0 {
							n = maxLogged + 512
						}
						p := make([]byte, n)
						fillRandom(rw, p)
						if _, err := a.d.WriteAt(p, off); err != nil {
							t.Error(err)
						}
						if rw.IntN(3) == 0 {
							if err := a.d.Sync(); err != nil {
								t.Error(err)
							}
						}
					}
				})
			}
			writers.Wait()
		}
		a.p.after = nil
		a.sync()
		mustRead(t, a.d, 0, a.disk.bytes())
		got = a.disk.bytes()
		if a.cut(false, false); !bytes.Equal(got, a.disk.bytes()) {
			t.Fatal("the power cut changed what had been read")
		}
		a.sync()
	}
	if n := a.seen.records.Load(); n < int64(rounds) {
		t.Errorf("%d records in %d rounds", n, rounds)
	}
}
