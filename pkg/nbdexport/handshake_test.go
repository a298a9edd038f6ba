package nbdexport

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// What real clients said, and what they were answered and content with, byte
// by byte. The server was one with the export "disk", "a disk", 1 MiB.
func TestRecordedClients(t *testing.T) {
	files, err := filepath.Glob("testdata/clients/*.hex")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".hex"), func(t *testing.T) {
			d := newDisk(mib)
			copy(d.b, "hello")
			_, path := newTestServer(t, Options{}, Export{Name: "disk", Description: "a disk", Backend: d})
			c := dialRaw(t, path)
			f, err := os.Open(file)
			require.NoError(t, err)
			defer f.Close()
			lines := bufio.NewScanner(f)
			lines.Buffer(nil, mib)
			n := 0
			for lines.Scan() {
				who, digits, _ := strings.Cut(lines.Text(), " ")
				if who == "#" {
					continue
				}
				b, err := hex.DecodeString(digits)
				require.NoError(t, err)
				n++
				if who == "C" {
					c.send(b)
					continue
				}
				require.Equal(t, "S", who)
				require.Equal(t, digits, hex.EncodeToString(c.recv(len(b))), "line %d", n)
			}
			require.NoError(t, lines.Err())
			require.Greater(t, n, 2)
		})
	}
}

func TestOptionsAreAnswered(t *testing.T) {
	d := newDisk(mib)
	_, path := newTestServer(t, Options{}, Export{Name: "disk", Description: "a disk", Backend: d}, Export{Name: "other", Backend: d})
	c := dialRaw(t, path)
	c.greet(clientFixedNewstyle)
	long := strings.Repeat("x", maxName+1)
	for _, test := range []struct {
		name string
		opt  uint32
		data []byte
		want uint32
	}{
		{"unknown", 99, []byte("data"), repErrUnsup},
		{"unknown and long", 1 << 31, make([]byte, 200_000), repErrUnsup},
		{"known and too long", optList, make([]byte, 200_000), repErrTooBig},
		{"PEEK_EXPORT", 4, nil, repErrUnsup},
		{"STARTTLS without TLS", optStartTLS, nil, repErrPolicy},
		{"LIST", optList, nil, repAck},
		{"LIST with data", optList, []byte{0}, repErrInvalid},
		{"SET_META_CONTEXT before structured replies", optSetMetaContext, metaData("disk"), repErrInvalid},
		{"STRUCTURED_REPLY with data", optStructuredReply, []byte{0}, repErrInvalid},
		{"STRUCTURED_REPLY", optStructuredReply, nil, repAck},
		{"STRUCTURED_REPLY again", optStructuredReply, nil, repErrInvalid},
		{"EXTENDED_HEADERS with data", optExtendedHeaders, []byte{0}, repErrInvalid},
		{"EXTENDED_HEADERS", optExtendedHeaders, nil, repAck},
		{"EXTENDED_HEADERS again", optExtendedHeaders, nil, repErrInvalid},
		{"STRUCTURED_REPLY after EXTENDED_HEADERS", optStructuredReply, nil, repErrExtHeaderReqd},
		{"INFO", optInfo, infoData("disk", 3, 1, 2), repAck},
		{"INFO, unknown and repeated requests", optInfo, infoData("disk", 3, 3, 99, 3), repAck},
		{"INFO, no such export", optInfo, infoData("disk2"), repErrUnknown},
		{"INFO, no default export", optInfo, infoData(""), repErrUnknown},
		{"INFO, prefix of a name", optInfo, infoData("dis"), repErrUnknown},
		{"INFO, name with NUL", optInfo, infoData("disk\x00"), repErrInvalid},
		{"INFO, long name", optInfo, infoData(long), repErrInvalid},
		{"INFO, empty", optInfo, nil, repErrInvalid},
		{"INFO, trailing", optInfo, append(infoData("disk"), 0), repErrInvalid},
		{"INFO, name longer than the data", optInfo, pack(uint32(5), "disk", uint16(0)), repErrInvalid},
		{"INFO, name length near 2^32", optInfo, pack(uint32(math.MaxUint32), "disk", uint16(0)), repErrInvalid},
		{"INFO, count beyond the data", optInfo, pack(uint32(4), "disk", uint16(2), uint16(0)), repErrInvalid},
		{"GO, no such export", optGo, infoData("nothing"), repErrUnknown},
		{"LIST_META_CONTEXT", optListMetaContext, metaData("disk"), repAck},
		{"LIST_META_CONTEXT, no such export", optListMetaContext, metaData("disk2"), repErrUnknown},
		{"LIST_META_CONTEXT, count beyond the data", optListMetaContext, pack(uint32(4), "disk", uint32(math.MaxUint32)), repErrInvalid},
		{"LIST_META_CONTEXT, query beyond the data", optListMetaContext, pack(uint32(4), "disk", uint32(1), uint32(9), "base:"), repErrInvalid},
		{"LIST_META_CONTEXT, trailing", optListMetaContext, append(metaData("disk"), 0), repErrInvalid},
		{"LIST_META_CONTEXT, truncated", optListMetaContext, pack(uint32(4), "disk", uint16(0)), repErrInvalid},
		{"SET_META_CONTEXT, many queries", optSetMetaContext, metaData("disk", make([]string, maxQueries+1)...), repErrTooBig},
	} {
		rs := c.option(test.opt, test.data)
		require.Equal(t, test.want, rs[len(rs)-1].typ, test.name)
		if test.want != repAck {
			require.Len(t, rs, 1, test.name)
		}
	}
	require.Equal(t, repAck, c.outcome(optAbort, []byte("ignored")))
	c.wantEnd()
}

