package lazy

import (
	"bytes"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// alive is a machine with a program that runs on it.
type alive struct {
	*machine
	t *testing.T
	o Options
	p *process
	d *Device
	s *Stream
}

// newAlive has a disk of n blocks, and its map, without a log.
func newAlive(t *testing.T, n int64, o Options) *alive { return newAliveWith(t, n, 0, o) }

func newAliveWith(t *testing.T, n, log int64, o Options) *alive {
	o.Log = slog.New(slog.DiscardHandler)
	a := &alive{t: t, o: o, machine: newMachine(Identity{Size: n * testBlock, BlockSize: testBlock, Device: UUID{1}}, log)}
	a.start(newProcess(nil, -1))
	return a
}

// hold has every operation what wait until goOn is closed.
func (a *alive) hold(what string) (goOn chan struct{}) {
	goOn = make(chan struct{})
	a.p.hook = func(op string) error {
		if op == what {
			<-goOn
		}
		return nil
	}
	return goOn
}

// first has the first operation what do that before, and fail if that does.
func (a *alive) first(what string, do func() error) {
	once := true
	a.p.hook = func(op string) error {
		if op != what || !once {
			return nil
		}
		once = false
		return do()
	}
}

func (a *alive) start(p *process) {
	a.t.Helper()
	d, err := a.machine.start(p, a.o)
	if err != nil {
		a.t.Fatal(err)
	}
	a.p, a.d, a.s = p, d, d.Attach(&asks{})
	a.t.Cleanup(func() { _ = d.Close() }) // the tests of Close look at its error
}

// cut cuts the power and starts again. keep says whether what was not synced is
// lost or kept: of the disk, and of the map.
func (a *alive) cut(keepDisk, keepMap bool) {
	a.t.Helper()
	a.p.kill()
	_ = a.d.Close() // it is dead
	for f, keep := range map[*crashFile]bool{a.disk: keepDisk, a.file: keepMap} {
		f.mu.Lock()
		if keep {
			f.durable = bytes.Clone(f.now)
		}
		f.now, f.since = bytes.Clone(f.durable), make(map[int][][]byte)
		f.mu.Unlock()
	}
	a.boot.losePower()
	a.boots++
	a.start(newProcess(nil, -1))
}

func (a *alive) sync() {
	a.t.Helper()
	if err := a.d.Sync(); err != nil {
		a.t.Fatal(err)
	}
}

func (a *alive) local() (runs [][2]int64) {
	a.d.EachLocal(func(off, length int64) bool {
		runs = append(runs, [2]int64{off / testBlock, length / testBlock})
		return true
	})
	return runs
}

// D1: no bit is in the map before the disk was flushed after its data was
// written. Writing the map first fails it.
func TestD1MapFollowsTheDisk(t *testing.T) {
	a := newAlive(t, 8, Options{})
	mustWrite(t, a.s, 0, filled(1, testBlock))
	mustWrite(t, a.d, testBlock+512, filled(2, 512))
	a.p.hook = func(what string) error {
		if b := a.file.bytes(); what == "sync disk" && !bytes.Equal(b[headerSize:], make([]byte, len(b)-headerSize)) {
			t.Error("the map was written before the disk was flushed")
		}
		return nil
	}
	a.sync()
	a.p.hook = nil
	if log := a.p.done(); !slices.Equal(log[len(log)-5:], []string{"sync disk", "write map", "read map", "write map", "sync map"}) {
		t.Errorf("a flush did %v", log)
	}
	a.sync()
	if log := a.p.done(); !slices.Equal(log[len(log)-2:], []string{"sync map", "sync disk"}) {
		t.Errorf("a flush with nothing new did %v", log)
	}
}

// D2: what was flushed is known to be ours after a power cut: a block, and
// sectors of a missing one.
func TestD2WrittenBitsOutliveThePowerCut(t *testing.T) {
	a := newAlive(t, 8, Options{})
	mustWrite(t, a.d, testBlock, filled(2, testBlock))
	mustWrite(t, a.d, 3*testBlock+512, filled(3, 1024))
	a.sync()
	a.cut(false, false)
	if st := a.d.Stats(); st.Written != 1 || st.Partial != 1 || st.Missing != 7 || !st.Live {
		t.Fatalf("after the power cut: %+v", st)
	}
	mustWrite(t, a.s, 0, filled(9, 8*testBlock)) // all of it again
	mustRead(t, a.d, testBlock, filled(2, testBlock))
	mustRead(t, a.d, 3*testBlock, slices.Concat(filled(9, 512), filled(3, 1024), filled(9, testBlock-1536)))
}

// D12: a block is fetched, written to and flushed: after a power cut it is not
// fetched again over the write. Saving written bits only fails it.
func TestD12FlushedWriteIntoFetchedBlockStays(t *testing.T) {
	for _, revocable := range []bool{false, true} {
		a := newAlive(t, 8, Options{Revocable: revocable})
		mustWrite(t, a.s, 0, filled(1, 2*testBlock))
		mustWrite(t, a.d, testBlock+100, filled(2, 100))
		a.sync()
		a.cut(false, false)
		mustWrite(t, a.s, 0, filled(1, 8*testBlock))
		mustRead(t, a.d, testBlock, slices.Concat(filled(1, 100), filled(2, 100), filled(1, testBlock-200)))
	}
}

// D12: the same with a sector mask that was flushed before the block arrived:
// the mask stays in the map until the block's bit is durable, though others of
// its page are saved meanwhile.
func TestD12FlushedSectorsStayWhenTheirBlockArrives(t *testing.T) {
	for _, keepMap := range []bool{false, true} {
		a := newAlive(t, 8, Options{})
		mustWrite(t, a.d, testBlock+512, filled(2, 512))
		a.sync()
		// Its block arrives while the next flush is in the disk: only then is the
		// mask gone from memory and the bit not in that flush.
		mustWrite(t, a.d, 2*testBlock+512, filled(3, 512))
		a.first("sync disk", func() error {
			mustWrite(t, a.s, testBlock, filled(1, testBlock))
			return nil
		})
		a.sync()
		a.cut(false, keepMap)
		mustWrite(t, a.s, 0, filled(1, 8*testBlock))
		mustRead(t, a.d, testBlock, slices.Concat(filled(1, 512), filled(2, 512), filled(1, testBlock-1024)))
		mustRead(t, a.d, 2*testBlock+512, filled(3, 512))
	}
}

// D12: a mask that has grown and not been saved goes with its block: a flush that
// finds the mask gone saves the bit that took its place.
func TestD12MaskGoneBeforeTheFlushTookIt(t *testing.T) {
	a := newAlive(t, 8, Options{})
	mustWrite(t, a.d, testBlock+512, filled(2, 512))
	marks := make([]uint64, len(a.d.state.changes.marks))
	mustWrite(t, a.s, testBlock, filled(1, testBlock))
	a.d.state.changes.take(marks) // as when the block arrives right after the marks are taken
	a.sync()
	a.cut(false, false)
	mustWrite(t, a.s, 0, filled(9, 8*testBlock))
	mustRead(t, a.d, testBlock, slices.Concat(filled(1, 512), filled(2, 512), filled(1, testBlock-1024)))
}

// D12: a client sees a block as fetched before the block's page is marked as
// changed, writes to it and flushes: the flush waits for the mark. Taking marks
// without the lock fails it.
func TestD12FlushWaitsForTheMarkOfABitThatWasSeen(t *testing.T) {
	a := newAlive(t, 8, Options{})
	s := a.d.state
	copy(a.disk.now, filled(1, testBlock)) // it arrives, and its bit is set
	copy(a.disk.durable, filled(1, testBlock))
	s.changes.begin()
	s.fetched[0].Or(1)
	s.local.Add(1)
	flushed := make(chan struct{})
	go func() {
		defer close(flushed)
		if _, err := a.d.WriteAt(filled(2, 512), 512); err != nil {
			t.Error(err)
		}
		if err := a.d.Sync(); err != nil {
			t.Error(err)
		}
	}()
	select {
	case <-flushed:
	case <-time.After(50 * time.Millisecond): // as it should be
	}
	s.changes.end(regionFetched, 0, 1)
	<-flushed
	a.cut(false, false)
	if st := a.d.Stats(); st.Missing != 7 {
		t.Errorf("after the power cut: %+v", st)
	}
	mustWrite(t, a.s, 0, filled(1, testBlock))
	mustRead(t, a.d, 512, filled(2, 512))
}

// D12: a process is killed after it wrote the map and before it synced it. The
// next believes the bits, so it makes them durable. Else a power cut after a
// flush of a write into such a block would take the bit away.
func TestD12BitsOfAKilledProcessAreMadeDurable(t *testing.T) {
	a := newAlive(t, 8, Options{})
	mustWrite(t, a.s, 0, filled(1, testBlock))
	a.p.hook = func(what string) error {
		if what == "sync map" {
			a.p.kill()
		}
		return nil
	}
	if err := a.d.Sync(); !errors.Is(err, errDead) {
		t.Fatal(err)
	}
	_ = a.d.Close() // it is dead
	a.start(newProcess(nil, -1))
	mustWrite(t, a.d, 512, filled(2, 512))
	a.sync()
	a.cut(false, false)
	mustWrite(t, a.s, 0, filled(1, 8*testBlock))
	mustRead(t, a.d, 512, filled(2, 512))
}

// D13: a bit that is set while the disk is being flushed does not become durable
// with that flush, but with the next. Taking the bits after the flush fails it.
func TestD13BitSetDuringTheFlushWaitsForTheNext(t *testing.T) {
	a := newAlive(t, 8, Options{})
	mustWrite(t, a.s, 0, filled(1, testBlock))
	mustWrite(t, a.d, 5*testBlock, filled(2, 512))
	a.first("sync disk", func() error { // its data is not in this flush
		mustWrite(t, a.s, testBlock, filled(1, testBlock))
		mustWrite(t, a.d, 2*testBlock, filled(2, testBlock))
		mustWrite(t, a.d, 6*testBlock, filled(2, 512))
		return nil
	})
	a.sync()
	a.cut(false, false)
	if want := [][2]int64{{0, 1}}; !slices.Equal(a.local(), want) || a.d.Stats().Partial != 1 {
		t.Errorf("local %v, want %v, %+v", a.local(), want, a.d.Stats())
	}
}

// D6: while disk and map are being synced, blocks arrive, reads are served and
// writes are taken.
func TestD6NobodyWaitsForTheMap(t *testing.T) {
	for _, slow := range []string{"sync disk", "sync map"} {
		synctest.Test(t, func(t *testing.T) {
			a := newAlive(t, 8, Options{})
			mustWrite(t, a.s, 0, filled(1, testBlock))
			goOn := a.hold(slow)
			flush := run(func() { a.sync() })
			synctest.Wait()
			done := run(func() {
				reader := run(func() { mustRead(t, a.d, testBlock, filled(1, testBlock)) })
				synctest.Wait()
				mustWrite(t, a.s, testBlock, filled(1, testBlock))
				<-reader
				mustRead(t, a.d, 0, filled(1, testBlock))
				mustWrite(t, a.d, 0, filled(2, 512))
				mustWrite(t, a.d, 2*testBlock, filled(2, 512))
				mustWrite(t, a.d, 3*testBlock, filled(2, testBlock))
			})
			<-done
			if ended(flush) {
				t.Error("the flush did not wait")
			}
			close(goOn)
			<-flush
		})
	}
}

// D4: a failure of the map is as final as one of the disk.
func TestD4FailedMapIsFinal(t *testing.T) {
	for _, what := range []string{"sync disk", "write map", "read map", "sync map"} {
		a := newAlive(t, 8, Options{})
		mustWrite(t, a.s, 0, filled(1, testBlock))
		mustWrite(t, a.d, testBlock, filled(2, 512))
		a.p.hook = func(op string) error {
			if op == what {
				return syscall.EIO
			}
			return nil
		}
		err := a.d.Sync()
		a.p.hook = nil
		_, werr := a.d.WriteAt(filled(3, 512), 0)
		_, serr := a.s.WriteAt(filled(3, testBlock), 4*testBlock)
		mustRead(t, a.d, 0, filled(1, testBlock)) // reading goes on
		for i, err := range []error{err, a.d.Sync(), werr, serr, a.d.Sync(), a.d.Close()} {
			if !errors.Is(err, syscall.EIO) {
				t.Errorf("%s failed; call %d: %v", what, i, err)
			}
		}
		if !bytes.Equal(a.disk.bytes()[:testBlock], filled(1, testBlock)) {
			t.Errorf("%s failed, and a refused write reached the disk", what)
		}
	}
}

// D9: wherever the power goes while a device becomes complete: it is complete in
// the map only with all of it on the disk, and always once Complete has said so.
func TestD9CompleteMeansOnStableStorage(t *testing.T) {
	for n := 0; ; n++ {
		a := newAlive(t, 8, Options{})
		mustWrite(t, a.d, 3*testBlock, filled(2, testBlock))
		mustWrite(t, a.s, 0, filled(1, 8*testBlock))
		a.p.r = rand.New(rand.NewPCG(uint64(n), 1))
		a.p.endAt = len(a.p.done()) + n
		err := a.d.Complete()
		died := a.p.isDead()
		for range 8 {
			a.losePower(a.p.r)
		}
		a.cut(false, false)
		st := a.d.Stats()
		if err == nil && !st.Complete {
			t.Fatalf("operation %d: it was complete, and is not", n)
		}
		if st.Complete {
			if i := mismatch(a.disk.bytes(), slices.Concat(filled(1, 3*testBlock), filled(2, testBlock), filled(1, 4*testBlock))); i >= 0 {
				t.Fatalf("operation %d: complete, and byte %d is not here", n, i)
			}
			if a.file.size() != headerSize || !a.d.direct.Load() {
				t.Errorf("operation %d: complete with a map of %d bytes", n, a.file.size())
			}
		}
		if !died {
			break
		}
	}
}

// M7: live is durable when GoLive returns, and no client is let in before.
func TestM7LiveIsDurable(t *testing.T) {
	for n := 0; ; n++ {
		a := newAlive(t, 8, Options{Standby: true})
		a.p.r = rand.New(rand.NewPCG(uint64(n), 1))
		a.p.endAt = len(a.p.done()) + n
		err := a.d.GoLive()
		died := a.p.isDead()
		if (err == nil) != a.d.isLive.Load() {
			t.Errorf("operation %d: %v, live %t", n, err, a.d.isLive.Load())
		}
		a.cut(false, false)
		if err == nil && !a.d.isLive.Load() {
			t.Fatalf("operation %d: it was live, and is not", n)
		}
		if !died {
			break
		}
	}
}

// M13: what was taken back is not claimed after a power cut, whatever of the new
// contents has reached the disk. Clearing in memory only fails it.
func TestM13TakenBackIsDurableFirst(t *testing.T) {
	for _, o := range []Options{{Standby: true}, {Revocable: true}} {
		a := newAlive(t, 8, o)
		mustWrite(t, a.s, 0, filled(1, 8*testBlock))
		if err := a.s.Flush(); err != nil {
			t.Fatal(err)
		}
		n := len(a.p.done())
		if err := a.s.DirtyList([]uint32{5, 2, 3}); err != nil {
			t.Fatal(err)
		}
		if log := a.p.done()[n:]; !slices.Equal(log, []string{"read map", "write map", "write map", "sync map", "write map"}) {
			t.Errorf("a dirty list did %v: it need not wait for the disk", log)
		}
		mustWrite(t, a.s, 2*testBlock, filled(2, testBlock))
		a.cut(true, false)
		if want := [][2]int64{{0, 2}, {4, 1}, {6, 2}}; !slices.Equal(a.local(), want) {
			t.Errorf("local %v, want %v", a.local(), want)
		}
	}
}

// M14: blocks that were acknowledged and not yet durable are not claimed after a
// power cut, also if all had been acknowledged.
func TestM14OnlyWhatIsDurableIsClaimed(t *testing.T) {
	for _, standby := range []bool{true, false} {
		a := newAlive(t, 8, Options{Standby: standby})
		mustWrite(t, a.s, testBlock, filled(1, 2*testBlock))
		if err := a.s.Flush(); err != nil {
			t.Fatal(err)
		}
		mustWrite(t, a.s, 0, filled(1, 8*testBlock))
		if a.cut(true, false); !slices.Equal(a.local(), [][2]int64{{1, 2}}) {
			t.Errorf("standby %t: local %v", standby, a.local())
		}
	}
}

// L9: a disk that was zero when the map was made is not known to be after a
// crash: what arrived and was not durable may be there.
func TestL9NotKnownZeroAfterARestart(t *testing.T) {
	a := newAlive(t, 2, Options{KnownZero: true})
	mustWrite(t, a.s, 0, filled(1, testBlock))
	a.cut(true, false)
	if err := a.s.ZeroAt(0, 2*testBlock, true); err != nil {
		t.Fatal(err)
	}
	mustRead(t, a.d, 0, make([]byte, 2*testBlock))
}

// L12: there is no room for the map: the flush says so, nothing is lost, and the
// next saves all of it.
func TestL12NoRoomForTheMapIsNotFinal(t *testing.T) {
	for _, which := range []int{0, 1} { // of the writes of a flush
		a := newAlive(t, 8, Options{})
		mustWrite(t, a.s, 0, filled(1, testBlock))
		mustWrite(t, a.d, testBlock, filled(2, 512))
		n := 0
		a.p.hook = func(what string) error {
			if what == "write map" {
				if n++; n-1 == which {
					return syscall.ENOSPC
				}
			}
			return nil
		}
		if err := a.d.Sync(); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("the flush said %v", err)
		}
		mustWrite(t, a.d, testBlock+1024, filled(2, 512))
		mustWrite(t, a.d, 0, filled(2, 512))
		a.sync()
		a.cut(false, false)
		if st := a.d.Stats(); st.Missing != 7 || st.Partial != 1 || !a.d.readable(testBlock+1024, testBlock+1536) || !a.d.readable(testBlock, testBlock+512) {
			t.Errorf("write %d found no room, and then: %+v", which, st)
		}
	}
}

