package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// laggy is one end of a connection on which bytes take a while.
type laggy struct {
	net.Conn               // reads
	out      chan lagged   // writes
	gone     chan struct{} // closed by Close
	once     *sync.Once    // of both ends
	both     func()
	lag      time.Duration
}

type lagged struct {
	b  []byte
	at time.Time
}

// laggyPipe is a connection both of whose directions take lag. Cutting one end
// loses what is on its way.
func laggyPipe(lag time.Duration, wg *sync.WaitGroup) (a, b io.ReadWriteCloser) {
	a1, a2 := net.Pipe() // a2 carries what b wrote to a
	b1, b2 := net.Pipe()
	gone, once := make(chan struct{}), new(sync.Once)
	both := func() {
		close(gone)
		for _, c := range []net.Conn{a1, a2, b1, b2} {
			_ = c.Close() // of a pipe: cannot fail
		}
	}
	end := func(read net.Conn, write net.Conn) io.ReadWriteCloser {
		l := &laggy{Conn: read, out: make(chan lagged, 4096), gone: gone, once: once, both: both, lag: lag}
		wg.Go(func() { l.carryLoop(write) })
		return l
	}
	return end(a1, b2), end(b1, a2)
}

func (l *laggy) carryLoop(to net.Conn) {
	for {
		select {
		case x := <-l.out:
			select {
			case <-time.After(time.Until(x.at)):
			case <-l.gone:
				return
			}
			if _, err := to.Write(x.b); err != nil {
				return
			}
		case <-l.gone:
			return
		}
	}
}

func (l *laggy) Write(p []byte) (int, error) {
	select {
	case l.out <- lagged{slices.Clone(p), time.Now().Add(l.lag)}:
		return len(p), nil
	case <-l.gone:
		return 0, io.ErrClosedPipe
	}
}

func (l *laggy) Close() error {
	l.once.Do(l.both)
	return nil
}

var errPower = errors.New("the power is gone")

// volatileDisk loses, when the power goes, any of the sectors that were written
// since the last flush.
type volatileDisk struct {
	mu      sync.Mutex
	cache   []byte
	durable []byte
	fresh   map[int64]bool // sectors that are in cache only
	dead    bool
}

func newVolatileDisk(size int64) *volatileDisk {
	return &volatileDisk{cache: make([]byte, size), durable: make([]byte, size), fresh: make(map[int64]bool)}
}

func (d *volatileDisk) Size() uint64 { return uint64(len(d.cache)) }
func (d *volatileDisk) Close() error { return nil }

func (d *volatileDisk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dead {
		return 0, errPower
	}
	n := copy(p, d.cache[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *volatileDisk) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dead {
		return 0, errPower
	}
	if err := storage.CheckRange(off, int64(len(p)), uint64(len(d.cache))); err != nil {
		return 0, err
	}
	copy(d.cache[off:], p)
	for s := off / 512; s*512 < off+int64(len(p)); s++ {
		d.fresh[s] = true
	}
	return len(p), nil
}

func (d *volatileDisk) Flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dead {
		return errPower
	}
	copy(d.durable, d.cache)
	clear(d.fresh)
	return nil
}

// fail cuts the power and returns the disk that is found when it is back.
func (d *volatileDisk) fail(rnd *rand.Rand) *volatileDisk {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dead = true
	next := newVolatileDisk(int64(len(d.cache)))
	for _, s := range slices.Sorted(maps.Keys(d.fresh)) { // a seed cuts the same way each time
		if rnd.IntN(2) == 0 {
			from, to := s*512, min(s*512+512, int64(len(d.cache)))
			copy(d.durable[from:to], d.cache[from:to])
		}
	}
	copy(next.cache, d.durable)
	copy(next.durable, d.durable)
	return next
}

// guest is the virtual machine's view of one disk.
type guest struct {
	name string
	seed uint64
	want []byte // guarded by the world's model
}