func TestInfoAnswersWhatWasAsked(t *testing.T) {
	d := newDisk(mib)
	_, path := newTestServer(t, Options{}, Export{Name: "disk", Description: "a disk", Backend: d})
	c := dialRaw(t, path)
	c.greet(clientFixedNewstyle)
	export := pack(uint16(infoExport), uint64(mib), newTestFlags(d, modeSimple))
	sizes := pack(uint16(infoBlockSize), uint32(1), uint32(4096), uint32(32*mib))
	name, description := pack(uint16(infoName), "disk"), pack(uint16(infoDescription), "a disk")
	for _, opt := range []uint32{optInfo, optInfo, optGo} {
		rs := c.option(opt, infoData("", 3, 2, 1)) // the only export is the default one
		require.Equal(t, []optionReply{{repInfo, export}, {repInfo, sizes}, {repInfo, description}, {repInfo, name}, {repAck, []byte{}}}, rs)
	}
	_, err := c.read(0, 0, 512)
	require.Equal(t, ok, err)
}

func newTestFlags(d *disk, mode replyMode) uint16 {
	s, err := newStore(d)
	if err != nil {
		panic(err)
	}
	return s.flags(false, mode, false)
}

func TestListNamesEveryExport(t *testing.T) {
	d := newDisk(mib)
	_, path := newTestServer(t, Options{}, Export{Name: "b", Description: "second", Backend: d}, Export{Name: "a", Backend: d})
	c := dialRaw(t, path)
	c.greet(clientFixedNewstyle)
	require.Equal(t, []optionReply{
		{repServer, pack(uint32(1), "a")}, {repServer, pack(uint32(1), "bsecond")}, {repAck, []byte{}},
	}, c.option(optList, nil))
}

