package lazy

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

var flagRounds = flag.Int("lazy.rounds", 1500, "disks of the crash test, each with several lives")

// crashModel is what must be on a disk and what may be: of each sector all
// contents it had since the last flush that covers it.
type crashModel struct {
	t    *testing.T
	id   Identity
	o    Options
	m    *machine
	size int64
	bs   int64
	calm bool // small writes mostly, as a database makes them

	count *crashCount

	d      *Device // of the life that goes on
	p      *process
	intact bool        // all that was answered is there: nothing happened since but kills
	failed atomic.Bool // a sync has failed in this life

	mu sync.Mutex
	// Guarded by mu:
	src     []byte
	hist    [][][]byte // of each sector: what it was, the newest last
	acked   []int      // of each sector: the newest that was answered
	sure    []int      // of each sector: the newest that is durable
	limbo   []int      // of each sector: up to this one the source's may come back; -1: none
	busy    []bool     // a write of the sector is going on
	asked   []int64    // blocks
	stale   []bool     // of each block: it changed, and no dirty list has said so
	handed  bool       // GoLive was called: the source changes nothing any more
	wasLive bool       // GoLive has returned
}

// crashCount is what the disks of a test went through.
type crashCount struct {
	replays, torn int // starts that found something in the log, and those that died of it
	kills         int // starts after which all that was answered had to be there
	failures      int // lives in which a sync failed
	witnesses     int // samples that a start has looked at
}

func (m *crashModel) NeedAt(off, length int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for ; length > 0; off, length = off+m.bs, length-m.bs {
		m.asked = append(m.asked, off/m.bs)
	}
}

func (m *crashModel) DontNeedAt(_, _ int64) {}

func (m *crashModel) sector(s int64) (off, end int64) {
	return s * sectorSize, min((s+1)*sectorSize, m.size)
}

func newCrashModel(t *testing.T, r *rand.Rand) *crashModel {
	m := &crashModel{t: t, bs: []int64{512, 512, 1024, 2048, 4096, 4096, 8192, 8192, 64 << 10}[r.IntN(9)]}
	m.size = m.bs*(1+r.Int64N(min(24, 1+40<<10/m.bs))) - r.Int64N(m.bs)
	m.id = Identity{Size: m.size, BlockSize: m.bs, Device: UUID{1}, Source: UUID{2}, Generation: 3}
	m.o = Options{Standby: r.IntN(2) == 0, KnownZero: r.IntN(2) == 0, Log: slog.New(slog.DiscardHandler)}
	m.o.Revocable = !m.o.Standby && r.IntN(2) == 0
	m.m = newMachine(m.id, []int64{0, minLog, minLog, 32 << 10, 64 << 10}[r.IntN(5)])
	m.m.mark = newCrashFile(int64(len(Mark{})), len(Mark{}))
	if r.IntN(3) > 0 {
		m.m.boot = new(bootMemory)
	}
	m.calm = r.IntN(3) > 0
	m.src = make([]byte, m.size)
	blocks := blocksOf(m.size, m.bs)
	for b := range blocks {
		if r.IntN(3) > 0 {
			fillRandom(r, m.src[b*m.bs:min((b+1)*m.bs, m.size)])
		}
	}
	if !m.o.KnownZero {
		fillRandom(r, m.m.disk.now)
		copy(m.m.disk.durable, m.m.disk.now)
	}
	_, sectors := sectorsOf(0, m.size)
	m.hist = make([][][]byte, sectors)
	m.acked, m.sure, m.limbo, m.busy = make([]int, sectors), make([]int, sectors), make([]int, sectors), make([]bool, sectors)
	m.stale = make([]bool, blocks)
	m.settle(m.src)
	return m
}

// settle makes now all that the sectors were ever.
func (m *crashModel) settle(now []byte) {
	for s := range m.hist {
		off, end := m.sector(int64(s))
		m.hist[s] = append(m.hist[s][:0], bytes.Clone(now[off:end]))
		m.acked[s], m.sure[s], m.limbo[s], m.busy[s] = 0, 0, -1, false
	}
}

