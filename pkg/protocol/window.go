package protocol

import "sync"

// window bounds the bulk data of a device that is sent and not yet answered, at
// what the peer said it takes for the device, so that one slow disk does not
// fill the connection that others use.
type window struct {
	mu   sync.Mutex
	room sync.Cond
	// Guarded by mu:
	size   int64 // bytes; 0: no limit
	used   int64 // bytes
	closed bool
}

func (w *window) init() {
	w.room.L = &w.mu
}

// acquire waits until n bytes fit; something larger than the window goes alone.
// False says that the connection ended.
func (w *window) acquire(n int64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.size > 0 && w.used > 0 && w.used+n > w.size && !w.closed {
		w.room.Wait()
	}
	w.used += n
	return !w.closed
}

func (w *window) release(n int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.used -= n
	w.room.Broadcast() // those who wait want different sizes
}

func (w *window) resize(size int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.size = size
	w.room.Broadcast()
}

func (w *window) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	w.room.Broadcast()
}
