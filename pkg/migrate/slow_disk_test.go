package migrate

import (
	"math/rand/v2"
	"sync"
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// slowDisk takes its time, so that reads and writes of it overlap in every way:
// a write is half done for a while.
type slowDisk struct {
	ranger
	storage.StorageProvider
	mu  sync.Mutex
	rnd *rand.Rand // guarded by mu
}

func newSlowDisk(s storage.StorageProvider, rnd *rand.Rand) *slowDisk {
	return &slowDisk{ranger: s.(ranger), StorageProvider: s, rnd: rnd}
}

func (d *slowDisk) pause() {
	d.mu.Lock()
	n := d.rnd.IntN(6)
	d.mu.Unlock()
	if n > 2 {
		<-time.After(time.Duration(n-2) * time.Millisecond)
	}
}

func (d *slowDisk) ReadAt(p []byte, off int64) (int, error) {
	d.pause()
	n, err := d.StorageProvider.ReadAt(p, off)
	d.pause()
	return n, err
}

func (d *slowDisk) WriteAt(p []byte, off int64) (int, error) {
	d.pause()
	half := len(p) / 2
	n, err := d.StorageProvider.WriteAt(p[:half], off)
	if err != nil {
		return n, err
	}
	d.pause()
	n, err = d.StorageProvider.WriteAt(p[half:], off+int64(half))
	d.pause()
	return half + n, err
}

func (d *slowDisk) ZeroAt(off, length int64, punch bool) error {
	d.pause()
	err := d.ranger.ZeroAt(off, length, punch)
	d.pause()
	return err
}

func (d *slowDisk) ExtentAt(off int64) (end int64, hole bool, err error) {
	end, hole, err = d.ranger.ExtentAt(off)
	d.pause()
	return end, hole, err
}