// write changes [off, end) through do, unless somebody else does.
func (m *crashModel) write(off, end int64, p []byte, do func() error) {
	lo, hi := sectorsOf(off, end)
	m.mu.Lock()
	for s := lo; s < hi; s++ {
		if m.busy[s] {
			m.mu.Unlock()
			return
		}
	}
	for s := lo; s < hi; s++ {
		m.busy[s] = true
		from, to := m.sector(s)
		b := bytes.Clone(m.hist[s][len(m.hist[s])-1])
		if p == nil {
			clear(b[max(from, off)-from : min(to, end)-from])
		} else {
			copy(b[max(from, off)-from:], p[max(from, off)-off:])
		}
		m.hist[s] = append(m.hist[s], b)
	}
	m.mu.Unlock()
	err := do()
	if err == nil && m.p.isDead() {
		err = errDead // nobody got the answer
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for s := lo; s < hi; s++ {
		if err == nil {
			m.acked[s] = len(m.hist[s]) - 1
			m.busy[s] = false
		} // else it stays busy: nobody knows what is there
	}
	if err != nil && !errors.Is(err, errDead) && !errors.Is(err, ErrClosed) && !errors.Is(err, syscall.EIO) {
		m.t.Errorf("write %d+%d: %v", off, end-off, err)
	}
}

// flush flushes, and believes it.
func (m *crashModel) flush(do func() error) {
	m.mu.Lock()
	acked := append([]int(nil), m.acked...)
	m.mu.Unlock()
	if do() != nil || m.p.isDead() {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for s := range acked {
		m.sure[s] = max(m.sure[s], acked[s])
	}
}

func (m *crashModel) client(r *rand.Rand, d *Device) {
	var off, end int64
	switch r.IntN(4) {
	case 0:
		off = r.Int64N(m.size) / m.bs * m.bs
		end = off + m.bs*(1+r.Int64N(3))
	case 1, 2:
		off = r.Int64N(m.size) / sectorSize * sectorSize
		end = off + sectorSize*(1+r.Int64N(max(1, m.bs/sectorSize)))
	default:
		off = r.Int64N(m.size)
		end = off + 1 + r.Int64N(m.bs)
	}
	if m.calm {
		off = off / sectorSize * sectorSize
		end = off + sectorSize*(1+r.Int64N(4))
	}
	if m.o.Revocable { // else what a sector would be that is in limbo is hard to say
		off = off / sectorSize * sectorSize
		end = (end + sectorSize - 1) / sectorSize * sectorSize
	}
	end = min(end, m.size)
	ctx := context.Background()
	k := r.IntN(20)
	if m.calm && k >= 11 && k < 15 && r.IntN(8) > 0 {
		k = 0
	}
	switch {
	case k < 11:
		p := make([]byte, end-off)
		fillRandom(r, p)
		m.write(off, end, p, func() error { _, err := d.WriteAt(p, off); return err })
		if k < 3 { // FUA
			m.flush(d.Sync)
		}
	case k < 13:
		m.write(off, end, nil, func() error { return d.ZeroAtContext(ctx, off, end-off, k == 11) })
	case k < 15:
		off = (off + sectorSize - 1) / sectorSize * sectorSize
		if end != m.size {
			end = end / sectorSize * sectorSize
		}
		if off < end {
			m.write(off, end, nil, func() error { return d.TrimAtContext(ctx, off, end-off) })
		}
	default:
		m.flush(d.Sync)
	}
}

func (m *crashModel) send(r *rand.Rand, s *Stream, lo, hi int64) error {
	off, end := lo*m.bs, min(hi*m.bs, m.size)
	m.mu.Lock()
	p := bytes.Clone(m.src[off:end])
	m.mu.Unlock()
	if bytes.Equal(p, zeroes[:min(len(p), len(zeroes))]) && r.IntN(4) > 0 {
		return s.ZeroAt(off, end-off, true)
	}
	_, err := s.WriteAt(p, off)
	return err
}

// source sends, and changes what it has as long as that is its right.
func (m *crashModel) source(r *rand.Rand, d *Device, s *Stream) {
	blocks := int64(len(m.stale))
	lo := r.Int64N(blocks)
	hi := min(lo+1+r.Int64N(3), blocks)
	switch k := r.IntN(20); {
	case k < 6:
		m.mu.Lock()
		if n := len(m.asked); n > 0 {
			lo, m.asked = m.asked[n-1], m.asked[:n-1]
			hi = lo + 1
		}
		m.mu.Unlock()
		fallthrough
	case k < 13:
		_ = m.send(r, s, lo, hi) // an error is the end of this life
	case k < 16:
		if !d.isLive.Load() {
			m.mu.Lock()
			for b := lo; b < hi && !m.handed; b++ {
				m.stale[b] = true
				fillRandom(r, m.src[b*m.bs:min((b+1)*m.bs, m.size)])
			}
			m.mu.Unlock()
		}
		if d.isLive.Load() && m.o.Revocable {
			_ = s.DirtyList([]uint32{uint32(lo)}) // an error is the end of this life
		} else if !d.isLive.Load() {
			m.dirty(s)
		}
	case k < 17 && r.IntN(2) == 0:
		_ = d.renewWitness(context.Background(), true) // an error is the end of this life
	case k < 17:
		_ = s.Flush() // an error is the end of this life
	case k < 18 && !d.isLive.Load() && r.IntN(4) == 0:
		m.goLive(d, s)
	default:
		runtime.Gosched()
	}
}

// dirty tells of all that has changed, and says whether that was taken.
func (m *crashModel) dirty(s *Stream) bool {
	var list []uint32
	m.mu.Lock()
	for b, stale := range m.stale {
		if stale {
			list = append(list, uint32(b))
		}
	}
	m.mu.Unlock()
	if s.DirtyList(list) != nil {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.stale)
	return true
}

// goLive hands over: all that changed is known there.
func (m *crashModel) goLive(d *Device, s *Stream) {
	if !m.dirty(s) {
		return
	}
	m.mu.Lock()
	m.handed = true
	m.settle(m.src) // no client is in yet
	m.mu.Unlock()
	if d.GoLive() == nil {
		m.mu.Lock()
		m.wasLive = true
		m.mu.Unlock()
	}
}

// live is one life: until it dies, or n operations of each client are done.
func (m *crashModel) live(r *rand.Rand, p *process, n int) {
	s := m.d.Attach(m)
	var clients, rest sync.WaitGroup
	stop := make(chan struct{})
	for range 2 {
		rc := rand.New(rand.NewPCG(r.Uint64(), 1))
		clients.Go(func() {
			select {
			case <-m.d.Live():
			case <-stop:
				return
			}
			for range n {
				m.client(rc, m.d)
			}
		})
	}
	rs := rand.New(rand.NewPCG(r.Uint64(), 2))
	rest.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			if i > 3*n {
				if m.failed.Load() {
					p.kill() // it would never go live
				}
				if !m.d.isLive.Load() {
					m.goLive(m.d, s)
				}
				runtime.Gosched()
			}
			m.source(rs, m.d, s)
		}
	})
	done := make(chan struct{})
	rest.Go(func() { clients.Wait(); close(done) })
	select {
	case <-p.died:
		_ = m.d.Close() // wakes who waits; nothing can be saved any more
	case <-done:
	}
	close(stop)
	clients.Wait()
	rest.Wait()
	if r.IntN(2) == 0 && !p.isDead() {
		m.flush(m.d.Close)
	}
	p.kill()
	_ = m.d.Close() // it is dead
}