func TestExportNameWithAndWithoutZeroes(t *testing.T) {
	d := newDisk(mib)
	s, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: d})
	for flags, zeroes := range map[uint32]int{
		0: 124, clientFixedNewstyle: 124, clientNoZeroes: 0, clientFixedNewstyle | clientNoZeroes: 0,
	} {
		c := dialRaw(t, path)
		c.greet(flags)
		c.send(magicOption, uint32(optExportName), uint32(4), "disk")
		require.Equal(t, uint64(mib), c.u64())
		require.Equal(t, newTestFlags(d, modeSimple), c.u16())
		require.Equal(t, make([]byte, zeroes), c.recv(zeroes))
		_, err := c.read(0, 0, 512)
		require.Equal(t, ok, err)
		require.NoError(t, c.Close())
	}
	for _, name := range []string{"nothing", "disk\x00", strings.Repeat("x", 5000), strings.Repeat("x", 70_000)} {
		c := dialRaw(t, path)
		c.greet(0)
		c.send(magicOption, uint32(optExportName), uint32(len(name)))
		_, _ = c.Write([]byte(name)) // the server may have ended it by now
		c.wantEnd()
	}
	require.NoError(t, s.Shutdown(t.Context()))
}

func TestUnknownClientFlagEndsTheConnection(t *testing.T) {
	_, path := newTestServer(t, Options{}, Export{Backend: newMemory(mib)})
	for _, flags := range []uint32{4, 1 << 31, math.MaxUint32} {
		c := dialRaw(t, path)
		c.greet(flags)
		c.wantEnd()
	}
}

func TestMagicsAreChecked(t *testing.T) {
	_, path := newTestServer(t, Options{}, Export{Backend: newMemory(mib)})
	c := dialRaw(t, path)
	c.greet(0)
	c.send(magicOptionReply, uint64(0))
	c.wantEnd()
	for _, mode := range allModes {
		c = dialRaw(t, path).enter("", mode)
		c.send(make([]byte, 32))
		c.wantEnd()
		c = dialRaw(t, path).enter("", mode)
		c.send(packRequest(modeExtended-mode, cmdRead, 0, 1, 0, 0), uint64(0)) // right for another mode, but for the second
		if mode != modeStructured {
			c.wantEnd()
		}
	}
}

func TestMetaContexts(t *testing.T) {
	d, other := newDisk(mib), newDisk(mib)
	other.contexts = []string{contextAllocation}
	_, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: d}, Export{Name: "other", Backend: other},
		Export{Name: "plain", Backend: newMemory(mib)})
	names := func(rs []optionReply) (all []string) {
		for _, r := range rs[:len(rs)-1] {
			require.Equal(t, repMetaContext, r.typ)
			all = append(all, string(r.data[4:]))
		}
		require.Equal(t, repAck, rs[len(rs)-1].typ)
		return all
	}
	c := dialRaw(t, path)
	c.greet(clientFixedNewstyle)
	require.Equal(t, repAck, c.outcome(optStructuredReply, nil))
	both := []string{contextAllocation, "silo:state"}
	for _, test := range []struct {
		opt     uint32
		export  string
		queries []string
		want    []string
	}{
		{optListMetaContext, "disk", nil, both},
		{optListMetaContext, "disk", []string{"base:"}, both[:1]},
		{optListMetaContext, "disk", []string{"silo:", "base:allocation"}, both},
		{optListMetaContext, "disk", []string{"qemu:", "silo:none", "x"}, nil},
		{optListMetaContext, "plain", nil, nil},
		{optSetMetaContext, "disk", []string{"base:", "silo:", "qemu:dirty-bitmap:x"}, nil},
		{optSetMetaContext, "disk", nil, nil},
		{optSetMetaContext, "plain", both, nil},
		{optSetMetaContext, "disk", []string{"silo:state", "silo:state", "base:allocation"}, both},
		{optSetMetaContext, "disk", []string{"silo:state"}, both[1:]},
	} {
		require.Equal(t, test.want, names(c.option(test.opt, metaData(test.export, test.queries...))), test)
	}
	// What was chosen last, for this export, is what counts.
	require.Equal(t, repAck, c.outcome(optGo, infoData("disk")))
	c.mode = modeStructured
	c.request(cmdBlockStatus, 0, 0, 512)
	r := c.chunk(0)
	require.Equal(t, ok, r.err)
	require.Equal(t, replyFlagDone, r.flags)

	for _, test := range []struct{ name, set, enter string }{
		{"another export", "disk", "other"},
		{"a failed choice forgets the one before", "nothing", "disk"},
	} {
		c := dialRaw(t, path)
		c.greet(clientFixedNewstyle)
		c.mode = modeStructured
		require.Equal(t, repAck, c.outcome(optStructuredReply, nil))
		require.Equal(t, repAck, c.outcome(optSetMetaContext, metaData("disk", both...)))
		c.outcome(optSetMetaContext, metaData(test.set, both...))
		require.Equal(t, repAck, c.outcome(optGo, infoData(test.enter)))
		require.Equal(t, errInval, c.do(cmdBlockStatus, 0, 0, 512), test.name)
	}
}