// world is a live migration with everything that can happen to it.
type world struct {
	t         *testing.T
	rnd       *rand.Rand // of the driver
	blockSize int64
	lag       time.Duration
	rate      int64
	auto      bool
	rolls     bool // the destination is rolled back now and then
	dir       string
	ledger    *memLedger
	guests    []*guest
	stores    map[string]storage.StorageProvider // of the source: it loses nothing

	ctx  context.Context
	stop context.CancelFunc
	wg   sync.WaitGroup

	wires *laggyWires

	// life is held for reading by whoever does I/O, for writing by who kills.
	life  lifeLock
	src   *Source
	trs   map[string]*Tracker
	dst   *Destination
	moved map[string]bool // the guest uses the destination

	srcCtx, dstCtx   context.Context
	srcStop, dstStop context.CancelFunc
	srcDone          chan struct{}
	dstDone          chan error

	model sync.Mutex // guards want and moved

	before map[string]copied // of the destination, made at some moment before the handoff; nil: none

	parts sync.Mutex
	// Guarded by parts, since a source may bring a disk at any time:
	disks map[string]*volatileDisk // of the destination
	devs  map[string]*lazy.Device
}

// lifeLock is a sync.RWMutex that does not keep the test's clock from going on.
// One at a time may lock it for writing.
type lifeLock chan struct{}

func (l lifeLock) RLock()   { l <- struct{}{} }
func (l lifeLock) RUnlock() { <-l }

func (l lifeLock) Lock() {
	for range cap(l) {
		l.RLock()
	}
}

func (l lifeLock) Unlock() {
	for range cap(l) {
		l.RUnlock()
	}
}

// laggyWires hands out connections.
type laggyWires struct {
	lag      time.Duration
	src, dst chan io.ReadWriteCloser
	mu       sync.Mutex
	last     io.Closer
	wrap     func(src, dst io.ReadWriteCloser) (io.ReadWriteCloser, io.ReadWriteCloser)
}

func (w *laggyWires) plugLoop(ctx context.Context, wg *sync.WaitGroup) {
	for {
		a, b := laggyPipe(w.lag, wg)
		if w.wrap != nil {
			a, b = w.wrap(a, b)
		}
		select {
		case w.src <- a:
		case <-ctx.Done():
			_ = a.Close()
			return
		}
		w.mu.Lock()
		w.last = a
		w.mu.Unlock()
		select {
		case w.dst <- b:
		case <-ctx.Done():
			_ = a.Close()
			return
		}
	}
}

func (w *laggyWires) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.last != nil {
		_ = w.last.Close() // a second cut of one connection is none
	}
}

func newWorld(t *testing.T, seed uint64, disks int, size int64) *world {
	rnd := rand.New(rand.NewPCG(seed, 1))
	w := &world{
		t: t, rnd: rnd, blockSize: 512 << rnd.IntN(4), lag: time.Duration(rnd.IntN(8)) * time.Millisecond,
		rate: size * int64(1+rnd.IntN(20)), dir: t.TempDir(), ledger: &memLedger{},
		stores: make(map[string]storage.StorageProvider), disks: make(map[string]*volatileDisk),
		moved: make(map[string]bool), life: make(lifeLock, 16),
	}
	w.ctx, w.stop = context.WithCancel(t.Context())
	w.wires = &laggyWires{lag: w.lag, src: make(chan io.ReadWriteCloser), dst: make(chan io.ReadWriteCloser)}
	for i := range disks {
		g := &guest{name: fmt.Sprintf("disk%d", i), seed: seed + uint64(i)}
		store, data := testDisk(t, int(size), seed)
		g.want = slices.Clone(data)
		w.guests = append(w.guests, g)
		w.stores[g.name] = newSlowDisk(store, rand.New(rand.NewPCG(seed, 3)))
	}
	return w
}

// plug begins to make connections.
func (w *world) plug() { w.wg.Go(func() { w.wires.plugLoop(w.ctx, &w.wg) }) }

