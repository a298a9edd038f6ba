package lazy

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var (
	flagOps  = flag.Int64("lazy.ops", 1_000_000, "operations of the model test")
	flagSeed = flag.Uint64("lazy.seed", 1, "where the model test begins")
)

// model is what the device should hold, and what the source does. A sector that
// is being changed is busy; a read is held against the model wherever its sectors
// were not touched while it ran.
type model struct {
	t    *testing.T
	d    *Device
	disk *memDisk
	bs   int64
	size int64

	ops    *atomic.Int64 // of all rounds
	limit  int64
	stream atomic.Pointer[Stream]

	attaching sync.Mutex  // held while stream is replaced
	over      atomic.Bool // the clients have ended

	mu sync.Mutex
	// Guarded by mu:
	cur      []byte   // what a client must read
	src      []byte   // what the source holds
	seq      []uint64 // per sector: counts changes; odd while one is going on
	mine     []bool   // per sector: written here, so the source's is of no interest
	inFlight []int    // per block: packets of it that are on their way; -1 while it is invalidated
	asked    []int64  // blocks the device asked for
}

// NeedAt and DontNeedAt make the model a Source.
func (m *model) NeedAt(off, length int64) {
	if off < 0 || length <= 0 || off+length > m.size || off%m.bs != 0 {
		m.t.Errorf("asked for %d+%d", off, length)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for ; length > 0; off, length = off+m.bs, length-m.bs {
		m.asked = append(m.asked, off/m.bs)
	}
}

func (m *model) DontNeedAt(off, length int64) {
	if off < 0 || length <= 0 || off+length > m.size || off%m.bs != 0 {
		m.t.Errorf("told not to send %d+%d", off, length)
	}
}

func sectorsOf(off, end int64) (lo, hi int64) {
	return off / sectorSize, (end + sectorSize - 1) / sectorSize
}

// begin makes the sectors of [off, end) busy, unless one is.
func (m *model) begin(off, end int64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	lo, hi := sectorsOf(off, end)
	for s := lo; s < hi; s++ {
		if m.seq[s]&1 != 0 {
			return false
		}
	}
	for s := lo; s < hi; s++ {
		m.seq[s]++
	}
	return true
}

// end applies the change. What is written is ours from here on; a sector that is
// only partly written here as well.
func (m *model) end(off, end int64, apply func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	apply()
	lo, hi := sectorsOf(off, end)
	for s := lo; s < hi; s++ {
		m.seq[s]++
		m.mine[s] = true
	}
}

// pick chooses a range: whole blocks, whole sectors, or any bytes.
func (m *model) pick(r *rand.Rand) (off, end int64) {
	switch r.IntN(4) {
	case 0:
		off = r.Int64N(m.size) / m.bs * m.bs
		end = off + m.bs*(1+r.Int64N(3))
	case 1, 2:
		off = r.Int64N(m.size) / sectorSize * sectorSize
		end = off + sectorSize*(1+r.Int64N(2*m.bs/sectorSize))
	default:
		off = r.Int64N(m.size)
		end = off + 1 + r.Int64N(2*m.bs)
	}
	return off, min(end, m.size)
}

// client does one operation of a client.
func (m *model) client(r *rand.Rand) {
	off, end := m.pick(r)
	ctx := context.Background()
	switch k := r.IntN(100); {
	case k < 45:
		m.read(ctx, r, off, end)
	case k < 80:
		if !m.begin(off, end) {
			return
		}
		p := make([]byte, end-off)
		fillRandom(r, p)
		if _, err := m.d.WriteAtContext(ctx, p, off); err != nil {
			m.t.Errorf("write %d+%d: %v", off, end-off, err)
		}
		m.end(off, end, func() { copy(m.cur[off:], p) })
	case k < 86:
		if !m.begin(off, end) {
			return
		}
		if err := m.d.ZeroAtContext(ctx, off, end-off, r.IntN(2) == 0); err != nil {
			m.t.Errorf("zero %d+%d: %v", off, end-off, err)
		}
		m.end(off, end, func() { clear(m.cur[off:end]) })
	case k < 92:
		first := (off + sectorSize - 1) / sectorSize * sectorSize
		last := end
		if end != m.size {
			last = end / sectorSize * sectorSize
		}
		if first >= last {
			if err := m.d.TrimAtContext(ctx, off, end-off); err != nil {
				m.t.Errorf("trim %d+%d: %v", off, end-off, err)
			}
			return
		}
		if !m.begin(first, last) {
			return
		}
		if err := m.d.TrimAtContext(ctx, off, end-off); err != nil {
			m.t.Errorf("trim %d+%d: %v", off, end-off, err)
		}
		m.end(first, last, func() { clear(m.cur[first:last]) })
	case k < 94:
		if err := m.d.Sync(); err != nil {
			m.t.Errorf("sync: %v", err)
		}
	case k < 96:
		if err := m.d.Prefetch(off, end-off); err != nil {
			m.t.Errorf("prefetch: %v", err)
		}
	case k < 97:
		gone, cancel := context.WithCancel(ctx)
		cancel()
		m.read(gone, r, off, end)
	default:
		m.status(r, off, end)
	}
}

func fillRandom(r *rand.Rand, p []byte) {
	var word [8]byte
	binary.LittleEndian.PutUint64(word[:], r.Uint64()|1)
	for n := copy(p, word[:]); n < len(p); n *= 2 { // byte by byte is slow under -race
		copy(p[n:], p[:n])
	}
}

func (m *model) read(ctx context.Context, r *rand.Rand, off, end int64) {
	lo, hi := sectorsOf(off, end)
	p := make([]byte, end-off)
	m.mu.Lock()
	before := append([]uint64(nil), m.seq[lo:hi]...)
	m.mu.Unlock()
	if _, err := m.d.ReadAtContext(ctx, p, off); err != nil {
		if ctx.Err() == nil || !errors.Is(err, context.Canceled) {
			m.t.Errorf("read %d+%d: %v", off, end-off, err)
		}
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for s := lo; s < hi; s++ {
		if before[s-lo]&1 != 0 || m.seq[s] != before[s-lo] {
			continue // changed meanwhile
		}
		from, to := max(off, s*sectorSize), min(end, (s+1)*sectorSize)
		if i := mismatch(p[from-off:to-off], m.cur[from:to]); i >= 0 {
			at := from + int64(i)
			m.t.Errorf("byte %d (block %d, sector %d, written here: %t) is %#x, want %#x, the source has %#x",
				at, at/m.bs, s, m.mine[s], p[at-off], m.cur[at], m.src[at])
			return
		}
	}
}

func (m *model) status(r *rand.Rand, off, end int64) {
	name := m.d.MetaContexts()[r.IntN(2)]
	var sum int64
	last := uint32(99)
	err := m.d.BlockStatus(context.Background(), name, off, end-off, func(length int64, flags uint32) bool {
		if length <= 0 || flags == last {
			m.t.Errorf("status of %d+%d: a run of %d bytes with flags %d after %d", off, end-off, length, flags, last)
		}
		sum, last = sum+length, flags
		return true
	})
	if err != nil || sum != end-off {
		m.t.Errorf("status of %d+%d: covers %d, %v", off, end-off, sum, err)
	}
	if st := m.d.Stats(); st.Missing < 0 || st.Fetched+st.Written > st.Blocks {
		m.t.Errorf("stats: %+v", st)
	}
}

// send puts [off, end) of the source on its way.
func (m *model) send(r *rand.Rand, off, end int64) {
	p := make([]byte, end-off)
	lo, hi := off/m.bs, blocksOf(end, m.bs)
	m.mu.Lock()
	for b := lo; b < hi; b++ {
		if m.inFlight[b] < 0 { // not before the list is answered
			m.asked = append(m.asked, lo)
			m.mu.Unlock()
			return
		}
	}
	copy(p, m.src[off:end])
	for b := lo; b < hi; b++ {
		m.inFlight[b]++
	}
	m.mu.Unlock()
	zero := bytes.Equal(p, zeroes[:len(p)])
	var err error
	if s := m.stream.Load(); zero && r.IntN(4) > 0 {
		err = s.ZeroAt(off, end-off, r.IntN(2) == 0)
	} else {
		_, err = s.WriteAt(p, off)
	}
	if err != nil && !errors.Is(err, ErrDetached) {
		m.t.Errorf("stream %d+%d: %v", off, end-off, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for b := lo; b < hi; b++ {
		m.inFlight[b]--
	}
}

// source does one operation of the source.
func (m *model) source(r *rand.Rand) {
	switch k := r.IntN(100); {
	case k < 25: // what was asked for
		m.mu.Lock()
		block := int64(-1)
		if n := len(m.asked); n > 0 {
			block = m.asked[n-1]
			m.asked = m.asked[:n-1]
		}
		m.mu.Unlock()
		if block >= 0 {
			m.send(r, block*m.bs, min((block+1)*m.bs, m.size))
		}
	case k < 75: // one block, or a run, or one that is not aligned
		off, end := m.pick(r)
		if r.IntN(3) > 0 {
			off, end = off/m.bs*m.bs, min(blocksOf(end, m.bs)*m.bs, m.size)
		}
		m.send(r, off, end)
	case k < 95:
		m.dirty(r)
	case k < 97:
		m.reattach()
	case k < 98:
		_ = m.stream.Load().Close() // always nil
		m.reattach()
	default:
		runtime.Gosched()
	}
}

// dirty changes blocks at the source and says so, as a source does it: only when
// no packet of the block is on its way.
func (m *model) dirty(r *rand.Rand) {
	lo := r.Int64N(int64(len(m.inFlight)))
	hi := min(lo+1+r.Int64N(3), int64(len(m.inFlight)))
	if m.d.isLive.Load() && !m.d.revocable {
		if err := m.stream.Load().DirtyList([]uint32{uint32(lo)}); err == nil {
			m.t.Error("a live device took a dirty list")
		}
		return
	}
	off, end := lo*m.bs, min(hi*m.bs, m.size)
	m.mu.Lock()
	for b := lo; b < hi; b++ {
		if m.inFlight[b] != 0 {
			m.mu.Unlock()
			return
		}
	}
	first, last := sectorsOf(off, end)
	for s := first; s < last; s++ {
		if m.seq[s]&1 != 0 {
			m.mu.Unlock()
			return
		}
	}
	for s := first; s < last; s++ {
		m.seq[s]++
	}
	var list []uint32
	for b := lo; b < hi; b++ {
		m.inFlight[b] = -1
		list = append(list, uint32(b))
	}
	m.mu.Unlock()
	r.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })

	// The new contents are in no packet before the list is answered.
	change := make([]byte, end-off)
	if r.IntN(3) > 0 {
		fillRandom(r, change)
	}
	s := m.stream.Load()
	err := s.DirtyList(list)
	for errors.Is(err, ErrDetached) { // a session that ended: the next one says it
		s = m.stream.Load()
		err = s.DirtyList(list)
		runtime.Gosched()
	}
	tooLate := errors.Is(err, ErrLive) // between our look and the call
	if err != nil && !tooLate {
		m.t.Errorf("dirty list %v: %v", list, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for b := lo; b < hi; b++ {
		m.inFlight[b] = 0
	}
	for s := first; s < last; s++ {
		m.seq[s]++
		from, to := s*sectorSize, min((s+1)*sectorSize, m.size)
		if tooLate {
			continue
		}
		copy(m.src[from:to], change[from-off:])
		if !m.mine[s] {
			copy(m.cur[from:to], change[from-off:])
		}
	}
}

// newModel begins a round: a device of a size, a block size and modes by chance.
func newModel(t *testing.T, r *rand.Rand, ops *atomic.Int64, limit int64) *model {
	m := &model{t: t, ops: ops, limit: limit, bs: []int64{512, 1024, 2048, 4096}[r.IntN(4)]}
	m.size = m.bs*(1+r.Int64N(40)) - r.Int64N(m.bs) // the last block is short, or not
	m.src = make([]byte, m.size)
	blocks := blocksOf(m.size, m.bs)
	for b := range blocks {
		if r.IntN(3) > 0 {
			fillRandom(r, m.src[b*m.bs:min((b+1)*m.bs, m.size)])
		}
	}
	m.cur = append([]byte(nil), m.src...)
	_, sectors := sectorsOf(0, m.size)
	m.seq, m.mine = make([]uint64, sectors), make([]bool, sectors)
	m.inFlight = make([]int, blocks)

	o := Options{BlockSize: m.bs, Standby: r.IntN(3) == 0, Revocable: r.IntN(2) == 0, KnownZero: r.IntN(2) == 0}
	m.disk = newMemDisk(m.size)
	m.disk.torn = true
	if !o.KnownZero {
		fillRandom(r, m.disk.b) // what the disk held before must never be read
	}
	d, err := New(m.disk, o)
	if err != nil {
		t.Fatal(err)
	}
	m.d = d
	m.stream.Store(d.Attach(m))
	return m
}

// run does n operations and then lets the migration end.
func (m *model) run(seed uint64, n int64) {
	var clients, sources sync.WaitGroup
	for i := range uint64(4) {
		clients.Go(func() {
			r := rand.New(rand.NewPCG(seed, i))
			for range n / 4 {
				m.client(r)
				m.ops.Add(1)
			}
		})
	}
	for i := range uint64(2) {
		sources.Go(func() {
			r := rand.New(rand.NewPCG(seed, 100+i))
			for k := 0; !m.over.Load(); k++ {
				m.source(r)
				m.ops.Add(1)
				if k == 50 {
					mustGoLive(m.t, m.d)
				}
				if k > 200 {
					runtime.Gosched() // the clients are what we wait for
				}
			}
		})
	}
	clients.Wait()
	m.over.Store(true)
	sources.Wait()
	m.finish(rand.New(rand.NewPCG(seed, 200)))
}

// reattach begins the next session. One at a time, or the stream that is kept
// might be that of a session which another has ended already.
func (m *model) reattach() {
	m.attaching.Lock()
	defer m.attaching.Unlock()
	m.stream.Store(m.d.Attach(m))
}

func (m *model) finish(r *rand.Rand) {
	mustGoLive(m.t, m.d)
	m.stream.Store(m.d.Attach(m))
	m.d.EachMissing(func(off, length int64) bool {
		m.send(r, off, off+length)
		return true
	})
	if err := m.d.Complete(); err != nil {
		m.t.Errorf("complete: %v, %+v", err, m.d.Stats())
	}
	if _, err := m.stream.Load().WriteAt(make([]byte, m.size), 0); !errors.Is(err, ErrComplete) {
		m.t.Errorf("a late packet after Complete: %v", err)
	}
	for range 5 {
		m.client(r)
	}
	if i := mismatch(m.disk.b, m.cur); i >= 0 {
		m.t.Errorf("at the end byte %d of the disk is %#x, want %#x", i, m.disk.b[i], m.cur[i])
	}
	if err := m.d.Close(); err != nil {
		m.t.Errorf("close: %v", err)
	}
	if w := &m.d.waits; len(w.wants) != 0 && w.aheads != len(w.wants) || w.waiting != 0 || w.head != nil {
		m.t.Errorf("at the end %d wants, %d of them ahead, %d waiting", len(w.wants), w.aheads, w.waiting)
	}
	if m.d.claims.head != nil {
		m.t.Error("at the end a block is claimed")
	}
}

// TestDeviceAgainstModel holds the device against a plain model under random
// concurrent reads, writes, zeroes and trims of any alignment, streamed blocks in
// any order, duplicates, packets that are not aligned, dirty lists in standby and
// while live, and new sessions.
func TestDeviceAgainstModel(t *testing.T) {
	limit := *flagOps
	if testing.Short() {
		limit = min(limit, 50_000)
	}
	var ops atomic.Int64
	begin := time.Now()
	for seed := *flagSeed; ops.Load() < limit; seed++ {
		m := newModel(t, rand.New(rand.NewPCG(seed, 7)), &ops, limit)
		m.run(seed, 400)
		if t.Failed() {
			t.Fatalf("round with -lazy.seed=%d: %s", seed, m)
		}
	}
	t.Logf("%d operations in %v", ops.Load(), time.Since(begin).Round(time.Millisecond))
}

func (m *model) String() string {
	return fmt.Sprintf("%d bytes in blocks of %d, revocable %t, disk known to be zero %t", m.size, m.bs, m.d.revocable, m.d.knownZero.Load())
}