func TestPerExportLimit(t *testing.T) {
	left := make(chan int, 8)
	_, path := newTestServer(t, Options{OnDisconnect: func(_ string, n int) { left <- n }},
		Export{Name: "disk", Backend: newMemory(mib), MaxConnections: 1}, Export{Name: "other", Backend: newMemory(mib)})
	first := dialRaw(t, path).enter("disk", modeSimple)
	second := dialRaw(t, path)
	second.greet(clientFixedNewstyle)
	require.Equal(t, repErrPolicy, second.outcome(optGo, infoData("disk")))
	require.Equal(t, repAck, second.outcome(optInfo, infoData("disk")))
	require.Equal(t, repAck, second.outcome(optGo, infoData("other")))
	require.NoError(t, first.Close())
	dialRaw(t, path).enter("disk", modeSimple)
	require.Zero(t, <-left)
}

// Whoever waits for the last client to leave has counted this one.
func TestAClientThatLeavesWhileItsHandshakeEndsIsToldOf(t *testing.T) {
	left := make(chan int, 1)
	s := NewServer(Options{
		OnConnect:    func(string) { t.Error("it never came so far") },
		OnDisconnect: func(_ string, n int) { left <- n },
	})
	require.NoError(t, s.AddExport(Export{Name: "disk", Backend: newMemory(mib)}))
	c := pipeClient(t, s)
	c.greet(clientFixedNewstyle)
	c.send(magicOption, uint32(optGo), uint32(len(infoData("disk"))), infoData("disk"))
	require.NoError(t, c.Close()) // a pipe holds nothing: the answer has nowhere to go
	require.Zero(t, <-left)
	require.Zero(t, s.Connections())
	require.NoError(t, s.Close())
}

func TestServerLimitOfConnections(t *testing.T) {
	_, path := newTestServer(t, Options{MaxConnections: 2}, Export{Backend: newMemory(mib)})
	a, b := dialRaw(t, path).enter("", modeSimple), dialRaw(t, path).enter("", modeSimple)
	dialRaw(t, path).wantEnd()
	for _, c := range []*rawClient{a, b} {
		_, err := c.read(0, 0, 512)
		require.Equal(t, ok, err)
	}
}

func TestRemovedExportSendsItsClientsAway(t *testing.T) {
	d := newDisk(2 * mib)
	d.missing = mib
	s, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: d}, Export{Name: "other", Backend: newMemory(mib)})
	c, other := dialRaw(t, path).enter("disk", modeSimple), dialRaw(t, path).enter("other", modeSimple)
	waits := c.request(cmdRead, 0, mib, 512)
	c.write(0, []byte("kept"))
	require.NoError(t, s.RemoveExport("disk"))
	require.Error(t, s.RemoveExport("disk"))
	require.Equal(t, "sync", d.called()[len(d.called())-1])
	require.Equal(t, errShutdown, c.status(waits))
	c.wantEnd()
	_, err := other.read(0, 0, 512)
	require.Equal(t, ok, err)
	require.NoError(t, s.AddExport(Export{Name: "disk", Backend: d}))
	dialRaw(t, path).enter("disk", modeSimple)
}

