package link

import (
	"slices"
	"sync"
)

// After lets something happen when so many bytes more have been delivered one
// way, by whichever connection, and before the byte that follows them: a Cut, a
// Stall, or nothing for a while, since that connection goes on only when
// happen returns. happen may call any method of the link but Close.
func (l *Link) After(way Direction, bytes int64, happen func()) {
	dir := l.way(way)
	dir.faults.add(dir.bytes.Load()+bytes, happen)
}

// faults is what is to happen at bytes of one way.
type faults struct {
	mu sync.Mutex
	// Guarded by mu:
	planned []fault // in the order in which they happen
}

type fault struct {
	at     int64 // bytes delivered before
	happen func()
}

func (f *faults) add(at int64, happen func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := 0
	for i < len(f.planned) && f.planned[i].at <= at {
		i++
	}
	f.planned = slices.Insert(f.planned, i, fault{at, happen})
}

// next returns how many of n bytes are delivered before something happens, and
// what that is; it is nil if all n are.
func (f *faults) next(delivered int64, n int) (int, func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.planned) == 0 || f.planned[0].at > delivered+int64(n) {
		return n, nil
	}
	first := f.planned[0]
	f.planned = slices.Delete(f.planned, 0, 1)
	return int(max(0, first.at-delivered)), first.happen
}
