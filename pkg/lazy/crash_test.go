package lazy

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

var errDead = errors.New("the process is dead")

// process is one life of the program: its files share a count of operations, at
// one of which it ends or fails.
type process struct {
	r     *rand.Rand
	hook  func(what string) error // called before each operation; nil: none
	after func(what string)       // called after each write; nil: none

	mu sync.Mutex
	// Guarded by mu:
	log    []string // what was done
	endAt  int      // the operation at which it dies; -1: none
	failAt int      // the operation that fails; -1: none
	failed string
	dead   bool
	died   chan struct{} // closed with dead
	leaves func()        // called when it dies; nil: nothing
}

func newProcess(r *rand.Rand, endAt int) *process {
	return &process{r: r, endAt: endAt, failAt: -1, died: make(chan struct{})}
}

// kill ends the process: nothing it does from here on has an effect.
func (p *process) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dieLocked()
}

func (p *process) dieLocked() {
	if !p.dead {
		p.dead = true
		close(p.died)
		if p.leaves != nil {
			p.leaves()
		}
	}
}

// begin counts an operation. last says that it is the one the process dies of.
func (p *process) begin(what string) (last bool, err error) {
	if p.hook != nil {
		if err := p.hook(what); err != nil {
			return false, err
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dead {
		return false, errDead
	}
	n := len(p.log)
	p.log = append(p.log, what)
	if n == p.failAt {
		p.failed = what
		return false, errInjected
	}
	if n == p.endAt {
		p.dieLocked()
		return true, nil
	}
	return false, nil
}

// done is the operations so far.
func (p *process) done() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log[:len(p.log):len(p.log)]
}

func (p *process) isDead() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dead
}

// crashFile is a file whose unsynced writes may be lost, in part: what is written
// together is kept together only in units of grain bytes.
type crashFile struct {
	grain int

	mu sync.Mutex
	// Guarded by mu:
	now     []byte           // as processes see it
	durable []byte           // as of the last sync
	since   map[int][][]byte // of each unit written since: its versions
}

func newCrashFile(size int64, grain int) *crashFile {
	return &crashFile{grain: grain, now: make([]byte, size), durable: make([]byte, size), since: make(map[int][][]byte)}
}

// crashFileOf is one that holds b, durably.
func crashFileOf(b []byte, grain int) *crashFile {
	f := newCrashFile(int64(len(b)), grain)
	copy(f.now, b)
	copy(f.durable, b)
	return f
}

// noteLocked remembers the units of [off, end) as they are now.
func (f *crashFile) noteLocked(off, end int64) {
	for u := int(off) / f.grain; u*f.grain < int(end); u++ {
		f.since[u] = append(f.since[u], bytes.Clone(f.now[u*f.grain:min((u+1)*f.grain, len(f.now))]))
	}
}

// sync makes durable what was written before it, and nothing that is written
// while it runs.
func (f *crashFile) sync(p *process, during func()) {
	f.mu.Lock()
	upTo := make(map[int]int, len(f.since))
	for u, v := range f.since {
		upTo[u] = len(v)
	}
	size := len(f.now)
	f.mu.Unlock()
	if during != nil {
		during()
	}
	for range 3 {
		runtime.Gosched()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if p.isDead() {
		return
	}
	f.resizeLocked(&f.durable, size)
	for u, n := range upTo {
		if at := u * f.grain; at < len(f.durable) && n <= len(f.since[u]) {
			copy(f.durable[at:], f.since[u][n-1])
		}
		if f.since[u] = f.since[u][min(n, len(f.since[u])):]; len(f.since[u]) == 0 {
			delete(f.since, u)
		}
	}
}

func (f *crashFile) resizeLocked(b *[]byte, size int) {
	if size < len(*b) {
		*b = (*b)[:size:size]
	} else {
		*b = append(*b, make([]byte, size-len(*b))...)
	}
}

// losePower leaves of what is not synced any part.
func (f *crashFile) losePower(r *rand.Rand) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.IntN(2) == 0 {
		f.resizeLocked(&f.durable, len(f.now))
	}
	mode := r.IntN(4)
	for u, v := range f.since {
		keep := r.IntN(len(v) + 1) // versions
		switch mode {
		case 0:
			keep = 0
		case 1:
			keep = len(v)
		}
		if at := u * f.grain; keep > 0 && at < len(f.durable) {
			copy(f.durable[at:], v[keep-1])
		}
	}
	f.since = make(map[int][][]byte)
	f.now = bytes.Clone(f.durable)
}

// drop drops the clean units from the cache: of those that a sync has failed to
// write what is durable comes to light.
func (f *crashFile) drop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	was := f.now
	f.now = bytes.Clone(f.durable)
	f.resizeLocked(&f.now, len(was))
	for u := range f.since {
		if at := u * f.grain; at < len(was) {
			copy(f.now[at:min(at+f.grain, len(was))], was[at:])
		}
	}
}

