package soak

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/link"
)

const (
	// cutsOfARound is how often the link is cut in one migration.
	cutsOfARound = 200
	// Between two cuts pass at most so many bytes of those that go back, and so
	// many blocks of the data: fewer, and a migration could come no further.
	maxBack, maxBlocks = kib / 2, 4
	// quiet is how long the link may carry nothing before it is cut all the same.
	quiet = 3 * time.Second
	// stallTime is how long a silent network may go unnoticed: 15 s, and as much
	// again for a machine that is busy. maxDelay is how long bytes are held up
	// without being lost.
	stallTime = 30 * time.Second
	lookEvery = 50 * time.Millisecond
	maxDelay  = 300 * time.Millisecond
	// Of this many bytes, in the mean, one has a bit changed: of the data, and of
	// what goes back.
	damageEvery, damageBackEvery = 2 * mib, 128 * kib
)

// cutRound is a migration whose link is cut again and again, at any byte.
func cutRound(ctx context.Context, m *migration) error {
	m.link.SetRate(max(mib/2, 24*m.block))
	if err := m.begin(ctx); err != nil {
		return err
	}
	data, back := m.ways()
	m.link.CorruptEvery(data, damageEvery)
	m.link.CorruptEvery(back, damageBackEvery)
	stallAt := m.r.IntN(2 * cutsOfARound) // or never
	for cuts := 0; cuts < cutsOfARound; {
		if err := m.alive(); err != nil {
			return err
		}
		if m.sourceDone {
			break // the clients have asked for more than was planned
		}
		back := m.hardlyMet < 2 && m.r.IntN(3) == 0
		var cut bool
		var err error
		switch {
		case cuts == stallAt:
			stallAt = -1
			err = m.stall(ctx, back)
		case m.r.IntN(40) == 0:
			err = m.delay(ctx, back)
		default:
			cut, err = m.cut(ctx, back)
		}
		if err != nil {
			return err
		}
		if cut {
			cuts++
			m.sum.Cuts.Add(1)
		}
	}
	m.link.CorruptEvery(link.ToTarget, 0)
	m.link.CorruptEvery(link.FromTarget, 0)
	to, from := m.link.Corrupted()
	m.sum.Corruptions.Add(to + from)
	m.link.SetRate(0)
	if err := m.complete(ctx); err != nil {
		return err
	}
	return m.finish(ctx)
}

// at lets something happen after a random number of bytes of the data, or of those
// that go back, and waits until it has. It says false if nothing came by for long.
func (m *migration) at(ctx context.Context, back bool, happen func()) (bool, error) {
	happened := make(chan struct{})
	var once atomic.Bool
	do := func() {
		if once.CompareAndSwap(false, true) {
			happen()
			close(happened)
		}
	}
	way, other := m.ways()
	limit := maxBlocks * m.block
	if back {
		way, limit = other, maxBack
	}
	after := logUniform(m.r, limit) // often when they have hardly met
	if m.hardlyMet++; m.hardlyMet > 2 {
		// Something has to move now and then, or they wait longer and longer.
		after, m.hardlyMet = limit/3+m.r.Int64N(limit), 0
	}
	m.link.After(way, after, do)
	t := time.NewTimer(quiet)
	defer t.Stop()
	select {
	case <-happened:
		return true, nil
	case <-t.C:
		return !once.CompareAndSwap(false, true), nil
	case <-m.source.ended:
		once.Store(true)
		return false, nil
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
}

// cut cuts the link.
func (m *migration) cut(ctx context.Context, back bool) (bool, error) {
	done, err := m.at(ctx, back, m.link.Cut)
	if err != nil || done {
		return done, err
	}
	if m.link.Connections() == 0 {
		return false, nil // they are just connecting again
	}
	m.link.Cut()
	return true, nil
}

// delay holds up bytes.
func (m *migration) delay(ctx context.Context, back bool) error {
	d := between(m.r, 0, maxDelay)
	done, err := m.at(ctx, back, func() { time.Sleep(d) })
	if done {
		m.sum.Delays.Add(1)
	}
	return err
}

// ways are the directions of the data and of what goes back.
func (m *migration) ways() (data, back link.Direction) {
	if m.destListens {
		return link.ToTarget, link.FromTarget
	}
	return link.FromTarget, link.ToTarget
}

// stall makes the network silent, without closing anything, until the side that
// connects has noticed, and tries again.
func (m *migration) stall(ctx context.Context, back bool) error {
	done, err := m.at(ctx, back, func() { m.link.Stall(true) })
	if err != nil || !done {
		return err
	}
	defer m.link.Stall(false)
	m.sum.Stalls.Add(1)
	// Looks are counted rather than time: a process that gets no processor does
	// not look either.
	for looks, before := 0, m.link.Connections(); m.link.Connections() <= before; looks++ {
		if looks > int(stallTime/lookEvery) {
			return fmt.Errorf("the network was silent for %v, and nobody has noticed", stallTime)
		}
		if err := sleep(ctx, lookEvery); err != nil {
			return err
		}
	}
	return nil
}

// logUniform is a number up to limit: as often below its root as above.
func logUniform(r *rand.Rand, limit int64) int64 {
	return int64(math.Exp(r.Float64() * math.Log(float64(limit))))
}