// finish completes the migration, cuts the power, and looks at the plain disk.
func (m *crashModel) finish(r *rand.Rand) {
	s := m.d.Attach(m)
	if !m.d.isLive.Load() {
		m.goLive(m.d, s)
	}
	for i := range 10 {
		if i == 5 {
			m.flush(m.d.Sync)
		}
		off := r.Int64N(m.size) / m.bs * m.bs
		p := make([]byte, min(m.bs, m.size-off))
		fillRandom(r, p)
		m.write(off, off+int64(len(p)), p, func() error { _, err := m.d.WriteAt(p, off); return err })
	}
	m.d.EachMissing(func(off, length int64) bool {
		if err := m.send(r, s, off/m.bs, blocksOf(off+length, m.bs)); err != nil {
			m.t.Errorf("send: %v", err)
		}
		return true
	})
	m.flush(m.d.Complete)
	m.m.losePower(r)
	if st := m.d.Stats(); !st.Complete {
		m.t.Errorf("not complete: %+v", st)
		return
	}
	disk := m.m.disk.bytes()
	for i, h := range m.hist {
		off, end := m.sector(int64(i))
		if !bytes.Equal(disk[off:end], h[len(h)-1]) {
			m.t.Errorf("complete, but sector %d is not what it should be", i)
			return
		}
	}
	d, err := m.m.start(newProcess(r, -1), m.o)
	if err != nil || !d.Stats().Complete || len(m.m.file.now) != headerSize {
		m.t.Errorf("complete, and then: %v, a map of %d bytes", err, len(m.m.file.now))
	}
	if err == nil {
		_ = d.Close() // looked at
	}
}

