package protocol

import "sync"

// budget bounds the memory of received data. A device has a share that is its
// own; the rest is a pool for what goes over it. Of the memory the pool is an
// eighth, and another eighth is minShare for each device that there may be.
type budget struct {
	mu   sync.Mutex
	room sync.Cond // there is one who waits: the reader
	// Guarded by mu, as are the accounts:
	total   int64 // bytes of the pool, without the shares
	free    int64 // bytes of the pool; below 0 only by one packet that is larger than it
	reserve int64 // bytes that can still be dealt out as shares beyond minShare
	dealt   bool  // there is a device
	used    int64 // bytes in all
	closed  bool
}

// account is what one device has of the budget.
type account struct {
	share int64 // bytes that no other device can take
	used  int64 // bytes
}

func (b *budget) init(memory int64) {
	b.room.L = &b.mu
	b.total = memory / 8
	b.free = b.total
	b.reserve = memory - b.total - memory/memoryPerDevice*minShare
}

// open gives a device its share: minShare, and of what is left to be dealt out
// two thirds to the first device, which is often the only one, and half to each
// after it. It returns the bytes that it has beyond minShare.
func (b *budget) open(a *account) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	part := b.reserve / 2
	if !b.dealt {
		part = b.reserve / 3 * 2
		b.dealt = true
	}
	part &^= page - 1
	b.reserve -= part
	a.share = minShare + part
	return part
}

func (a *account) over(used int64) int64 {
	return max(0, used-a.share)
}

// acquire waits until n bytes are free for the device: in its share first, then
// in the pool. A packet larger than both is let in alone. False says that the
// connection ended.
func (b *budget) acquire(a *account, n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for !b.closed {
		need := a.over(a.used+n) - a.over(a.used)
		if need <= b.free || a.used == 0 && b.free == b.total {
			a.used += n
			b.free -= need
			b.used += n
			return true
		}
		b.room.Wait()
	}
	return false
}

// release gives back n bytes.
func (b *budget) release(a *account, n int64) {
	if n == 0 {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.free += a.over(a.used) - a.over(a.used-n)
	a.used -= n
	b.used -= n
	b.room.Signal()
}

func (b *budget) inUse() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.used
}

func (b *budget) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	b.room.Broadcast()
}