// D5: flushes that come while one runs share the next: one commit for all.
func TestD5FlushesShareACommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAlive(t, 64, Options{})
		goOn := a.hold("sync disk")
		n := len(a.p.done())
		var all []<-chan struct{}
		for i := range int64(32) {
			mustWrite(t, a.d, i*testBlock, filled(1, testBlock))
			all = append(all, run(a.sync))
			synctest.Wait()
		}
		close(goOn)
		for _, done := range all {
			<-done
		}
		syncs := 0
		for _, what := range a.p.done()[n:] {
			if what == "sync disk" {
				syncs++
			}
		}
		a.cut(false, false)
		if syncs != 2 || a.d.Stats().Written != 32 {
			t.Errorf("32 flushes made %d commits; %+v", syncs, a.d.Stats())
		}
	})
}

// Every operation of disk and map fails once, in turn: nobody hangs, nothing that
// was acknowledged is lost by a power cut, and who was refused is told.
func TestEveryOperationOfDiskAndMapFailsOnce(t *testing.T) {
	for _, o := range []Options{{Standby: true}, {Standby: true, Revocable: true}} {
		for n := 0; ; n++ {
			fired := ""
			synctest.Test(t, func(t *testing.T) {
				a := newAlive(t, 8, o)
				a.p.failAt = len(a.p.done()) + n
				ctx := t.Context()
				var failed []string
				try := func(what string, err error) bool {
					if err != nil {
						failed = append(failed, what)
						if !errors.Is(err, errInjected) && !errors.Is(err, ErrLive) {
							t.Errorf("operation %d: %s: %v", n, what, err)
						}
					}
					return err == nil
				}
				_, err := a.s.WriteAt(filled(1, 2*testBlock), 0)
				try("arrival", err)
				try("flush in standby", a.s.Flush())
				dirty := try("dirty list", a.s.DirtyList([]uint32{1}))
				live := try("go live", a.d.GoLive())
				var wrote, flushed, completed bool
				if live {
					_, err = a.d.WriteAt(filled(2, 512), 512)
					_, err2 := a.d.WriteAt(filled(2, 512), 3*testBlock+512)
					wrote = try("write", err) && try("write", err2) && try("zero", a.d.ZeroAtContext(ctx, 5*testBlock, testBlock, true))
					_, err = a.d.ReadAt(make([]byte, 512), 512)
					readFailed := !try("read", err)
					flushed = try("flush", a.d.Sync())
					if flushed && readFailed && len(failed) > 1 {
						t.Errorf("operation %d: %v", n, failed)
					}
				}
				if fired = a.p.failed; fired != "" && fired[len(fired)-3:] == "map" && len(failed) == 0 {
					t.Errorf("operation %d, %s, failed, and nobody said so", n, fired)
				}
				a.p.failAt = -1
				if slices.Contains(failed, "flush") || slices.Contains(failed, "go live") {
					if err := a.d.Sync(); !errors.Is(err, errInjected) {
						t.Errorf("operation %d, %s, failed; a later flush: %v", n, fired, err)
					}
				} else if live && dirty {
					_, err := a.s.WriteAt(filled(1, 8*testBlock), 0)
					completed = try("arrival", err) && try("complete", a.d.Complete())
				}
				a.cut(false, false)
				if live && !a.d.isLive.Load() {
					t.Errorf("operation %d, %s, failed; it was live", n, fired)
				}
				if dirty && !completed && a.d.state.fetched.get(1) {
					t.Errorf("operation %d, %s, failed; block 1 was taken back", n, fired)
				}
				_, err = a.s.WriteAt(filled(1, 8*testBlock), 0)
				if err != nil && !(completed && errors.Is(err, ErrComplete)) {
					t.Errorf("operation %d: %v", n, err)
				}
				if wrote && flushed {
					if a.d.GoLive() != nil {
						t.Error("not live")
					}
					mustRead(t, a.d, 512, filled(2, 512))
					mustRead(t, a.d, 3*testBlock+512, filled(2, 512))
					mustRead(t, a.d, 5*testBlock, make([]byte, testBlock))
				}
			})
			if fired == "" {
				break
			}
		}
	}
}