func TestBadExportsAreRefused(t *testing.T) {
	s := NewServer(Options{})
	require.NoError(t, s.AddExport(Export{Name: "disk", Backend: newMemory(0)}))
	for _, e := range []Export{
		{Name: "disk", Backend: newMemory(0)}, {Name: "none"}, {Name: "a\x00b", Backend: newMemory(0)},
		{Name: strings.Repeat("x", maxName+1), Backend: newMemory(0)}, {Name: "\xff", Backend: newMemory(0)},
		{Name: "d", Description: "\xff", Backend: newMemory(0)}, {Name: "neg", Backend: &sized{newDisk(0), -1}},
	} {
		require.Error(t, s.AddExport(e))
	}
	require.NoError(t, s.Close())
	require.ErrorIs(t, s.AddExport(Export{Name: "late", Backend: newMemory(0)}), ErrServerClosed)
}

// N9
func TestHandshakeIsLimitedInTime(t *testing.T) {
	for _, test := range []struct {
		name   string
		client func(c *rawClient)
	}{
		{"silent", func(*rawClient) {}},
		{"a byte a second", func(c *rawClient) {
			for b := range slowOptions() {
				pass(time.Second)
				if _, err := c.Write([]byte{b}); err != nil {
					return
				}
			}
		}},
		{"no end of options", func(c *rawClient) {
			for {
				pass(time.Second)
				if _, err := c.Write(pack(magicOption, uint32(77), uint32(0))); err != nil {
					return
				}
				if _, err := io.ReadFull(c, make([]byte, 20+len("option not known"))); err != nil {
					return
				}
			}
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := NewServer(Options{})
				require.NoError(t, s.AddExport(Export{Backend: newMemory(mib)}))
				began := time.Now()
				c := pipeClient(t, s)
				c.recv(18)
				c.send(uint32(0))
				test.client(c)
				_, err := io.Copy(io.Discard, c)
				require.NoError(t, err)
				require.InDelta(t, handshakeTime, time.Since(began), float64(time.Second)) // the client looks once a second
				require.NoError(t, s.Close())
			})
		})
	}
}

func slowOptions() func(yield func(byte) bool) {
	return func(yield func(byte) bool) {
		for _, b := range pack(magicOption, uint32(optGo), uint32(1000)) {
			if !yield(b) {
				return
			}
		}
		for yield(0) {
		}
	}
}

// N9: the handshake's limit does not reach into the transmission phase.
func TestAttachedClientMayBeSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewServer(Options{})
		require.NoError(t, s.AddExport(Export{Backend: newMemory(mib)}))
		c := pipeClient(t, s).enter("", modeSimple)
		pass(24 * time.Hour)
		_, err := c.read(0, 0, 512)
		require.Equal(t, ok, err)
		require.NoError(t, s.Close())
	})
}

// N9
func TestShutdownDoesNotWaitForHandshakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewServer(Options{})
		require.NoError(t, s.AddExport(Export{Backend: newMemory(mib)}))
		var cs []*rawClient
		for range 10 {
			c := pipeClient(t, s)
			c.recv(18)
			cs = append(cs, c)
		}
		began := time.Now()
		require.NoError(t, s.Shutdown(t.Context()))
		require.Zero(t, time.Since(began))
		for _, c := range cs {
			c.wantEnd()
		}
	})
}

// N9: a client that takes no replies holds the end up for 5 seconds, not more.
func TestShutdownCutsOffAClientThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewServer(Options{})
		require.NoError(t, s.AddExport(Export{Backend: newMemory(mib)}))
		c := pipeClient(t, s).enter("", modeSimple)
		c.request(cmdRead, 0, 0, 512)
		synctest.Wait()
		began := time.Now()
		require.NoError(t, s.Shutdown(t.Context()))
		require.Equal(t, byeTime, time.Since(began))
	})
}

