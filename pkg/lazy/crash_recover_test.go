package lazy

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"sync"
	"syscall"
)

// failing has a sync of the process fail, as Linux has it fail, and perhaps all that
// come after it.
func (m *crashModel) failing(r *rand.Rand, p *process) {
	what, forEver := []string{"sync disk", "sync map"}[r.IntN(2)], r.IntN(2) == 0
	if what == "sync disk" && m.m.boot == nil {
		return // killed before it could mark the map: the next process cannot know of it
	}
	rf := rand.New(rand.NewPCG(r.Uint64(), 4))
	var mu sync.Mutex // guards left and rf
	left := r.IntN(12)
	p.hook = func(op string) error {
		if op[:4] != "sync" || p.isDead() {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		if left--; left > 0 || left < 0 && (!forEver || !m.failed.Load()) || left == 0 && op != what {
			return nil
		}
		if !m.failed.Swap(true) {
			m.count.failures++
		}
		if op == "sync disk" {
			m.m.disk.failSync(rf)
		} else {
			m.m.file.failSync(rf)
		}
		return syscall.EIO
	}
}

// recover starts the program again, and looks at what there is.
func (m *crashModel) recover(r *rand.Rand, lost bool, endAt int) (*process, bool) {
	p := newProcess(rand.New(rand.NewPCG(r.Uint64(), 3)), endAt)
	exact := m.intact && !lost && !m.failed.Load() && m.m.boot != nil
	settled := lost && !m.failed.Load()
	m.m.failed = m.failed.Swap(false)
	if m.m.failed && r.IntN(2) == 0 {
		m.m.disk.drop() // the kernel needs memory
		m.m.file.drop()
	}
	m.intact = false
	if endAt >= 0 && r.IntN(8) == 0 {
		m.failing(r, p)
	}
	logged := m.m.logged() > 0
	if logged {
		m.count.replays++
	}
	m.count.witnesses += m.m.samples()
	d, err := m.m.start(p, m.o)
	if err != nil {
		if logged {
			m.count.torn++
		}
		if !errors.Is(err, errDead) && !errors.Is(err, syscall.EIO) {
			m.t.Errorf("start: %v", err)
		}
		return p, false
	}
	m.d, m.p, m.intact = d, p, true
	if exact {
		m.count.kills++
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.asked = nil
	if m.wasLive && !d.isLive.Load() {
		m.t.Error("it was live, and is not any more")
	}
	disk := m.m.disk.bytes()
	now := bytes.Clone(m.src)
	_, sectors := sectorsOf(0, m.size)
	for s := range sectors {
		off, end := m.sector(s)
		block := off / m.bs
		here := d.state.isLocal(block)
		mine := d.state.partial.has(block, (off-block*m.bs)/sectorSize, (off-block*m.bs)/sectorSize+1)
		if here || mine {
			copy(now[off:end], disk[off:end])
		}
		if !d.isLive.Load() {
			if here && !m.stale[block] && !bytes.Equal(now[off:end], m.src[off:end]) {
				m.t.Errorf("in standby block %d is claimed, but sector %d is not the source's", block, s)
				return p, false
			}
			continue
		}
		from := m.sure[s]
		if exact {
			from = m.acked[s]
		}
		was, limbo := m.hist[s][from:], from <= m.limbo[s]
		since := m.hist[s][m.sure[s]:] // what may come back with the next power cut
		known := limbo && bytes.Equal(now[off:end], m.src[off:end])
		for _, b := range was {
			known = known || bytes.Equal(b, now[off:end])
		}
		if !known {
			m.t.Errorf("block %d (here: %t), sector %d (ours: %t) begins with %x, which it was not since the last flush, or before a kill (%t): want one of %d, the first %x; the source has %x",
				block, here, s, mine, now[off:off+1], exact, len(was), was[0][:1], m.src[off:off+1])
			return p, false
		}
		// What nobody was answered for is there, and that it was written here is not known.
		unanswered := exact && m.o.Revocable && !bytes.Equal(was[0], now[off:end])
		if !settled { // what it was may come back, as what we see need not be durable
			m.hist[s] = append(since, bytes.Clone(now[off:end]))
			m.acked[s], m.sure[s], m.limbo[s], m.busy[s] = len(m.hist[s])-1, 0, -1, false
			if exact && limbo || unanswered {
				m.limbo[s] = m.acked[s]
			}
		}
	}
	if settled && d.isLive.Load() {
		m.settle(now)
	}
	for s := range sectors {
		if exact {
			break
		}
		// A write that nobody flushed is there, and that it was written here is
		// forgotten: if the block is taken back, the source's comes in its place.
		off, end := m.sector(s)
		if b := off / m.bs; d.revocable && d.state.fetched.get(b) && !bytes.Equal(now[off:end], m.src[off:end]) {
			m.limbo[s] = m.acked[s]
		}
	}
	return p, true
}
