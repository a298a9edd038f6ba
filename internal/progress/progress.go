// Package progress shows how disks move: on a terminal a bar each, elsewhere
// a log line each every few seconds.
package progress

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/sys/unix"
)

const (
	// barInterval is how often bars are brought up to date.
	barInterval = 200 * time.Millisecond
	// logInterval is how often a line is logged for a disk that moves.
	logInterval = 5 * time.Second
	// idleLogInterval is how often one is logged for a disk that does not.
	idleLogInterval = time.Minute
)

// IsTerminal says whether what is written to w is seen on a terminal that has
// room for a bar.
func IsTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	return err == nil && size.Row > 0 && size.Col > 0
}

// Display shows rows on one output, bars or lines.
type Display struct {
	out  io.Writer
	bars *mpb.Progress // nil if there are no bars
}

// New prepares a display that writes to out. With bars, everything else that
// is written to the same terminal has to go through the display's Write.
func New(out io.Writer, bars bool) *Display {
	d := &Display{out: out}
	if bars {
		d.bars = mpb.New(mpb.WithOutput(out), mpb.WithRefreshRate(barInterval), mpb.WithAutoRefresh())
	}
	return d
}

// Write writes whole lines to the output, above the bars if there are any.
func (d *Display) Write(p []byte) (int, error) {
	if d.bars != nil {
		if n, err := d.bars.Write(p); err == nil {
			return n, nil
		}
		// The bars have ended: nothing is in the way any more.
	}
	return d.out.Write(p)
}

// Run shows what rows returns until ctx ends, then the last state once more.
// Lines go to log, bars to the output. It is called once.
func (d *Display) Run(ctx context.Context, log *slog.Logger, rows func() []Row) {
	if d.bars != nil {
		d.runBars(ctx, rows)
		return
	}
	runLines(ctx, log, rows)
}

// Close ends the bars and leaves them as they are. It is for a Display that
// is not Run; Run does it by itself.
func (d *Display) Close() {
	if d.bars != nil {
		d.bars.Shutdown()
	}
}

// bar is one disk's bar.
type bar struct {
	bar     *mpb.Bar
	meter   Meter
	percent atomic.Int64
	words   atomic.Pointer[string]
}

func (d *Display) runBars(ctx context.Context, rows func() []Row) {
	bars := make(map[string]*bar)
	update := func() {
		now := time.Now()
		for _, r := range rows() {
			b := bars[r.Name]
			if b == nil {
				b = d.newBar(r)
				bars[r.Name] = b
			}
			b.show(r, now)
		}
	}
	tick := time.NewTicker(barInterval)
	defer tick.Stop()
	update()
	for {
		select {
		case <-tick.C:
			update()
			continue
		case <-ctx.Done():
		}
		break
	}
	update()
	for _, b := range bars {
		b.bar.Abort(false) // no effect on one that is complete
	}
	d.bars.Wait()
}

func (d *Display) newBar(r Row) *bar {
	b := &bar{}
	none := ""
	b.words.Store(&none)
	b.bar = d.bars.New(max(r.Size, 1), mpb.BarStyle(),
		mpb.PrependDecorators(decor.Name(r.Name, decor.WCSyncSpaceR)),
		mpb.AppendDecorators(
			decor.Any(func(decor.Statistics) string { return fmt.Sprintf("%3d%%  ", b.percent.Load()) }),
			decor.Any(func(decor.Statistics) string { return *b.words.Load() }),
		))
	return b
}

func (b *bar) show(r Row, now time.Time) {
	b.meter.Add(now, r.Done)
	words := describe(r, &b.meter)
	b.words.Store(&words)
	b.percent.Store(int64(r.Percent()))
	if r.Complete {
		b.bar.SetTotal(max(r.Size, 1), true)
		return
	}
	b.bar.SetCurrent(max(0, min(r.Done, r.Size-1))) // a full bar would be a finished one
}

// line is what was last logged of a disk.
type line struct {
	meter  Meter
	logged time.Time
	row    Row
}

func runLines(ctx context.Context, log *slog.Logger, rows func() []Row) {
	lines := make(map[string]*line)
	update := func(last bool) {
		now := time.Now()
		for _, r := range rows() {
			l := lines[r.Name]
			if l == nil {
				l = &line{logged: now, row: r}
				lines[r.Name] = l
			}
			l.meter.Add(now, r.Done)
			if l.due(r, now, last) {
				l.logged, l.row = now, r
				logRow(log, r, &l.meter)
			}
		}
	}
	tick := time.NewTicker(logInterval)
	defer tick.Stop()
	update(false)
	for {
		select {
		case <-tick.C:
			update(false)
		case <-ctx.Done():
			update(true)
			return
		}
	}
}

// due says whether a line is worth its place now.
func (l *line) due(r Row, now time.Time, last bool) bool {
	r.OldestWait = l.row.OldestWait // grows by itself
	changed := r != l.row
	switch {
	case last:
		return changed
	case r.Complete:
		return changed
	}
	return changed && now.Sub(l.logged) >= logInterval || now.Sub(l.logged) >= idleLogInterval
}

func logRow(log *slog.Logger, r Row, m *Meter) {
	attrs := []slog.Attr{
		slog.String("disk", r.Name),
		slog.Int("percent", r.Percent()),
		slog.Int64("done_bytes", r.Done),
		slog.Int64("size_bytes", r.Size),
	}
	if !r.Complete {
		attrs = append(attrs, slog.Bool("connected", r.Connected), slog.Int64("bytes_per_second", max(0, int64(m.rate))))
		if left, ok := m.ETA(r.Size); ok && r.Connected {
			attrs = append(attrs, slog.Int64("eta_seconds", int64(left.Seconds())))
		}
	}
	if r.Waiting > 0 {
		attrs = append(attrs, slog.Int("waiting_reads", r.Waiting), slog.Float64("longest_wait_seconds", r.OldestWait.Seconds()))
	}
	log.LogAttrs(context.Background(), slog.LevelInfo, "progress", attrs...)
}