// N9
func TestComingAndGoingLeavesNothingBehind(t *testing.T) {
	half, all := 1000, 10_000
	if testing.Short() {
		half, all = 200, 1000
	}
	s, path := newTestServer(t, Options{MaxConnections: half + 1}, Export{Backend: newDisk(mib)})
	dialRaw(t, path).enter("", modeStructured).Close()
	dial := func() *rawClient {
		nc, err := net.Dial("unix", path)
		require.NoError(t, err)
		return newLooseClient(t, nc)
	}
	goroutines, memory := footprint()
	var cs []*rawClient
	for range half {
		c := dial()
		c.send(uint32(0), magicOption, uint32(optGo), uint32(60_000), make([]byte, 100))
		cs = append(cs, c)
	}
	require.Eventually(t, func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.count >= half }, 10*time.Second, time.Millisecond)
	_, held := footprint()
	require.Less(t, held, memory+uint64(half)*32<<10, "what half-open handshakes hold, both ends of them")
	for _, c := range cs {
		require.NoError(t, c.Close())
	}
	for i := range all {
		c := dial().enter("", allModes[i%3])
		if i%4 == 0 {
			c.request(cmdRead, 0, 0, 4096)
		}
		if i%2 == 0 {
			c.request(cmdDisc, 0, 0, 0)
		}
		require.NoError(t, c.Close())
	}
	require.Eventually(t, func() bool {
		s.mu.Lock()
		n := s.count
		s.mu.Unlock()
		return n == 0
	}, 10*time.Second, time.Millisecond)
	require.Eventually(t, func() bool { n, _ := footprint(); return n <= goroutines+2 }, 10*time.Second, 10*time.Millisecond)
	_, after := footprint()
	require.Less(t, after, memory+2*mib)
	require.Zero(t, s.budget.used.Load())
	require.Zero(t, s.waiting.used.Load())
}

func footprint() (goroutines int, memory uint64) {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return runtime.NumGoroutine(), m.HeapInuse
}

// Memory follows the bytes that have arrived, not the lengths announced.
func TestAnnouncedWritesCostNextToNothing(t *testing.T) {
	d := newDisk(maxPayload)
	s, path := newTestServer(t, Options{}, Export{Backend: d})
	_, before := footprint()
	var cs []*rawClient
	for range 100 {
		c := dialRaw(t, path).enter("", modeSimple)
		c.send(packRequest(modeSimple, cmdWrite, 0, 1, 0, maxPayload), make([]byte, 100))
		cs = append(cs, c)
	}
	require.Eventually(t, func() bool { return s.budget.used.Load() == 100*firstSegment }, 10*time.Second, time.Millisecond)
	_, after := footprint()
	require.Less(t, after, before+32*mib)
	for _, c := range cs {
		require.NoError(t, c.Close())
	}
	require.Eventually(t, func() bool { return s.budget.used.Load() == 0 }, 10*time.Second, time.Millisecond)
}

// With the memory used up by others, everybody still gets on.
func TestShortMemoryHoldsUpButDoesNotStop(t *testing.T) {
	d := newDisk(64 * mib)
	_, path := newTestServer(t, Options{MemoryBudget: 1}, Export{Backend: d}) // the least there is
	var wg sync.WaitGroup
	for n := range 6 {
		wg.Go(func() {
			c := dialRaw(t, path).enter("", modeSimple)
			p := bytes.Repeat([]byte{byte(n + 1)}, 10*mib)
			off := uint64(n) * uint64(len(p))
			c.write(off, p)
			got, err := c.read(0, off, uint64(len(p)))
			assert.Equal(t, ok, err)
			assert.True(t, bytes.Equal(p, got))
		})
	}
	wg.Wait()
}

// A client that attaches while the export ends is sent away too.
func TestAttachingWhileTheExportEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewServer(Options{})
		require.NoError(t, s.AddExport(Export{Name: "disk", Backend: newMemory(mib)}))
		c := pipeClient(t, s)
		c.recv(18)
		c.send(uint32(0), magicOption, uint32(optGo), uint32(len(infoData("disk"))), infoData("disk"))
		synctest.Wait() // attached; its reply is not taken yet
		removed := make(chan error, 1)
		go func() { removed <- s.RemoveExport("disk") }()
		synctest.Wait()
		c.replies(optGo)
		c.wantEnd()
		require.NoError(t, <-removed)
		require.NoError(t, s.Close())
	})
}
