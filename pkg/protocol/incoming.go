package protocol

import (
	"fmt"
	"math"
	"sync"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// incoming is a device of the peer's: its requests wait here for a few workers
// that take them to the store. They wait, within the budget, also before there
// is a store.
type incoming struct {
	p   *ProtocolRW
	dev uint32

	// Set by announce on the reader, which alone uses them until open runs:
	known   bool // the DevInfo has come
	removed bool // a RemoveDev has come; used by the reader alone
	size    uint64
	block   uint32 // bytes
	id      uint32 // of the DevInfo
	checked bool   // its WriteAts come checked; others are refused
	window  int64  // bytes of bulk data that an extended peer may have in flight
	reasons bool   // the peer takes a reason with a refusal

	account account // guarded by the budget

	// Set by open before the workers start:
	refusal wire.Extension // set by the factory: why there is no store
	store   storage.StorageProvider
	zeroer  storage.Zeroer

	mu   sync.Mutex
	work sync.Cond // there is something to do, or the end
	// Guarded by mu:
	info       *wire.DevInfo // when the store is there only what forgetInfo leaves of it
	infoCharge int64         // bytes of the budget that info holds
	factory    func(di *DevInfo) storage.StorageProvider
	opened     bool // store may be used
	jobs       queue
	idle       int // workers that wait
	running    int // jobs that workers have
	alone      bool
	unanswered int
	controls   int  // those of unanswered that are barriers
	turnedAway bool // what comes is dropped
	closed     bool
}

func newIncoming(p *ProtocolRW, dev uint32) *incoming {
	in := &incoming{p: p, dev: dev}
	in.work.L = &in.mu
	return in
}

// register brings the factory; with the DevInfo there, the device opens.
func (in *incoming) register(factory func(di *DevInfo) storage.StorageProvider) error {
	in.mu.Lock()
	if in.factory != nil {
		in.mu.Unlock()
		return fmt.Errorf("device %d: it has a receiver already", in.dev)
	}
	in.factory = factory
	ready := in.info != nil
	in.mu.Unlock()
	if ready {
		in.p.start(in.openLoop)
	}
	return nil
}

// announce brings the DevInfo, which came under h; with the factory there, the
// device opens.
func (in *incoming) announce(di *wire.DevInfo, h wire.Header) error {
	if in.known {
		return fmt.Errorf("%w: a second DevInfo", ErrUnexpected)
	}
	if di.Size > math.MaxInt64 {
		return fmt.Errorf("device of %d bytes: %w", di.Size, wire.ErrTooLarge)
	}
	in.known, in.size, in.block, in.id = true, di.Size, di.BlockSize, h.ID
	in.reasons = di.Extension != nil && di.Extension.Revision >= wire.RevisionReason
	in.checked = takesChecked(di)
	// A quarter of the share stays for data that is asked for, which the window does
	// not count. A window of 0 would mean that there is no limit.
	share := in.p.budget.open(&in.account)
	in.window = max(minCharge, share-share/4)
	// Its strings are as long as the peer likes, and wait for a factory.
	charge := bufferCost(int(h.Length))
	if !in.p.budget.acquire(&in.account, charge) {
		return in.p.closedErr()
	}
	in.mu.Lock()
	if in.closed {
		in.mu.Unlock()
		in.p.budget.release(&in.account, charge)
		return in.p.closedErr()
	}
	in.info, in.infoCharge = di, charge
	ready := in.factory != nil
	in.mu.Unlock()
	if ready {
		in.p.start(in.openLoop)
	}
	return nil
}

// contains says whether the device has all of the range.
func (in *incoming) contains(off, length int64) bool {
	return storage.CheckRange(off, length, in.size) == nil
}

// announcedInfo is the DevInfo, or nil.
func (in *incoming) announcedInfo() *wire.DevInfo {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.info
}

// forgetInfo lets go of all of the DevInfo but the two numbers that are used
// later: a thousand devices may have a hundred KiB of text each.
func (in *incoming) forgetInfo() {
	in.mu.Lock()
	in.info = &wire.DevInfo{Size: in.info.Size, BlockSize: in.info.BlockSize}
	charge := in.infoCharge
	in.infoCharge = 0
	in.mu.Unlock()
	in.p.budget.release(&in.account, charge)
}

// openLoop makes the store, tells an extended peer what we take, and goes on as
// the first of the device's workers.
func (in *incoming) openLoop() {
	store := in.factory(in.info)
	if store == nil {
		in.turnAway()
		return
	}
	in.store = store
	in.zeroer, _ = store.(storage.Zeroer)
	peer := in.info.Extension
	in.forgetInfo()
	if peer != nil {
		if in.answerInfo(in.terms()) != nil {
			return // the connection has ended and has its reason
		}
		in.p.bond(in.dev, peer)
	}
	in.mu.Lock()
	in.opened = true
	in.mu.Unlock()
	in.p.stir()
	for range in.p.opts.Workers - 1 {
		in.p.start(in.workLoop)
	}
	in.workLoop()
}

// workLoop takes requests to the store until the connection ends.
func (in *incoming) workLoop() {
	for {
		j, ok := in.next()
		if !ok {
			return
		}
		in.perform(&j)
		in.finished(&j)
	}
}

// next waits for a job that may run now. A barrier at the front waits until
// nothing else runs, and nothing starts while it does.
func (in *incoming) next() (job, bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	for !in.closed {
		if in.jobs.n > 0 && !in.alone {
			barrier := in.jobs.front().barrier()
			if !barrier || in.running == 0 {
				in.running++
				in.alone = barrier
				return in.jobs.pop(), true
			}
		}
		in.idle++
		in.work.Wait()
		in.idle--
	}
	return job{}, false
}

func (in *incoming) finished(j *job) {
	defer in.p.stir() // when it shows
	in.mu.Lock()
	defer in.mu.Unlock()
	in.running--
	if in.alone {
		in.alone = false
		in.work.Broadcast()
	}
	if in.running == 0 && in.jobs.n > 0 { // a barrier may have waited for the reader, which does not take it
		in.work.Signal()
	}
}

// quietLocked says that the store is there and nothing is on its way to it.
func (in *incoming) quietLocked() bool {
	return in.opened && in.running == 0 && in.jobs.n == 0
}

// push queues a job, or leaves data for a store at rest to the reader, which
// calls it. It never waits; a peer with too many is an error.
func (in *incoming) push(j job) error {
	in.mu.Lock()
	if in.closed {
		in.mu.Unlock()
		in.drop(&j)
		return in.p.closedErr()
	}
	if in.turnedAway {
		in.mu.Unlock()
		in.drop(&j)
		return nil
	}
	if in.unanswered >= maxUnanswered || in.controls >= maxControl && j.barrier() {
		unanswered, controls := in.unanswered, in.controls
		in.mu.Unlock()
		in.drop(&j)
		return fmt.Errorf("%w: %d requests without an answer, %d of them events or lists", ErrTooMany, unanswered, controls)
	}
	in.unanswered++
	if j.barrier() {
		in.controls++
	}
	if in.quietLocked() && j.command == wire.CommandWriteAt {
		in.running++
		in.p.own, in.p.ownJob = in, j
		in.mu.Unlock()
		return nil
	}
	in.jobs.push(j)
	if in.idle > 0 {
		in.work.Signal()
	}
	in.mu.Unlock()
	return nil
}

// answered notes that a request needs no answer any more.
func (in *incoming) answered(barrier bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.unanswered--
	if barrier {
		in.controls--
	}
}

// drop gives back what a job holds.
func (in *incoming) drop(j *job) {
	j.buf.free()
	in.p.budget.release(&in.account, j.charge)
	j.buf, j.tokens, j.charge = nil, nil, 0
}

// close wakes the workers and lets go of what is queued: it was not answered.
func (in *incoming) close() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.closed = true
	for in.jobs.n > 0 {
		j := in.jobs.pop()
		in.drop(&j)
	}
	in.p.budget.release(&in.account, in.infoCharge)
	in.infoCharge = 0
	in.work.Broadcast()
}