// startSource starts the source as its state file says. The caller holds life.
func (w *world) startSource() {
	l := w.ledger
	w.trs = make(map[string]*Tracker)
	var all []SourceDisk
	_, gone := l.Owner(w.guests[0].name)
	l.file.Lock()
	if !gone {
		l.generation++
	}
	for i, g := range w.guests {
		owner, _ := l.Owner(g.name)
		tr, err := NewTracker(w.stores[g.name], TrackerOptions{HandedOff: gone, Owner: owner.Device})
		require.NoError(w.t, err)
		w.trs[g.name] = tr
		id := Identity{UUID: [16]byte{9, byte(i)}, Generation: l.generation}
		all = append(all, SourceDisk{Name: g.name, Live: tr, Identity: id})
	}
	l.file.Unlock()
	src, err := NewSource(all, SourceOptions{BlockSize: w.blockSize, Rate: w.rate, Listening: true, AutoHandoff: w.auto, Ledger: w.ledger})
	require.NoError(w.t, err)
	w.src = src
	ctx, stop := context.WithCancel(w.ctx)
	done := make(chan struct{})
	w.srcCtx, w.srcStop, w.srcDone = ctx, stop, done
	w.wg.Go(func() {
		defer close(done)
		if err := src.Run(ctx, from(w.wires.src)); err != nil && ctx.Err() == nil {
			w.t.Errorf("the source ended: %v", err)
		}
	})
}

// killSource ends the source without any farewell, and starts it again.
func (w *world) killSource() {
	w.srcStop() // what waits at the gate was not done
	w.life.Lock()
	defer w.life.Unlock()
	<-w.srcDone
	w.startSource()
}

func (w *world) mapPath(name string) string { return filepath.Join(w.dir, name+".map") }

// startDest starts the destination with what is there. The caller holds life.
func (w *world) startDest() {
	w.parts.Lock()
	w.devs = make(map[string]*lazy.Device)
	w.parts.Unlock()
	ready := make(map[string]chan struct{})
	for _, g := range w.guests {
		ready[g.name] = make(chan struct{})
	}
	dst, err := NewDestination(DestinationOptions{
		Disks: len(w.guests), Listening: true,
		Open: func(a Announcement) (DestinationDisk, error) {
			m, err := lazy.CreateMap(w.mapPath(a.Name), lazy.Identity{
				Size: int64(a.Size), BlockSize: int64(a.BlockSize), Name: a.Name, Source: a.Identity.UUID, Generation: a.Identity.Generation,
			})
			if err != nil {
				return DestinationDisk{}, err
			}
			d := newVolatileDisk(int64(a.Size))
			w.parts.Lock()
			defer w.parts.Unlock()
			w.disks[a.Name] = d
			return DestinationDisk{Store: d, KnownZero: true, Map: m}, nil
		},
		Ready: func(name string, dev *lazy.Device) error {
			w.parts.Lock()
			defer w.parts.Unlock()
			w.devs[name] = dev
			close(ready[name])
			return nil
		},
	})
	require.NoError(w.t, err)
	w.dst = dst
	for _, g := range w.guests {
		m, err := lazy.OpenMap(w.mapPath(g.name), lazy.Identity{})
		if err != nil {
			continue // it has not come so far
		}
		d, _ := w.part(g.name)
		require.NoError(w.t, dst.Resume(g.name, DestinationDisk{Store: d, Map: m}))
	}
	ctx, stop := context.WithCancel(w.ctx)
	done := make(chan error, 1)
	w.dstCtx, w.dstStop, w.dstDone = ctx, stop, done
	w.wg.Go(func() { done <- dst.Run(ctx, from(w.wires.dst)) })
}

// copied is a copy of a disk of the destination and of its map.
type copied struct{ disk, mapped []byte }

// copyDest copies what the destination has; its power is gone.
func (w *world) copyDest() map[string]copied {
	all := make(map[string]copied)
	for _, g := range w.guests {
		m, err := os.ReadFile(w.mapPath(g.name))
		if d, _ := w.part(g.name); err == nil && d != nil {
			all[g.name] = copied{slices.Clone(d.durable), m}
		}
	}
	return all
}

// restoreDest makes what the destination has what it was.
func (w *world) restoreDest(all map[string]copied) {
	w.parts.Lock()
	defer w.parts.Unlock()
	for name, c := range all {
		require.NoError(w.t, os.WriteFile(w.mapPath(name), c.mapped, 0o600))
		d := newVolatileDisk(int64(len(c.disk)))
		copy(d.cache, c.disk)
		copy(d.durable, c.disk)
		w.disks[name] = d
	}
}

