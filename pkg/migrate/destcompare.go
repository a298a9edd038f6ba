package migrate

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/protocol"
	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// comparison is the destination's part of a comparison, for one connection: see
// compare.go. Only the goroutine that takes hashes uses it, apart from under.
type comparison struct {
	under atomic.Bool // nothing else is taken
	id    Identity    // the source's
	left  bitmap      // claimed blocks of which no hash has come
	n     int64       // of them
	buf   []byte
	err   error // why the connection ends
	began time.Time
}

// mustCompare reports whether what is here has to be compared with what the source has
// before anything else: it is the same disk, it is not proved that its contents are the
// same, and something is here as it came, by which that can be told. A device in standby
// begins anew instead: nothing was written to it.
func (d *destDisk) mustCompare(di *protocol.DevInfo) bool {
	ext := di.Extension
	if ext == nil || ext.Live || ext.Revision < wire.RevisionEpoch || !d.isLive() || d.complete.Load() || d.dev.Stats().Fetched == 0 {
		return false
	}
	d.mu.Lock()
	was := d.id
	d.mu.Unlock()
	return was.UUID != [16]byte{} && ext.Identity.UUID == was.UUID &&
		(ext.Identity.Generation != was.Generation || d.comparisonAsked())
}

// comparisonAsked reports whether an operator has vouched that this is the disk of the
// map, which cannot be known otherwise, and there is something to compare.
func (d *destDisk) comparisonAsked() bool {
	return d.store.Map != nil && !d.complete.Load() && d.store.Map.Compare() && d.dev.Stats().Fetched > 0
}

// unequalError means that the source's disk, under id, is not that of which a part is here.
type unequalError struct {
	id Identity
	error
}

// comparable returns an error if a comparison with id has failed already.
func (d *destDisk) comparable(id Identity) error {
	d.mu.Lock()
	known := d.unequal
	d.mu.Unlock()
	if known != nil && known.id == id {
		return known
	}
	return nil
}

func (d *destDisk) generation() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.id.Generation
}

// beginComparison claims what is here as it came, and nothing else. The device is told
// of as one that compares.
func (a *arrivals) beginComparison(id Identity) error {
	geo := a.disk.geo
	c := &comparison{id: id, left: newBitmap(geo.blocks), buf: make([]byte, geo.blockSize), began: time.Now()}
	var bytes int64
	a.disk.dev.EachUnmodified(func(off, length int64) bool {
		s, ok := geo.inside(off, length)
		if !ok {
			return true
		}
		c.left.setRange(s.from, s.to)
		c.n += s.len()
		bytes += length
		return a.from.DontNeedAt(off, length) == nil // else the connection has ended
	})
	if c.n == 0 {
		return fmt.Errorf("disk %q: a client has just written the last of what came, so that nothing can be compared with %s: "+
			"nothing was changed: begin anew with --overwrite", a.disk.name, id)
	}
	c.under.Store(true)
	a.compare = c
	a.disk.comparing.begin(bytes)
	a.disk.log.Warn("comparing: it is not proved that the source's disk is as it was, so what is here of it is compared; reads of what is missing wait",
		"disk", a.disk.name, "bytes", bytes, "generation", id.Generation, "was", a.disk.generation())
	return nil
}

// busyComparing returns an error for whatever else the source sends meanwhile.
func (a *arrivals) busyComparing() error {
	if a.compare == nil || !a.compare.under.Load() {
		return nil
	}
	return fmt.Errorf("disk %q: the source goes on before what is here was compared", a.disk.name)
}

// HandleHashes compares blocks with what the source has. It asks for one that differs;
// then the source ends the connection.
func (a *arrivals) HandleHashes(hashes []wire.Hash) error {
	c := a.compare
	if c == nil || !c.under.Load() {
		return nil
	}
	if c.err != nil {
		return c.err
	}
	for i := range hashes {
		h := &hashes[i]
		b := int64(h.Block)
		if b >= a.disk.geo.blocks || !c.left.get(b) {
			continue // it was written here since it was claimed, and dropped
		}
		off, length := a.disk.geo.bytes(span{b, b + 1})
		equal, err := a.equal(off, length, h.Sum)
		if err != nil {
			return &localError{fmt.Errorf("disk %q: compare: %w", a.disk.name, err)}
		}
		if !equal {
			c.err = &unequalError{c.id, fmt.Errorf("disk %q: what is here differs at %d from what the source has now, as generation %d: it is another disk, or was written since; "+
				"nothing was changed: give the right source, or begin anew with --overwrite", a.disk.name, off, c.id.Generation)}
			a.disk.foundUnequal(c.err)
			a.refused(c.err)
			return a.from.NeedAt(off, length)
		}
		c.left.clear(b)
		c.n--
		a.disk.comparing.done.Add(length)
	}
	if c.n > 0 {
		return nil
	}
	return a.endComparison()
}

// foundUnequal remembers that the source's disk is another: it is not compared again.
func (d *destDisk) foundUnequal(err error) {
	var unequal *unequalError
	if errors.As(err, &unequal) {
		d.mu.Lock()
		d.unequal = unequal
		d.mu.Unlock()
	}
}

// equal reports whether the block is as the source has it. One that a client has written
// meanwhile is not compared.
func (a *arrivals) equal(off, length int64, sum [sha256.Size]byte) (bool, error) {
	b := a.compare.buf[:length]
	if _, err := a.Stream.ReadAt(b, off); err != nil {
		return false, err
	}
	return sha256.Sum256(b) == sum || !a.disk.dev.Unmodified(off), nil
}

// endComparison takes the source's generation over: all was equal.
func (a *arrivals) endComparison() error {
	c, d := a.compare, a.disk
	if err := a.renew(c.id); err != nil {
		return err
	}
	d.comparing.end()
	d.log.Info("compared: all that came is as the source has it: the migration goes on", "disk", d.name,
		"bytes", d.comparing.of.Load(), "took", time.Since(c.began).Round(time.Millisecond))
	c.under.Store(false)
	return nil
}

// renew takes the source's generation over, durably, and claims all that is here.
func (a *arrivals) renew(id Identity) error {
	d := a.disk
	err := d.withRoom(a.gone, func() error { return d.dev.Renew(id.UUID, id.Generation) })
	if err != nil {
		return &localError{fmt.Errorf("disk %q: keep the generation of the source: %w", d.name, err)}
	}
	d.mu.Lock()
	d.id = id
	d.mu.Unlock()
	a.claim()
	return nil
}
