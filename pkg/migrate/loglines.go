package migrate

import (
	"sync"
	"time"
	"unicode/utf8"
)

const (
	// maxName and maxReason bound what a log line repeats of a peer's words, in bytes.
	maxName   = 200
	maxReason = 1000
	// Of lines that any stranger can cause there are lineBurst at once, and then one
	// every lineEvery.
	lineBurst = 20
	lineEvery = 5 * time.Second
)

// cut returns s, or its first n bytes if it is longer.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + "..."
}

// lineBudget bounds how many log lines others cause; the zero value is ready.
type lineBudget struct {
	mu sync.Mutex
	// Guarded by mu:
	used    int
	since   time.Time // when a line was last given back
	skipped int
}

// take reports whether a line may be written now, and how many were not since the last.
func (b *lineBudget) take() (skipped int, ok bool) {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	if back := int(now.Sub(b.since) / lineEvery); back >= b.used {
		b.used, b.since = 0, now
	} else if back > 0 {
		b.used -= back
		b.since = b.since.Add(time.Duration(back) * lineEvery)
	}
	if b.used >= lineBurst {
		b.skipped++
		return 0, false
	}
	b.used++
	skipped, b.skipped = b.skipped, 0
	return skipped, true
}
