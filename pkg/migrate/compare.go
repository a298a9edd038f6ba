package migrate

import (
	"context"
	"crypto/sha256"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// When the proof is lost that the source's disk is as it was (a device after a reboot,
// a file that was copied), its generation is another, and a destination that is live
// cannot begin anew. Then the ends compare: the destination claims what came from this
// disk and was not written since, and nothing else; the source sends SHA-256 hashes of
// just these blocks; and the destination asks for a block of them by NeedAt when it
// differs, which ends the comparison and the connection. If all are equal, it takes
// the new generation over, durably, and claims the rest of what it has before it
// answers the last of the hashes. No data travels before.

const (
	// compareBytes is how much of the disk one packet of hashes stands for, and
	// compareHashes how many it holds, at most. Two are under way at a time.
	compareBytes  = 16 << 20
	compareHashes = 1024
	// compareLogEvery is how often the log tells how far it is.
	compareLogEvery = time.Minute
)

// differsError means that the disk of the source is not the one that the destination has
// a part of, or was written since.
type differsError struct {
	disk string
	off  int64 // of a block that differs
}

func (e *differsError) Error() string {
	return fmt.Sprintf("disk %q: what the destination has of it differs at %d: it is another disk, or was written since: "+
		"nothing was sent: give the right disk, or begin anew at the destination with --overwrite", cut(e.disk, maxName), e.off)
}

// comparing is how far a comparison is.
type comparing struct {
	on       atomic.Bool
	of, done atomic.Int64 // bytes
}

func (c *comparing) begin(bytes int64) {
	c.of.Store(bytes)
	c.done.Store(0)
	c.on.Store(true)
}

func (c *comparing) end() { c.on.Store(false) }

// status tells of a comparison that is under way.
func (c *comparing) status(st *DiskStatus) {
	if c.on.Load() {
		st.State, st.BytesCompared, st.BytesToCompare = StateComparing, c.done.Load(), c.of.Load()
	}
}

// compare has the destination compare what it claims. It returns a differsError if a
// block differs.
func (s *Source) compare(ctx context.Context, c *line) error {
	d, began := c.disk, time.Now()
	of := c.order.claimedBytes()
	d.comparing.begin(of)
	defer d.comparing.end()
	s.log.Info("comparing: it is not proved that the disk is as it was, so the destination compares what it has of it",
		"disk", d.Name, "bytes", of)
	told := began
	r := c.pump.newReader()
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(2)
	for from := int64(0); ctx.Err() == nil; {
		batch, bytes, next, err := c.hashes(ctx, r, from)
		if ctx.Err() != nil {
			break // the error is that of the other side
		}
		if err != nil {
			group.Go(func() error { return c.pump.fail(err) })
			break
		}
		if len(batch) == 0 {
			break
		}
		from = next
		group.Go(func() error { return c.sendHashes(ctx, batch, bytes) })
		if now := time.Now(); now.Sub(told) >= compareLogEvery {
			told = now
			s.log.Info("comparing", "disk", d.Name, "compared", d.comparing.done.Load(), "bytes", of)
		}
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if ctx := context.Cause(ctx); ctx != nil && d.comparing.done.Load() < of {
		return ctx
	}
	s.log.Info("compared: what the destination has is as it is here", "disk", d.Name, "bytes", of, "took", time.Since(began).Round(time.Millisecond))
	return nil
}

// hashes returns those of the next blocks that the destination has claimed, from block
// from on, how many bytes they stand for, and where to go on.
func (c *line) hashes(ctx context.Context, r *reader, from int64) (batch []wire.Hash, bytes, next int64, err error) {
	geo := c.order.geo
	for len(batch) < compareHashes && bytes < compareBytes {
		s, ok := c.order.nextClaimed(from, min(maxPacket/geo.blockSize, compareHashes-int64(len(batch))))
		if !ok {
			return batch, bytes, geo.blocks, nil
		}
		data, err := readAgain(ctx, r, s)
		if err != nil {
			return nil, 0, 0, err
		}
		bytes += int64(len(data))
		for b := s.from; b < s.to; b++ {
			n := min(geo.blockSize, int64(len(data)))
			batch = append(batch, wire.Hash{Block: uint32(b), Sum: sha256.Sum256(data[:n])})
			data = data[n:]
		}
		from = s.to
	}
	return batch, bytes, from, nil
}

// readAgain reads s, as often as a block is tried that is to be sent.
func readAgain(ctx context.Context, r *reader, s span) ([]byte, error) {
	for n, pause := 1, firstRetry; ; n, pause = n+1, 2*pause {
		data, err := r.read(s)
		if err == nil {
			return data, nil
		}
		if n == maxAttempts {
			return nil, fmt.Errorf("gave up after %d tries: %w", n, err)
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil, context.Cause(ctx)
		}
	}
}

func (c *line) sendHashes(ctx context.Context, batch []wire.Hash, bytes int64) error {
	if err := c.to.SendHashes(ctx, batch); err != nil {
		return err
	}
	for _, h := range batch {
		if b := int64(h.Block); c.order.isPending(b) {
			off, _ := c.order.geo.bytes(span{b, b + 1})
			return &differsError{c.disk.Name, off}
		}
	}
	c.disk.comparing.done.Add(bytes)
	return nil
}

// nextClaimed returns the next run of at most limit blocks, from block from on, that
// the destination does not need.
func (o *order) nextClaimed(from, limit int64) (span, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	from = o.pending.runEnd(from, o.geo.blocks)
	if from == o.geo.blocks {
		return span{}, false
	}
	to := min(from+max(1, limit), o.geo.blocks)
	if next := o.pending.nextIn(from, to); next >= 0 {
		to = next
	}
	return span{from, to}, true
}

// claimedBytes is how much the destination does not need.
func (o *order) claimedBytes() int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := (o.geo.blocks - o.left) * o.geo.blockSize
	if last := o.geo.blocks - 1; !o.pending.get(last) {
		_, length := o.geo.bytes(span{last, last + 1})
		n -= o.geo.blockSize - length
	}
	return n
}

func (o *order) isPending(b int64) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.pending.get(b)
}
