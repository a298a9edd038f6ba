package sources

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

const (
	memoryPage    = 4 << 10  // bytes in a page, the grain of a hole
	memoryRegion  = 64 << 10 // bytes that share one lock
	memoryStripes = 64       // locks
)

// MemoryStorage is storage in memory. It is sparse: pages that were never
// written take no memory and are holes.
type MemoryStorage struct {
	size   int64
	closed atomic.Bool

	// A region of memoryRegion bytes is guarded by locks[region%memoryStripes],
	// both its entries of pages and the bytes they point to. No more than one
	// lock is held at a time, so an operation is whole in each region only.
	locks [memoryStripes]sync.RWMutex
	pages []*[memoryPage]byte // nil: a hole
}

var (
	_ storage.StorageProvider = (*MemoryStorage)(nil)
	_ storage.Zeroer          = (*MemoryStorage)(nil)
	_ storage.Trimmer         = (*MemoryStorage)(nil)
	_ storage.Extenter        = (*MemoryStorage)(nil)
)

// NewMemoryStorage returns storage of size bytes, all of it one hole.
func NewMemoryStorage(size int) *MemoryStorage {
	if size < 0 {
		panic(fmt.Sprintf("sources: memory storage of %d bytes", size))
	}
	return &MemoryStorage{
		size:  int64(size),
		pages: make([]*[memoryPage]byte, (int64(size)+memoryPage-1)/memoryPage),
	}
}

// ReadAt implements storage.StorageProvider.
func (m *MemoryStorage) ReadAt(p []byte, off int64) (int, error) {
	n, err := readable(len(p), off, m.size)
	if m.closed.Load() {
		return 0, opError("read", off, int64(len(p)), ErrClosed)
	}
	m.eachPage(off, int64(n), false, func(page **[memoryPage]byte, from, to, done int64) {
		if *page == nil {
			clear(p[done : done+to-from])
			return
		}
		copy(p[done:], (*page)[from:to])
	})
	return n, err
}

// WriteAt implements storage.StorageProvider.
func (m *MemoryStorage) WriteAt(p []byte, off int64) (int, error) {
	if err := m.check("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	m.eachPage(off, int64(len(p)), true, func(page **[memoryPage]byte, from, to, done int64) {
		if *page == nil {
			*page = new([memoryPage]byte)
		}
		copy((*page)[from:to], p[done:])
	})
	return len(p), nil
}

// ZeroAt implements storage.Zeroer.
func (m *MemoryStorage) ZeroAt(off, length int64, punch bool) error {
	if err := m.check("zero", off, length); err != nil {
		return err
	}
	m.eachPage(off, length, true, func(page **[memoryPage]byte, from, to, _ int64) {
		switch {
		case punch && m.coversPage(from, to, off+length):
			*page = nil
		case *page != nil:
			clear((*page)[from:to])
		case !punch:
			*page = new([memoryPage]byte)
		}
	})
	return nil
}

// TrimAt implements storage.Trimmer: whole pages become holes, the rest of the
// range keeps its bytes.
func (m *MemoryStorage) TrimAt(off, length int64) error {
	if err := m.check("trim", off, length); err != nil {
		return err
	}
	m.eachPage(off, length, true, func(page **[memoryPage]byte, from, to, _ int64) {
		if m.coversPage(from, to, off+length) {
			*page = nil
		}
	})
	return nil
}

// ExtentAt implements storage.Extenter; extents begin and end on pages of 4 KiB.
func (m *MemoryStorage) ExtentAt(off int64) (end int64, hole bool, err error) {
	if err := m.check("extent", off, 1); err != nil {
		return 0, false, err
	}
	first := off / memoryPage
	hole = m.isHole(first)
	next := first + 1
	for next < int64(len(m.pages)) && m.isHole(next) == hole {
		next++
	}
	return min(next*memoryPage, m.size), hole, nil
}

// Size implements storage.StorageProvider.
func (m *MemoryStorage) Size() uint64 { return uint64(m.size) }

// Flush implements storage.StorageProvider; memory has nothing to flush to.
func (m *MemoryStorage) Flush() error {
	if m.closed.Load() {
		return fmt.Errorf("flush: %w", ErrClosed)
	}
	return nil
}

// Close implements storage.StorageProvider. Operations after it fail with
// ErrClosed.
func (m *MemoryStorage) Close() error {
	m.closed.Store(true)
	return nil
}

func (m *MemoryStorage) check(op string, off, length int64) error {
	if m.closed.Load() {
		return opError(op, off, length, ErrClosed)
	}
	return checkRange(op, off, length, m.size)
}

// coversPage says whether [from, to) of a page is all of it; in the last page
// the storage's end stands for the page's.
func (m *MemoryStorage) coversPage(from, to, end int64) bool {
	return from == 0 && (to == memoryPage || end == m.size)
}

func (m *MemoryStorage) isHole(page int64) bool {
	l := m.lock(page * memoryPage)
	l.RLock()
	defer l.RUnlock()
	return m.pages[page] == nil
}

func (m *MemoryStorage) lock(off int64) *sync.RWMutex {
	return &m.locks[off/memoryRegion%memoryStripes]
}

// eachPage calls do for each page that [off, off+length) touches, under the
// lock of its region: do gets the part [from, to) of the page that is meant
// and how many bytes of the range came before.
func (m *MemoryStorage) eachPage(off, length int64, write bool, do func(page **[memoryPage]byte, from, to, done int64)) {
	for done := int64(0); done < length; {
		l := m.lock(off + done)
		regionEnd := min(length, done+memoryRegion-(off+done)%memoryRegion)
		if write {
			l.Lock()
		} else {
			l.RLock()
		}
		for done < regionEnd {
			from := (off + done) % memoryPage
			to := min(memoryPage, from+regionEnd-done)
			do(&m.pages[(off+done)/memoryPage], from, to, done)
			done += to - from
		}
		if write {
			l.Unlock()
		} else {
			l.RUnlock()
		}
	}
}

// readable returns how many of the n bytes asked for at off a storage of size
// bytes has, and the error that a reader gets beside them.
func readable(n int, off, size int64) (int, error) {
	switch {
	case off < 0:
		return 0, opError("read", off, int64(n), storage.ErrOutOfRange)
	case off > size || off == size && n > 0:
		return 0, io.EOF
	case int64(n) > size-off:
		return int(size - off), io.EOF
	}
	return n, nil
}
