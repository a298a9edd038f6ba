package nbdexport

import (
	"fmt"
	"io"
	"testing"

	"github.com/stretchr/testify/require"
)

// BenchmarkRequests sends requests in rounds of the depth and waits for their
// replies, over a unix socket. The client allocates nothing, so allocs/op are
// the server's for a round, which are to be 0.
func BenchmarkRequests(b *testing.B) {
	for _, mode := range []replyMode{modeSimple, modeStructured, modeExtended} {
		for _, cmd := range []uint16{cmdRead, cmdWrite} {
			for _, run := range []struct{ length, depth int }{{4096, 1}, {4096, 32}, {mib, 8}} {
				b.Run(fmt.Sprintf("%v/%s/%d/depth=%d", mode, commandName(cmd), run.length, run.depth), func(b *testing.B) {
					benchmarkRequests(b, mode, cmd, run.length, run.depth, false)
				})
			}
		}
	}
}

// BenchmarkReadsBesideWaits is reads of local data with 64 reads that wait on
// the same connection.
func BenchmarkReadsBesideWaits(b *testing.B) {
	for _, waits := range []bool{false, true} {
		b.Run(fmt.Sprintf("waits=%v", waits), func(b *testing.B) {
			benchmarkRequests(b, modeStructured, cmdRead, 4096, 32, waits)
		})
	}
}

func benchmarkRequests(b *testing.B, mode replyMode, cmd uint16, length, depth int, waits bool) {
	d := newDisk(4 * mib)
	for i := range d.b {
		d.b[i] = 1
	}
	quiet := &quietDisk{d.memory, d}
	d.missing = 3 * mib
	_, path := newTestServer(b, Options{}, Export{Backend: quiet})
	c := dialRaw(b, path).enter("", mode)
	require.NoError(b, c.SetDeadline(noDeadline))
	if waits {
		for range 64 {
			c.request(cmdRead, 0, 3*mib, 4096)
		}
	}
	var all []byte
	head := map[replyMode]int{modeSimple: simpleReplyLen, modeStructured: structuredReplyLen, modeExtended: extendedReplyLen}[mode]
	if mode != modeSimple && cmd == cmdRead {
		head += 8
	}
	if mode == modeStructured && cmd == cmdWrite {
		head = simpleReplyLen
	}
	size := head * depth
	for i := range depth {
		all = append(all, packRequest(mode, cmd, 0, uint64(i), uint64(i*length%mib), uint64(length))...)
		if cmd == cmdWrite {
			all = append(all, make([]byte, length)...)
		} else {
			size += length
		}
	}
	buf := make([]byte, size)
	b.SetBytes(int64(length * depth))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Write(all); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N*depth)/b.Elapsed().Seconds(), "requests/s")
}
