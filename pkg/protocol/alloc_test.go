package protocol

import (
	"fmt"
	"net"
	"os"
	"syscall"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

func address(b []byte) uintptr { return uintptr(unsafe.Pointer(&b[0])) }

// null is a store that takes everything at no cost.
type null struct{ size uint64 }

func (n null) Size() uint64                           { return n.size }
func (n null) ReadAt(p []byte, _ int64) (int, error)  { return len(p), nil }
func (n null) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (n null) ZeroAt(_, _ int64, _ bool) error        { return nil }
func (n null) Flush() error                           { return nil }
func (n null) Close() error                           { return nil }

// socketPair is two ends of a unix socket.
func socketPair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		conns[i], err = net.FileConn(f)
		require.NoError(t, err)
		require.NoError(t, f.Close())
	}
	return conns[0], conns[1]
}

// tokens is a completion that counts a bounded window of requests in flight.
type tokens struct {
	free chan struct{}
	t    testing.TB
}

func (w *tokens) Complete(err error) {
	if err != nil {
		w.t.Error(err)
	}
	w.free <- struct{}{}
}

// drain waits until nothing is in flight.
func (w *tokens) drain() {
	for range cap(w.free) {
		<-w.free
	}
	for range cap(w.free) {
		w.free <- struct{}{}
	}
}

// stream is a device from one connection to another, with a window of 16, plain
// or with checksums.
func stream(t testing.TB, checked bool) (*ToProtocol, *FromProtocol, *tokens) {
	a, b := socketPair(t)
	src := NewProtocolRW(t.Context(), a, a, nil)
	dst := NewProtocolRW(t.Context(), b, b, nil)
	handle(t, src)
	handle(t, dst)
	store := null{1 << 40}
	from := NewFromProtocol(1, func(*DevInfo) storage.StorageProvider { return store }, dst)
	to := NewToProtocol(store.size, 1, src)
	if checked {
		require.NoError(t, to.SendDevInfoExt(&DevInfo{BlockSize: 64 << 10, Extension: &wire.Extension{Revision: wire.Revision}}))
		<-to.PeerKnown()
	} else {
		require.NoError(t, to.SendDevInfo("d", 64<<10, ""))
	}
	_, err := to.WriteAt(make([]byte, 1), 0)
	require.NoError(t, err)
	w := &tokens{free: make(chan struct{}, 16), t: t}
	for range cap(w.free) {
		w.free <- struct{}{}
	}
	return to, from, w
}

// A streamed block costs no allocation: not to send, not to receive and store,
// not to answer, not to hear the answer.
func TestAStreamedBlockAllocatesNothing(t *testing.T) {
	t.Run("plain", func(t *testing.T) { streamAllocatesNothing(t, false) })
	t.Run("checked", func(t *testing.T) { streamAllocatesNothing(t, true) })
}

func streamAllocatesNothing(t *testing.T, checked bool) {
	to, from, w := stream(t, checked)
	to.HandleNeedAt(func(int64, int64) {})
	for _, size := range []int{512, 4 << 10, 64 << 10, 1 << 20} {
		data := make([]byte, size)
		run := func() {
			for range 64 {
				<-w.free
				if err := to.StartWrite(PriorityBulk, data, 0, w); err != nil {
					t.Fatal(err)
				}
			}
			<-w.free
			if err := to.StartZero(PriorityUrgent, 0, int64(size), w); err != nil {
				t.Fatal(err)
			}
			if err := from.NeedAt(0, int64(size)); err != nil {
				t.Fatal(err)
			}
		}
		warm, runs := 5, 20
		if raceEnabled {
			warm, runs = 1, 1
		}
		for range warm {
			run()
		}
		// A collection in between empties the pools, which is not the block's doing:
		// less than one in 64 blocks is none a block.
		allocs := testing.AllocsPerRun(runs, run)
		w.drain()
		if raceEnabled {
			t.Log("the race detector drops pooled buffers on purpose: not judged")
			continue
		}
		require.Less(t, allocs, 8.0, "for 64 blocks of %d bytes", size)
	}
}

func BenchmarkStream(b *testing.B) {
	for _, size := range []int{4 << 10, 64 << 10, 1 << 20} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) { benchmarkStream(b, size, false) })
		b.Run(fmt.Sprintf("%dKiB/checked", size>>10), func(b *testing.B) { benchmarkStream(b, size, true) })
	}
}

func benchmarkStream(b *testing.B, size int, checked bool) {
	to, _, w := stream(b, checked)
	data := make([]byte, size)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	for b.Loop() {
		<-w.free
		if err := to.StartWrite(PriorityBulk, data, 0, w); err != nil {
			b.Fatal(err)
		}
	}
	w.drain()
}
