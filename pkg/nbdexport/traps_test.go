package nbdexport

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const mib = 1 << 20

var allModes = []replyMode{modeSimple, modeStructured, modeExtended}

func eachMode(t *testing.T, test func(t *testing.T, mode replyMode)) {
	for _, mode := range allModes {
		t.Run([]string{"simple", "structured", "extended"}[mode], func(t *testing.T) { test(t, mode) })
	}
}

// stubborn is a plain backend whose reads of the second MiB block, with no
// context to give up by.
type stubborn struct {
	*memory
	gate chan struct{}
}

func (s *stubborn) ReadAt(p []byte, off int64) (int, error) {
	if off >= mib {
		<-s.gate
	}
	return s.memory.ReadAt(p, off)
}

// N1
func TestWaitingReadHoldsUpNothing(t *testing.T) {
	d := newDisk(2 * mib)
	d.missing = mib
	plain := &stubborn{newMemory(2 * mib), make(chan struct{})}
	s, path := newTestServer(t, Options{}, Export{Name: "lazy", Backend: d}, Export{Name: "plain", Backend: plain})
	for _, name := range []string{"lazy", "plain"} {
		t.Run(name, func(t *testing.T) {
			c := dialRaw(t, path).enter(name, modeStructured)
			other := dialRaw(t, path).enter(name, modeStructured)
			waits := c.request(cmdRead, 0, mib+4096, 4096)
			for i := range uint64(200) { // more than any bound
				p := bytes.Repeat([]byte{byte(i + 1)}, 4096)
				c.write(i*4096, p)
				got, err := c.read(0, i*4096, 4096)
				require.Equal(t, ok, err)
				require.Equal(t, p, got)
				got, err = other.read(0, i*4096, 4096)
				require.Equal(t, ok, err)
				require.Equal(t, p, got)
			}
			require.Equal(t, ok, c.do(cmdFlush, 0, 0, 0))
			if name == "lazy" {
				w := s.Waits()
				require.Equal(t, 1, w.Count)
				require.Equal(t, "lazy", w.Export)
				require.Equal(t, int64(mib+4096), w.Off)
				d.arrive()
			} else {
				close(plain.gate)
			}
			_, err := c.readReply(waits, mib+4096, 4096)
			require.Equal(t, ok, err)
		})
	}
}

// N1: what waits does not count against what runs.
func TestManyWaitingReadsLeaveRoomForLocalOnes(t *testing.T) {
	d := newDisk(2 * mib)
	d.missing = mib
	s, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: d})
	c := dialRaw(t, path).enter("disk", modeStructured)
	const waiting = 10 * maxActive
	for range waiting {
		c.request(cmdRead, 0, mib, 4096)
	}
	for i := range uint64(200) {
		_, err := c.read(0, i*4096, 4096)
		require.Equal(t, ok, err)
	}
	require.Equal(t, waiting, s.Waits().Count)
	d.arrive()
	seen := map[uint64]bool{}
	for range waiting {
		r := c.chunk(0)
		require.Equal(t, ok, r.err)
		seen[r.cookie] = true
	}
	require.Len(t, seen, waiting)
	require.Zero(t, s.Waits().Count)
}

// N2
func TestFailedReadIsAnErrorAndTheConnectionLives(t *testing.T) {
	eachMode(t, func(t *testing.T, mode replyMode) {
		d := newDisk(mib)
		_, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: d})
		c := dialRaw(t, path).enter("disk", mode)
		d.failNext(errors.New("broken"))
		_, err := c.read(0, 0, 4096)
		require.Equal(t, errIO, err)
		_, err = c.read(0, 0, 4096)
		require.Equal(t, ok, err)
	})
}

// N3
func TestLengthOfACommandWithoutPayloadIsNoPayload(t *testing.T) {
	eachMode(t, func(t *testing.T, mode replyMode) {
		d := newDisk(mib)
		_, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: d})
		c := dialRaw(t, path).enter("disk", mode)
		for _, typ := range []uint16{cmdTrim, cmdWriteZeroes, cmdCache} {
			require.Equal(t, ok, c.do(typ, 0, 0, mib), commandName(typ))
		}
		for _, typ := range []uint16{8, 9, 1000, 0xffff} {
			require.Equal(t, errInval, c.do(typ, 0, 0, mib), typ)
		}
		_, err := c.read(0, 0, 512)
		require.Equal(t, ok, err)
	})
}

