package migrate

import (
	"context"
	"time"
)

// Range is a part of a disk, in bytes.
type Range struct{ Off, Length int64 }

// maxFirst bounds the ranges of a disk that go first; those beyond it go with the rest.
const maxFirst = 1 << 16

// goFirst has the background send ranges before the rest, in their order, and
// returns how many blocks they are. A range that is empty or not wholly on the
// disk is ignored.
func (o *order) goFirst(ranges []Range) (blocks int64) {
	var first []span
	for _, r := range ranges {
		s, ok := o.geo.touching(r.Off, r.Length)
		if !ok {
			continue
		}
		if n := len(first); n > 0 && s.from >= first[n-1].from && s.from <= first[n-1].to {
			blocks += max(0, s.to-first[n-1].to)
			first[n-1].to = max(first[n-1].to, s.to)
			continue
		}
		// The same again and again would cost time for nothing.
		if len(first) == maxFirst || blocks > 4*o.geo.blocks {
			break
		}
		first = append(first, s)
		blocks += s.len()
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.first = first
	notify(o.bulkWake)
	return blocks
}

// firstLocked is the next block of those that go first, or -1.
func (o *order) firstLocked() int64 {
	for len(o.first) > 0 {
		s := &o.first[0]
		if b := o.nextPendingLocked(s.from, s.to); b >= 0 {
			s.from = b
			return b
		}
		o.first = o.first[1:]
	}
	return -1
}

// atMostLocked cuts a run that begins at from where the range that goes first ends.
func (o *order) atMostLocked(from, limit int64) int64 {
	if len(o.first) > 0 && o.first[0].from == from {
		return min(limit, o.first[0].len())
	}
	return limit
}

// first finds out what of a disk goes first, while the rest is on its way.
func (s *Source) first(ctx context.Context, c *line) {
	if s.opts.First == nil {
		return
	}
	began := time.Now()
	ranges, err := s.opts.First(ctx, c.disk.Store)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		s.log.Warn("it is not known what all should go first: only the order suffers", "disk", c.disk.Name, "error", err)
	}
	if blocks := c.order.goFirst(ranges); blocks > 0 {
		s.log.Info("goes first", "disk", c.disk.Name, "bytes", blocks*c.disk.geo.blockSize, "ranges", len(ranges),
			"found_in", time.Since(began).Round(time.Millisecond))
	}
}
