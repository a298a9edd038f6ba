package streams

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

const (
	// calmLines is how many lines of one kind may be logged in calmTime: what
	// strangers do must not fill a disk.
	calmLines = 20
	calmTime  = 10 * time.Second
	// calmKinds is how many kinds are told apart.
	calmKinds = 1024
	// maxText is the longest text of an attribute in a log line, in bytes.
	maxText = 1 << 10
)

// Calm is a slog.Handler that bounds how many lines of one kind go to another one:
// those with the same message about the same disk. What is left out is counted,
// and told with the next line of its kind.
type Calm struct {
	to    slog.Handler
	kinds *kinds // shared by the handlers that were made of one
}

type kinds struct {
	mu sync.Mutex
	// Guarded by mu:
	began time.Time
	lines map[string]*kind
}

// kind is what was logged since began.
type kind struct{ lines, left int }

// NewCalm returns a Calm in front of to.
func NewCalm(to slog.Handler) *Calm {
	return &Calm{to: to, kinds: &kinds{lines: make(map[string]*kind)}}
}

// Enabled implements slog.Handler.
func (c *Calm) Enabled(ctx context.Context, level slog.Level) bool { return c.to.Enabled(ctx, level) }

// WithAttrs implements slog.Handler.
func (c *Calm) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &Calm{c.to.WithAttrs(attrs), c.kinds}
}

// WithGroup implements slog.Handler.
func (c *Calm) WithGroup(name string) slog.Handler { return &Calm{c.to.WithGroup(name), c.kinds} }

// Handle implements slog.Handler.
func (c *Calm) Handle(ctx context.Context, r slog.Record) error {
	key := r.Message
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "disk" || a.Key == "export" {
			key += "\x00" + Cut(a.Value.String())
			return false
		}
		return true
	})
	left, ok := c.kinds.count(key, r.Message, r.Time)
	if !ok {
		return nil
	}
	if left > 0 {
		r = r.Clone()
		r.AddAttrs(slog.Int("left_out", left))
	}
	return c.to.Handle(ctx, r)
}

// count reports whether one more line of a kind is to be logged, and how many were
// left out since the last one.
func (k *kinds) count(key, message string, now time.Time) (left int, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if now.Sub(k.began) >= calmTime {
		k.began = now
		for key, l := range k.lines {
			if l.lines = 0; l.left == 0 {
				delete(k.lines, key)
			}
		}
	}
	l := k.lines[key]
	if l == nil && len(k.lines) >= calmKinds {
		l, key = k.lines[message], message
	}
	if l == nil {
		l = new(kind)
		k.lines[key] = l
	}
	if l.lines >= calmLines {
		l.left++
		return 0, false
	}
	l.lines++
	left, l.left = l.left, 0
	return left, true
}

// Cut shortens a text that a peer may have made as long as it likes.
func Cut(s string) string {
	if len(s) <= maxText {
		return s
	}
	return fmt.Sprintf("%s… (%d bytes)", s[:maxText], len(s))
}

// CutAttr is a ReplaceAttr of slog.HandlerOptions that makes texts bearable.
func CutAttr(_ []string, a slog.Attr) slog.Attr {
	switch v := a.Value.Any().(type) {
	case string:
		a.Value = slog.StringValue(Cut(v))
	case error:
		a.Value = slog.StringValue(Cut(v.Error()))
	case fmt.Stringer:
		if a.Value.Kind() == slog.KindAny {
			a.Value = slog.StringValue(Cut(v.String()))
		}
	}
	return a
}