// failSync is a sync that fails as Linux has it fail: some of what was written is
// durable, with r nil none of it, and all of it is clean.
func (f *crashFile) failSync(r *rand.Rand) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for u, v := range f.since {
		if at := u * f.grain; r != nil && r.IntN(2) == 0 && at < len(f.durable) {
			copy(f.durable[at:], v[len(v)-1])
		}
	}
	f.since = make(map[int][][]byte)
}

func (f *crashFile) bytes() []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	return bytes.Clone(f.now)
}

func (f *crashFile) size() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return int64(len(f.now))
}

// handle is a crashFile as a process has it open.
type handle struct {
	f    *crashFile
	p    *process
	name string
	sync func() // called while a sync runs; nil: nothing
	seen *logCount
}

// logCount counts what was written to the log of a map.
type logCount struct{ records, marks atomic.Int64 }

func (c *logCount) wrote(b []byte) {
	switch {
	case c == nil || len(b) < 8:
	case string(b[:8]) == logMagic:
		c.records.Add(1)
	case string(b[:8]) == markMagic:
		c.marks.Add(1)
	}
}

func (h handle) ReadAt(b []byte, off int64) (int, error) {
	if _, err := h.p.begin("read " + h.name); err != nil {
		return 0, err
	}
	h.f.mu.Lock()
	defer h.f.mu.Unlock()
	if off >= int64(len(h.f.now)) {
		return 0, io.EOF
	}
	n := copy(b, h.f.now[off:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

// change lets apply change [off, off+length). Of the operation that the process
// dies of a part is done.
func (h handle) change(what string, off, length int64, apply func(b []byte)) error {
	last, err := h.p.begin(what + " " + h.name)
	if err != nil {
		return err
	}
	h.f.mu.Lock()
	defer h.f.mu.Unlock()
	if off < 0 || off+length > int64(len(h.f.now)) {
		return storage.ErrOutOfRange
	}
	if last {
		length = h.p.r.Int64N(length + 1)
		length -= (off + length) % int64(min(h.f.grain, sectorSize)) // a unit is torn nowhere
	}
	if length > 0 {
		apply(h.f.now[off : off+length])
		h.f.noteLocked(off, off+length)
	}
	if last {
		return errDead
	}
	return nil
}

func (h handle) WriteAt(b []byte, off int64) (int, error) {
	if err := h.change("write", off, int64(len(b)), func(to []byte) { copy(to, b) }); err != nil {
		return 0, err
	}
	h.seen.wrote(b)
	if h.p.after != nil {
		h.p.after("write " + h.name)
	}
	return len(b), nil
}

func (h handle) ZeroAt(off, length int64, _ bool) error {
	return h.change("zero", off, length, func(to []byte) { clear(to) })
}

func (h handle) Close() error { return nil }

func (h handle) flush() error {
	last, err := h.p.begin("sync " + h.name)
	switch {
	case err != nil:
		return err
	case last:
		return errDead
	}
	h.f.sync(h.p, h.sync)
	if h.p.isDead() {
		return errDead
	}
	return nil
}

func (h handle) drop() error {
	last, err := h.p.begin("drop " + h.name)
	switch {
	case err != nil:
		return err
	case last:
		return errDead
	}
	h.f.drop()
	return nil
}

// crashDisk is a crashFile as a disk, crashMap as the file of a map.
type (
	crashDisk struct{ handle }
	crashMap  struct{ handle }
)

var (
	_ storage.Zeroer       = crashDisk{}
	_ storage.CacheDropper = crashDisk{}
	_ mapFile              = crashMap{}
)

func (d crashDisk) Flush() error { return d.flush() }
func (d crashDisk) Size() uint64 { return uint64(d.f.size()) }

func (m crashMap) Sync() error          { return m.flush() }
func (m crashMap) Drop() error          { return m.drop() }
func (d crashDisk) DropCache() error    { return d.drop() }
func (m crashMap) Size() (int64, error) { return m.f.size(), nil }

func (m crashMap) Truncate(size int64) error {
	last, err := m.p.begin("truncate " + m.name)
	if err != nil {
		return err
	}
	m.f.mu.Lock()
	defer m.f.mu.Unlock()
	m.f.resizeLocked(&m.f.now, int(size))
	for u := range m.f.since {
		if u*m.f.grain >= int(size) {
			delete(m.f.since, u)
		}
	}
	if last {
		return errDead
	}
	return nil
}

// NextData knows pages of zeroes as holes.
func (m crashMap) NextData(off, end int64) (lo, hi int64, err error) {
	b := m.f.bytes()
	zero := func(at int64) bool {
		p := b[at:min(at+pageSize, int64(len(b)))]
		return bytes.Equal(p, zeroes[:len(p)])
	}
	for lo = off; lo < end && zero(lo); {
		lo += pageSize
	}
	for hi = lo; hi < end && !zero(hi); {
		hi += pageSize
	}
	return min(lo, end), min(hi, end), nil
}

// machine is a disk and its map, over power cuts and lives of the program.
type machine struct {
	disk, file *crashFile
	mark       *crashFile  // what the disk bears; nil: it cannot, and the map is not bound
	boot       *bootMemory // nil: there is none
	boots      int         // power cuts
	failed     bool        // a sync has failed in the last life
	seen       logCount
}

// crashBacking is the disk of a machine, for its map. Its stamp is its contents.
type crashBacking struct {
	m *machine
	p *process
}

func (b crashBacking) Stamp(final bool) ([]byte, error) {
	if _, err := b.p.begin("stamp disk"); err != nil {
		return nil, err
	}
	if final {
		if err := b.Sync(); err != nil {
			return nil, err
		}
	}
	sum := sha256.Sum256(b.m.disk.bytes())
	return sum[:], nil
}

func (b crashBacking) SetMark(mark Mark, _ MapState) error {
	h := handle{f: b.m.mark, p: b.p, name: "mark"}
	_, err := h.WriteAt(mark[:], 0)
	return err
}

func (b crashBacking) Sync() error {
	return handle{f: b.m.mark, p: b.p, name: "mark"}.flush()
}

// bears is the mark of the disk.
func (m *machine) bears() (mark Mark) {
	copy(mark[:], m.mark.bytes())
	return mark
}

// samples is how many samples of the disk the map has.
func (m *machine) samples() int {
	h, _, err := readHeader(crashMap{handle{f: m.file, p: newProcess(nil, -1), name: "map"}})
	if err != nil {
		panic(err) // no operation of it fails
	}
	return h.bond.count
}

// wrongDisk says why the disk of a machine cannot be that of its map.
func (m *machine) wrongDisk(on *Map, p *process) error {
	k, id := on.Binding(), on.Identity()
	sum := sha256.Sum256(m.disk.bytes())
	clean := k.Clean && on.State() != MapComplete
	differ, n, err := k.Witness(crashDisk{handle{f: m.disk, p: p, name: "disk"}}, id)
	if on.State() == MapComplete && (differ < n || !k.Clean) {
		differ = 0
	}
	switch {
	case err != nil:
		return err
	case !k.Bears(m.bears()):
		return fmt.Errorf("the disk bears %v, and its map wants %v, or %v (%t)", m.bears(), k.Mark, k.Before, k.Unsettled)
	case differ > 0 && !m.failed: // what a sync has failed to write may be what it was before
		return fmt.Errorf("the witness: %d of %d samples differ", differ, n)
	case clean && string(k.Stamp) != string(sum[:]):
		return fmt.Errorf("the disk is not as it was at a clean end")
	}
	return nil
}

// newMachine has a disk of the size and a new map with a log of so many bytes; 0
// is none.
func newMachine(id Identity, log int64) *machine {
	m := &machine{disk: newCrashFile(id.Size, sectorSize), file: newCrashFile(0, 64)}
	p := newProcess(nil, -1)
	if _, err := newMap(crashMap{handle{f: m.file, p: p, name: "map"}}, id, log); err != nil {
		panic(err) // no operation of it fails
	}
	return m
}

// losePower cuts the power of both files.
func (m *machine) losePower(r *rand.Rand) {
	m.disk.losePower(r)
	m.file.losePower(r)
	if m.mark != nil {
		m.mark.losePower(r)
	}
	m.boot.losePower()
	m.boots++
}

// logged is how many bytes are in the log and not on the disk, as far as anybody
// knows.
func (m *machine) logged() int64 {
	i, err := inspect(crashMap{handle{f: m.file, p: newProcess(nil, -1), name: "map"}})
	if err != nil {
		panic(err) // no operation of it fails
	}
	return i.Logged
}

// start begins a life of the program.
func (m *machine) start(p *process, o Options) (*Device, error) {
	file := crashMap{handle{f: m.file, p: p, name: "map", seen: &m.seen}}
	on, err := openMap(file, Identity{})
	if err != nil {
		return nil, err
	}
	on.path = "map"
	o.Map = on
	if m.mark != nil {
		if err := m.wrongDisk(on, p); err != nil {
			return nil, err
		}
		if err := on.Bind(crashBacking{m, p}, m.bears()); err != nil {
			return nil, err
		}
	}
	o.bootID = func() (string, error) { return fmt.Sprint(m.boots), nil }
	if m.boot != nil {
		o.boot = func(size int64) (memory, error) { return m.boot.open(p, size), nil }
	}
	return New(crashDisk{handle{f: m.disk, p: p, name: "disk"}}, o)
}