// N3
func TestRefusedWriteKeepsStreamInStep(t *testing.T) {
	eachMode(t, func(t *testing.T, mode replyMode) {
		d := newDisk(mib)
		_, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: d},
			Export{Name: "ro", Backend: d, ReadOnly: true})
		p := make([]byte, 100_000)
		for _, test := range []struct {
			name  string
			flags uint16
			off   uint64
			want  errno
		}{
			{"disk", 0, mib - 1, errNoSpace},
			{"disk", cmdFlagDF, 0, errInval},
			{"disk", 1 << 15, 0, errInval},
			{"ro", 0, 0, errPerm},
		} {
			c := dialRaw(t, path).enter(test.name, mode)
			require.Equal(t, test.want, c.do(cmdWrite, test.flags, test.off, uint64(len(p)), p))
			_, err := c.read(0, 0, 512)
			require.Equal(t, ok, err)
		}
		require.NotContains(t, d.called(), "write")
	})
}

// N4
func TestFlagsAreNoPartOfTheCommand(t *testing.T) {
	eachMode(t, func(t *testing.T, mode replyMode) {
		d := newDisk(mib)
		_, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: d})
		if mode == modeSimple {
			return // there are no contexts without structured replies
		}
		c := dialRaw(t, path).enter("disk", mode, contextAllocation)
		for _, typ := range []uint16{cmdRead, cmdFlush, cmdTrim, cmdCache, cmdWriteZeroes, cmdBlockStatus} {
			cookie := c.request(typ, cmdFlagFUA, 0, 4096)
			require.Equal(t, ok, c.chunk(0).err, commandName(typ))
			require.Equal(t, c.cookie, cookie)
		}
		require.Equal(t, ok, c.do(cmdWrite, cmdFlagFUA, 0, 512, make([]byte, 512)))
	})
}

// Every flag at a command that does not know it is refused, and nothing is done.
func TestFlagOfAnotherCommandIsRefused(t *testing.T) {
	known := map[uint16]uint16{
		cmdRead: cmdFlagDF, cmdWrite: cmdFlagPayloadLen, cmdFlush: 0, cmdTrim: 0, cmdCache: 0,
		cmdWriteZeroes: cmdFlagNoHole | cmdFlagFastZero, cmdBlockStatus: cmdFlagReqOne | cmdFlagPayloadLen,
	}
	d := newDisk(mib)
	_, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: d})
	c := dialRaw(t, path).enter("disk", modeExtended, contextAllocation)
	for typ, mine := range known {
		for bit := range 16 {
			flag := uint16(1) << bit
			if flag&(mine|cmdFlagFUA) != 0 {
				continue
			}
			var payload []byte
			if typ == cmdWrite || flag == cmdFlagPayloadLen {
				payload = make([]byte, 4096)
			}
			require.Equal(t, errInval, c.do(typ, flag, 0, 4096, payload), "%s flag %#x", commandName(typ), flag)
		}
	}
	require.Empty(t, d.called())
}

// N5
func TestLargestWriteAndReadWork(t *testing.T) {
	eachMode(t, func(t *testing.T, mode replyMode) {
		d := newDisk(maxPayload + 512)
		_, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: d})
		c := dialRaw(t, path).enter("disk", mode)
		p := make([]byte, maxPayload)
		for i := range p {
			p[i] = byte(i>>12 + i)
		}
		c.write(512, p)
		got, err := c.read(0, 512, maxPayload)
		require.Equal(t, ok, err)
		require.True(t, bytes.Equal(p, got))
	})
}

// N5
func TestLargerRequestIsRefusedAndSkipped(t *testing.T) {
	eachMode(t, func(t *testing.T, mode replyMode) {
		d := newDisk(3 * maxPayload)
		_, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: d})
		c := dialRaw(t, path).enter("disk", mode)
		_, err := c.read(0, 0, maxPayload+1)
		require.Equal(t, errInval, err)
		require.Equal(t, errInval, c.do(cmdWrite, 0, 0, 2*maxPayload, make([]byte, 2*maxPayload)))
		// The limit is on payloads: what carries none may be larger.
		require.Equal(t, ok, c.do(cmdTrim, 0, 0, 3*maxPayload))
		require.Equal(t, ok, c.do(cmdWriteZeroes, 0, 0, 3*maxPayload))
		require.Equal(t, ok, c.do(cmdCache, 0, 0, 3*maxPayload))
		_, err = c.read(0, 0, 4096)
		require.Equal(t, ok, err)
	})
}

