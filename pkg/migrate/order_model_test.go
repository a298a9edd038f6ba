package migrate

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// orderModel is an order, and what must become of its blocks.
type orderModel struct {
	t      *testing.T
	o      *order
	rnd    *rand.Rand
	now    time.Time
	step   int
	flying []modelFlight
	// By block:
	arrived, dropped map[int64]bool
	wanted           map[int64]int // since which step somebody waits for it
}

type modelFlight struct {
	span
	step int // in which it was sent
}

// consistent says that each block is in one state, and that they are counted.
func (m *orderModel) consistent() {
	o, delayed := m.o, map[int64]bool{}
	for _, d := range o.delayed {
		require.False(m.t, delayed[d.block], "block %d is delayed twice", d.block)
		delayed[d.block] = true
	}
	var pending, flying int64
	for b := range o.geo.blocks {
		states := 0
		for _, is := range []bool{o.pending.get(b), o.flying.get(b), delayed[b]} {
			if is {
				states++
			}
		}
		require.LessOrEqual(m.t, states, 1, "block %d", b)
		if _, failed := o.attempts[b]; failed {
			require.Equal(m.t, 1, states, "block %d is settled, and has failed", b)
		}
		if _, ok := o.unneeded[b]; ok {
			require.True(m.t, o.flying.get(b), "block %d", b)
		}
		if o.pending.get(b) {
			pending++
		}
		if o.flying.get(b) {
			flying++
		}
	}
	require.Equal(m.t, pending, o.left)
	require.Equal(m.t, flying, o.out)
}

func (m *orderModel) each(s span, f func(b int64)) {
	for b := s.from; b < s.to; b++ {
		f(b)
	}
}

func (m *orderModel) ask(s span) {
	off, length := m.o.geo.bytes(s)
	m.o.ask(off, length)
}

// refused is what the destination does whose disk has not taken a block: who
// waited for it then asks again. Who began to wait later does not know.
func (m *orderModel) refused(f modelFlight) {
	m.each(f.span, func(b int64) {
		if since, ok := m.wanted[b]; ok && since < f.step {
			m.ask(span{b, b + 1})
		}
	})
}

func (m *orderModel) done(s span) {
	m.each(s, func(b int64) { m.arrived[b] = true; delete(m.wanted, b) })
	m.o.done(s)
}

func (m *orderModel) land(f modelFlight) {
	switch m.rnd.IntN(6) {
	case 0:
		m.o.noRoom(f.span, m.now)
		m.refused(f)
	case 1:
		m.each(f.span, func(b int64) {
			if !m.o.asked.get(b) { // it was only a hint, and goes with the background now
				delete(m.wanted, b)
			}
		})
		m.o.again(f.span)
	case 2:
		m.o.failed(f.span, m.now)
		m.refused(f)
	default:
		m.done(f.span)
	}
}

// happen lets something happen.
func (m *orderModel) happen() {
	blocks := m.o.geo.blocks
	from := m.rnd.Int64N(blocks)
	switch k := m.rnd.IntN(17); {
	case k == 16:
		off, length := m.o.geo.bytes(span{from, min(blocks, from+1+m.rnd.Int64N(4))})
		m.o.goFirst([]Range{{off, length}, {m.rnd.Int64N(2 * m.o.geo.size), 4096}})
	case k < 2:
		s := span{from, min(blocks, from+1+m.rnd.Int64N(4))}
		m.each(s, func(b int64) {
			if _, ok := m.wanted[b]; !ok && !m.arrived[b] && !m.dropped[b] {
				m.wanted[b] = m.step
			}
		})
		m.ask(s)
	case k == 2:
		m.dropped[from] = true
		delete(m.wanted, from)
		off, length := m.o.geo.bytes(span{from, from + 1})
		m.o.drop(off, length)
	case k < 5:
		m.now = m.now.Add(time.Duration(m.rnd.IntN(3000)) * time.Millisecond)
		m.o.release(m.now)
	case k < 10:
		if s, _, ok := m.o.takeNext(1 + m.rnd.Int64N(5)); ok {
			m.flying = append(m.flying, modelFlight{s, m.step})
		}
	case len(m.flying) > 0:
		i := m.rnd.IntN(len(m.flying))
		f := m.flying[i]
		m.flying = append(m.flying[:i], m.flying[i+1:]...)
		m.land(f)
	}
}

// finish sends what is left, or while the background is paused what somebody
// waits for. Nothing goes wrong any more.
func (m *orderModel) finish(paused bool) {
	for range 10 * m.o.geo.blocks {
		m.now = m.now.Add(10 * time.Second)
		m.o.release(m.now)
		s, ok := m.o.nextUrgent(4)
		if from, hint, is := m.o.peekBulk(); !ok && is && (hint || !paused) {
			s, ok = m.o.takeBulk(from, 4)
		}
		if ok {
			m.done(s)
		}
	}
}

// Whatever happens to a block, it is sent until it arrives or is not needed, and
// nobody waits for one behind a paused background.
func TestOrderLosesNoBlockAndNobodyWhoWaits(t *testing.T) {
	for seed := range uint64(30) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			m := &orderModel{
				t: t, o: testOrder(t, 40), rnd: rand.New(rand.NewPCG(seed, 3)), now: time.Unix(1000, 0),
				arrived: map[int64]bool{}, dropped: map[int64]bool{}, wanted: map[int64]int{},
			}
			for m.step = range 200 {
				m.happen()
				m.consistent()
			}
			for _, f := range m.flying {
				m.done(f.span)
			}
			m.finish(true)
			require.Empty(t, m.wanted, "somebody waits for ever")
			m.finish(false)
			require.True(t, m.o.settled())
			require.Empty(t, m.o.attempts)
			for b := range m.o.geo.blocks {
				require.True(t, m.arrived[b] || m.dropped[b], "block %d", b)
			}
		})
	}
}
