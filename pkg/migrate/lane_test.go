package migrate

import (
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// standsStill takes nothing from an offset on until it may go on.
type standsStill struct {
	storage.StorageProvider
	from int64
	goOn chan struct{}
}

func (s standsStill) WriteAt(p []byte, off int64) (int, error) {
	if off >= s.from {
		<-s.goOn
	}
	return s.StorageProvider.WriteAt(p, off)
}

// goodDisk returns how long it takes until the disk "good" is at the destination, over a
// link of 50 MB/s, when the store of another disk is as beside makes it; nil: there is
// no other.
func goodDisk(t *testing.T, beside func(s storage.StorageProvider, goOn chan struct{}) storage.StorageProvider) (took time.Duration) {
	synctest.Test(t, func(t *testing.T) {
		const size = 32 << 20
		goOn := make(chan struct{})
		good, _ := testDisk(t, size, 2)
		disks := []SourceDisk{{Name: "good", Store: good, Identity: Identity{UUID: [16]byte{2}, Generation: 1}}}
		if beside != nil {
			bad, _ := testDisk(t, size, 1)
			disks = append(disks, SourceDisk{Name: "bad", Store: bad, Identity: Identity{UUID: [16]byte{1}, Generation: 1}})
		}
		src := newSource(t, SourceOptions{Listening: true}, disks...)
		dst := newDestination(t, DestinationOptions{Listening: true, Disks: len(disks)}, func(n string, s uint64) storage.StorageProvider {
			if n == "bad" {
				return beside(memory(n, s), goOn)
			}
			return memory(n, s)
		})
		w := newWires()
		w.wrap = func(c net.Conn) io.ReadWriteCloser { return &slowConn{Conn: c, rate: 50e6} }
		began := time.Now()
		m := migrate(t, src, dst, w)
		for src.Status()[0].State != StateComplete {
			<-time.After(time.Millisecond)
			if time.Since(began) > time.Minute {
				t.Errorf("the good disk stands at %d of %d bytes", src.Status()[0].BytesDone, size)
				break
			}
		}
		took = time.Since(began)
		close(goOn)
		require.Equal(t, []error{nil, nil}, m.end())
		require.NoError(t, dst.Close())
	})
	return took
}

// TestDiskThatStandsStillHoldsUpNoOther: the stream of the other disk keeps its own rate
// (fault B3, traps P4 and R2).
func TestDiskThatStandsStillHoldsUpNoOther(t *testing.T) {
	alone := goodDisk(t, nil)
	for _, from := range []int64{0, 4 << 20} {
		took := goodDisk(t, func(s storage.StorageProvider, goOn chan struct{}) storage.StorageProvider {
			return standsStill{s, from, goOn}
		})
		t.Logf("stands still from %d on: the other took %v, alone %v", from, took, alone)
		had := time.Duration(float64(from) / 50e6 * 1e9) // of the link, by the one that stands still
		require.Less(t, took-had, alone*10/9)
	}
}

// TestSlowDiskSlowsNoOther: the other has what the slow one does not use (fault B3).
func TestSlowDiskSlowsNoOther(t *testing.T) {
	alone := goodDisk(t, nil)
	for _, pause := range []time.Duration{50 * time.Millisecond, time.Second} {
		took := goodDisk(t, func(s storage.StorageProvider, _ chan struct{}) storage.StorageProvider {
			return late{s, pause}
		})
		t.Logf("each write of the slow disk takes %v: the other took %v, alone %v", pause, took, alone)
		require.Less(t, took, alone*5/4)
	}
}

// TestEqualDisksShareTheLink (fault H18).
func TestEqualDisksShareTheLink(t *testing.T) {
	alone := goodDisk(t, nil)
	took := goodDisk(t, func(s storage.StorageProvider, _ chan struct{}) storage.StorageProvider { return s })
	t.Logf("beside an equal disk it took %v, alone %v", took, alone)
	require.InDelta(t, 2, took.Seconds()/alone.Seconds(), 0.3)
}