// N6
func TestOnlyWhatTheBackendCanDoIsAdvertised(t *testing.T) {
	all := flagHasFlags | flagSendFlush | flagSendFUA | flagSendTrim | flagSendWriteZeroes | flagCanMultiConn |
		flagSendCache | flagSendFastZero
	slow := newDisk(mib)
	slow.slowZero = true
	for _, test := range []struct {
		e    Export
		want uint16
	}{
		{Export{Backend: newDisk(mib)}, all},
		{Export{Backend: newDisk(mib), ReadOnly: true}, all&^(flagSendTrim|flagSendWriteZeroes|flagSendFastZero) | flagReadOnly},
		{Export{Backend: slow}, all &^ flagSendFastZero},
		{Export{Backend: newMemory(mib)}, flagHasFlags | flagSendFlush | flagSendFUA | flagCanMultiConn},
	} {
		_, path := newTestServer(t, Options{}, test.e)
		c := dialRaw(t, path).enter("", modeSimple)
		require.Equal(t, test.want, c.flags)
		for flag, typ := range map[uint16]uint16{
			flagSendTrim: cmdTrim, flagSendWriteZeroes: cmdWriteZeroes, flagSendCache: cmdCache,
		} {
			want := ok
			if c.flags&flag == 0 {
				want = errInval
			}
			if test.e.ReadOnly && typ != cmdCache {
				want = errPerm
			}
			require.Equal(t, want, c.do(typ, 0, 0, 512), commandName(typ))
		}
	}
}

// N6
func TestFlushAndFUAReachTheBackend(t *testing.T) {
	eachMode(t, func(t *testing.T, mode replyMode) {
		d := newDisk(mib)
		_, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: d})
		c := dialRaw(t, path).enter("disk", mode)
		p := make([]byte, 512)
		require.Equal(t, ok, c.do(cmdWrite, 0, 0, 512, p))
		require.Equal(t, ok, c.do(cmdFlush, 0, 0, 0))
		require.Equal(t, ok, c.do(cmdWrite, cmdFlagFUA, 0, 512, p))
		require.Equal(t, ok, c.do(cmdTrim, cmdFlagFUA, 0, 512))
		require.Equal(t, ok, c.do(cmdWriteZeroes, cmdFlagFUA, 0, 512))
		require.Equal(t, ok, c.do(cmdWriteZeroes, cmdFlagNoHole, 0, 512))
		require.Equal(t, []string{"write", "sync", "write", "sync", "trim", "sync", "punch", "sync", "zero"}, d.called())

		d.failNext(syscall.EIO)
		require.Equal(t, errIO, c.do(cmdFlush, 0, 0, 0))
		require.Equal(t, ok, c.do(cmdCache, 0, 4096, 8192))
		require.Equal(t, [][2]int64{{4096, 8192}}, d.prefetch)
	})
}

// dialSuccessor asks for the export "disk" and is kept waiting for the answer.
func dialSuccessor(t *testing.T, path string) *rawClient {
	next := dialRaw(t, path)
	next.greet(clientFixedNewstyle)
	next.send(magicOption, optGo, uint32(len(infoData("disk"))), infoData("disk"))
	require.NoError(t, next.SetReadDeadline(time.Now().Add(50*time.Millisecond)))
	_, err := next.Read(make([]byte, 1))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded, "attached although a write of the dead client runs")
	require.NoError(t, next.SetReadDeadline(time.Now().Add(10*time.Second)))
	return next
}

// N7
func TestWritesOfADeadClientEndBeforeItsSuccessorBegins(t *testing.T) {
	d := newDisk(mib)
	gate := make(chan struct{})
	d.gate = gate
	_, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: d})
	old := dialRaw(t, path).enter("disk", modeSimple)
	stale := bytes.Repeat([]byte("old."), 1024)
	for range 40 { // the first runs, the others are read or wait to be
		old.request(cmdWrite, 0, 0, 4096, stale)
	}
	<-d.entered
	require.NoError(t, old.Close())

	next := dialSuccessor(t, path)
	d.mu.Lock()
	d.gate = nil
	d.mu.Unlock()
	close(gate)
	next.replies(optGo)
	before := len(d.called())
	fresh := bytes.Repeat([]byte("new."), 1024)
	next.write(0, fresh)
	got, e := next.read(0, 0, 4096)
	require.Equal(t, ok, e)
	require.Equal(t, fresh, got)
	require.Equal(t, []string{"write", "read"}, d.called()[before:], "something of the dead client ran after its successor had begun")
}