// rollBackDest is killDest, after which the destination is what it was at an earlier
// one, if the disks were not handed off since. If they were, what its clients flushed
// would be lost, which is no fault of ours.
func (w *world) rollBackDest() {
	w.life.Lock()
	defer w.life.Unlock()
	for _, g := range w.guests {
		if _, dev := w.part(g.name); dev != nil {
			require.NoError(w.t, dev.Sync()) // so that what it has is claimed
		}
	}
	w.stopDest()
	<-time.After(time.Second) // a handoff that was under way has come to something
	switch {
	case w.src.HandedOff():
	case w.before != nil && w.rnd.IntN(3) > 0:
		w.restoreDest(w.before)
	default:
		w.before = w.copyDest()
	}
	w.startDest()
}

// killDest cuts the destination's power, and starts it again. What a guest
// wrote there was flushed.
func (w *world) killDest() {
	w.life.Lock()
	defer w.life.Unlock()
	w.stopDest()
	w.startDest()
}

// stopDest cuts the destination's power. The caller holds life.
func (w *world) stopDest() {
	for _, g := range w.guests {
		if _, dev := w.part(g.name); dev != nil && w.moved[g.name] {
			require.NoError(w.t, dev.Sync())
		}
	}
	fresh := make(map[string]*volatileDisk)
	w.powerOff(fresh)
	w.dstStop()
	select {
	case <-w.dstDone:
	case <-time.After(time.Hour):
		w.t.Fatal("the destination does not end")
	}
	_ = w.dst.Close() // fails, since the power is gone
	w.powerOff(fresh) // of what the source has brought since
	w.parts.Lock()
	w.disks = fresh
	w.parts.Unlock()
}

// powerOff cuts the power of the disks that are not in fresh, in their order,
// and adds what is found when it is back.
func (w *world) powerOff(fresh map[string]*volatileDisk) {
	for _, g := range w.guests {
		if d, _ := w.part(g.name); d != nil && fresh[g.name] == nil {
			fresh[g.name] = d.fail(w.rnd)
		}
	}
}

// part is a disk of the destination and its device, as far as they are there.
func (w *world) part(name string) (*volatileDisk, *lazy.Device) {
	w.parts.Lock()
	defer w.parts.Unlock()
	return w.disks[name], w.devs[name]
}

// write does one write of the guest, wherever the disk is by then. It is false
// when the world has ended.
func (w *world) write(g *guest, do func(ctx context.Context, d blockDevice) error, done func()) bool {
	for w.ctx.Err() == nil {
		if w.try(g, do, done) {
			return true
		}
		<-time.After(time.Millisecond)
	}
	return false
}

func (w *world) try(g *guest, do func(ctx context.Context, d blockDevice) error, done func()) bool {
	w.life.RLock()
	defer w.life.RUnlock()
	w.model.Lock()
	moved := w.moved[g.name]
	w.model.Unlock()
	if !moved {
		err := do(w.srcCtx, w.trs[g.name])
		switch {
		case err == nil:
			done()
			return true
		case errors.Is(err, ErrHandedOff):
			w.model.Lock()
			w.moved[g.name] = true
			w.model.Unlock()
		case w.srcCtx.Err() == nil:
			w.t.Errorf("%s: the source refused a write: %v", g.name, err)
			return true
		}
		return false
	}
	_, dev := w.part(g.name)
	if dev == nil {
		return false
	}
	// A kill waits for us, and so we do not wait long.
	ctx, cancel := context.WithTimeout(w.ctx, 5*time.Millisecond)
	defer cancel()
	err := do(ctx, dev)
	switch {
	case err == nil:
		if !w.trs[g.name].HandedOff() {
			w.t.Errorf("%s has two owners", g.name)
		}
		done()
		return true
	case ctx.Err() == nil:
		w.t.Errorf("%s: the destination refused: %v", g.name, err)
		return true
	}
	return false
}