// D1, D2, D3, D12, D13, M13: whatever the disk and the map keep of what was not
// synced, at whatever moment the power goes or the process is killed, and however
// often: every flushed write is there, what is said to be here is the flushed or
// a later value, and when the rest was fetched again the disk is right. After a kill
// nothing is undone that was answered, if there is memory that outlives it. A sync may
// fail, once or from then on. (traps I9, I10; faults F2, F3)
func TestD3PowerCutAtAnyPoint(t *testing.T) {
	rounds := *flagRounds
	if testing.Short() {
		rounds = min(rounds, 200)
	}
	begin, lives, complete := time.Now(), 0, 0
	var records, marks int64
	var count crashCount
	n := 0
	for ; n < rounds && !(t.Failed() || *flagRounds == 1500 && time.Since(begin) > 40*time.Second); n++ {
		seed := *flagSeed + uint64(n)
		r := rand.New(rand.NewPCG(seed, 11))
		m := newCrashModel(t, r)
		m.count = &count
		lost := true
		for life := range 2 + r.IntN(4) {
			lives++
			endAt := r.IntN(160)
			if life == 0 {
				endAt += 16 // else it never begins
			}
			p, ok := m.recover(r, lost, endAt)
			if ok {
				m.live(r, p, 5+r.IntN(40))
			}
			if t.Failed() {
				break
			}
			if lost = r.IntN(2) > 0; lost {
				m.m.losePower(r)
			}
			m.o.KnownZero = m.o.KnownZero && r.IntN(2) == 0 // what it was told when it began may be told again
		}
		if t.Failed() {
			t.Fatalf("round with -lazy.seed=%d: %d bytes in blocks of %d, %+v", seed, m.size, m.bs, m.o)
		}
		p, ok := m.recover(r, lost, -1)
		if ok {
			complete++
			m.finish(r)
		}
		p.kill()
		_ = m.d.Close() // it is dead
		if t.Failed() {
			t.Fatalf("end of the round with -lazy.seed=%d: %d bytes in blocks of %d, %+v", seed, m.size, m.bs, m.o)
		}
		records, marks = records+m.m.seen.records.Load(), marks+m.m.seen.marks.Load()
	}
	t.Logf("%d disks, %d lives, %d complete, in %v; %d records, %d ends of an epoch, %d starts with a log, %d of which died of it; %d exact after a kill, %d syncs failed; %d samples",
		n, lives, complete, time.Since(begin).Round(time.Millisecond), records, marks, count.replays, count.torn, count.kills, count.failures, count.witnesses)
	if n >= 200 && count.witnesses < 3*n {
		t.Error("the witness is hardly used")
	}
	if n >= 200 && (records < 5*int64(n) || marks < 3*int64(n) || count.replays < n/3 || count.torn < n/20) {
		t.Error("the log is hardly used")
	}
	if n >= 200 && (count.kills < n/5 || count.failures < n/10) {
		t.Error("hardly a kill, or a sync that fails")
	}
}