// N11
func TestDisconnectFinishesWhatIsOutstanding(t *testing.T) {
	eachMode(t, func(t *testing.T, mode replyMode) {
		d := newDisk(2 * mib)
		d.missing = mib
		_, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: d})
		c := dialRaw(t, path).enter("disk", mode)
		waits := c.request(cmdRead, 0, mib, 4096)
		c.request(cmdWrite, 0, 0, 4, []byte("last"))
		c.request(cmdDisc, 0, 0, 0)
		c.request(cmdWrite, 0, 0, 4, []byte("late"))
		require.Equal(t, ok, c.status(c.cookie-2))
		d.arrive()
		_, err := c.readReply(waits, mib, 4096)
		require.Equal(t, ok, err)
		c.wantEnd()
		require.Equal(t, "last", string(d.b[:4]))
	})
}

// A client that says goodbye and goes leaves nobody to wait.
func TestWaitsEndWhenTheClientHasGone(t *testing.T) {
	for _, bye := range []bool{false, true} {
		left := make(chan int, 1)
		d := newDisk(2 * mib)
		d.missing = mib
		s, path := newTestServer(t, Options{OnDisconnect: func(_ string, n int) { left <- n }}, Export{Name: "disk", Backend: d})
		c := dialRaw(t, path).enter("disk", modeSimple)
		c.request(cmdRead, 0, mib, 4096)
		_, err := c.readReply(c.request(cmdRead, 0, 0, 1), 0, 1) // the wait has begun
		require.Equal(t, ok, err)
		if bye {
			c.request(cmdDisc, 0, 0, 0)
		}
		require.NoError(t, c.Close())
		require.Zero(t, <-left)
		require.Zero(t, s.Waits().Count)
		require.Zero(t, s.Connections())
	}
}

// N12
func TestRangesOutsideTheExport(t *testing.T) {
	eachMode(t, func(t *testing.T, mode replyMode) {
		d := newDisk(mib)
		_, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: d})
		c := dialRaw(t, path).enter("disk", mode)
		for _, at := range []struct{ off, length uint64 }{
			{mib, 1}, {mib - 1, 2}, {mib + 1, 0}, {math.MaxUint64, 1}, {math.MaxUint64 - 511, 512},
			{math.MaxUint64, math.MaxUint64}, {math.MaxInt64, 512}, {math.MaxInt64 - 1, 4096}, {1 << 63, 512}, {0, mib + 1},
			{1, math.MaxUint32},
		} {
			if mode != modeExtended && at.length > math.MaxUint32 {
				continue
			}
			for typ, want := range map[uint16]errno{
				cmdRead: errInval, cmdTrim: errInval, cmdCache: errInval, cmdWriteZeroes: errNoSpace, cmdWrite: errNoSpace,
			} {
				if typ == cmdWrite {
					if at.length > 2*mib {
						continue
					}
					require.Equal(t, want, c.do(typ, 0, at.off, at.length, make([]byte, at.length)), at)
					continue
				}
				require.Equal(t, want, c.do(typ, 0, at.off, at.length), "%s %v", commandName(typ), at)
			}
		}
		require.Empty(t, d.called())
		for _, typ := range []uint16{cmdRead, cmdWrite, cmdTrim, cmdCache, cmdWriteZeroes} {
			require.Equal(t, ok, c.do(typ, 0, mib, 0), "length 0 at the end: %s", commandName(typ))
			require.Equal(t, ok, c.do(typ, 0, 512, 0), "length 0: %s", commandName(typ))
		}
	})
}

// N13
func TestSlowClientHoldsUpOnlyItself(t *testing.T) {
	d := newDisk(4 * mib)
	_, path := newTestServer(t, Options{MemoryBudget: maxPayload}, Export{Name: "disk", Backend: d})
	for i := range d.b {
		d.b[i] = 1
	}
	slow := dialRaw(t, path).enter("disk", modeSimple)
	const asked = 200
	sent := make(chan struct{})
	var all []byte
	for i := range uint64(asked) {
		all = append(all, packRequest(modeSimple, cmdRead, 0, i+1, 0, mib)...)
	}
	go func() { // much more than socket buffers and bounds together hold
		defer close(sent)
		_, err := slow.Write(all)
		assert.NoError(t, err)
	}()
	c := dialRaw(t, path).enter("disk", modeSimple)
	for range 200 {
		_, err := c.read(0, 0, 4096)
		require.Equal(t, ok, err)
	}
	for range asked { // nothing was lost meanwhile
		r := slow.chunk(mib)
		require.Equal(t, ok, r.err)
	}
	<-sent
}

// N14
func TestShutdownEndsWaitsWithESHUTDOWN(t *testing.T) {
	eachMode(t, func(t *testing.T, mode replyMode) {
		d := newDisk(2 * mib)
		d.missing = mib
		s, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: d})
		c := dialRaw(t, path).enter("disk", mode)
		waits := []uint64{c.request(cmdRead, 0, mib, 4096), c.request(cmdRead, 0, mib, 512)}
		c.write(0, []byte("kept"))
		require.NoError(t, s.Shutdown(t.Context()))
		for range waits {
			r := c.chunk(0)
			require.Equal(t, errShutdown, r.err)
			require.True(t, slices.Contains(waits, r.cookie))
		}
		c.wantEnd()
		require.Equal(t, "sync", d.called()[len(d.called())-1], "not flushed")
	})
}

// N14
func TestShutdownIsBoundedByItsContext(t *testing.T) {
	plain := &stubborn{newMemory(2 * mib), make(chan struct{})}
	s, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: plain})
	c := dialRaw(t, path).enter("disk", modeSimple)
	c.request(cmdRead, 0, mib, 4096)
	_, err := c.readReply(c.request(cmdRead, 0, 0, 1), 0, 1)
	require.Equal(t, ok, err)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, s.Shutdown(ctx), context.DeadlineExceeded)
	close(plain.gate)
}

func TestErrorsMapByTheTable(t *testing.T) {
	eachMode(t, func(t *testing.T, mode replyMode) {
		d := newDisk(mib)
		_, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: d})
		c := dialRaw(t, path).enter("disk", mode)
		for err, want := range map[error]errno{
			syscall.ENOSPC: errNoSpace, syscall.EDQUOT: errNoSpace, syscall.EFBIG: errNoSpace, syscall.EPERM: errPerm,
			syscall.EROFS: errPerm, syscall.EINVAL: errInval, syscall.ESHUTDOWN: errShutdown, syscall.ENOMEM: errIO,
			syscall.ENOTSUP: errIO, errors.New("?"): errIO, context.Canceled: errIO,
		} {
			d.failNext(fmt.Errorf("disk: write at 512: %w", err))
			require.Equal(t, want, c.do(cmdWrite, 0, 0, 512, make([]byte, 512)), err)
		}
		d.failNext(syscall.EOPNOTSUPP)
		require.Equal(t, errNotSup, c.do(cmdWriteZeroes, cmdFlagFastZero, 0, 512))
		require.Equal(t, []string{"fast"}, d.called()[len(d.called())-1:], "refused, and not done another way")
		d.failNext(syscall.EOPNOTSUPP)
		require.Equal(t, errIO, c.do(cmdWriteZeroes, 0, 0, 512))
	})
}

// Requests at once from many connections, all checked against what was written.
func TestManyClientsAtOnce(t *testing.T) {
	d := newDisk(16 * mib)
	_, path := newTestServer(t, Options{MemoryBudget: 1}, Export{Name: "disk", Backend: d})
	var wg sync.WaitGroup
	for n := range 8 {
		wg.Go(func() {
			mode := allModes[n%3]
			c := dialRaw(t, path).enter("disk", mode)
			base := uint64(n) * 2 * mib
			for i := range 60 {
				length := uint64(1) << (9 + (i*7+n)%12)
				p := bytes.Repeat([]byte{byte(i + 1), byte(n)}, int(length/2))
				c.write(base, p)
				got, err := c.read(0, base, length)
				if !assert.Equal(t, ok, err) || !assert.True(t, bytes.Equal(p, got)) {
					return
				}
			}
		})
	}
	wg.Wait()
}
