package nbdexport

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/pojntfx/go-nbd/pkg/backend"
	"github.com/stretchr/testify/require"
)

// piece is a chunk of a READ: data, or a hole.
type piece struct {
	off, length uint64
	hole        bool
}

// readPieces reads and says how the reply was cut.
func readPieces(c *rawClient, flags uint16, off, length uint64) (all []piece) {
	c.t.Helper()
	cookie := c.request(cmdRead, flags, off, length)
	for {
		r := c.chunk(int(length))
		require.Equal(c.t, cookie, r.cookie)
		require.Equal(c.t, ok, r.err)
		at := binary.BigEndian.Uint64(r.data)
		if r.typ == replyOffsetHole {
			all = append(all, piece{at, uint64(binary.BigEndian.Uint32(r.data[8:])), true})
		} else {
			require.Equal(c.t, replyOffsetData, r.typ)
			all = append(all, piece{at, uint64(len(r.data) - 8), false})
		}
		if r.flags&replyFlagDone != 0 {
			return all
		}
	}
}

// Aligned runs of zeroes are holes, everything else is data, and with DF all of
// it is one chunk.
func TestReadLeavesZeroesOut(t *testing.T) {
	m := newMemory(mib)
	for i := range m.b {
		m.b[i] = 1
	}
	clear(m.b[8192:20480])            // whole blocks
	clear(m.b[40_000:48_000])         // one whole block in it
	clear(m.b[512<<10 : 512<<10+100]) // less than one
	for i := range 200 {              // too scattered to be worth it
		clear(m.b[768<<10+i%32*8192:][:4096])
	}
	_, path := newTestServer(t, Options{}, Export{Backend: m})
	for _, mode := range []replyMode{modeStructured, modeExtended} {
		c := dialRaw(t, path).enter("", mode)
		for _, test := range []struct {
			off, length uint64
			want        []piece
		}{
			{0, 32768, []piece{{0, 8192, false}, {8192, 12288, true}, {20480, 12288, false}}},
			{8192, 12288, []piece{{8192, 12288, true}}},
			{8193, 12287, []piece{{8193, 4095, false}, {12288, 8192, true}}},
			{10_000, 2000, []piece{{10_000, 2000, false}}},
			{36864, 16384, []piece{{36864, 4096, false}, {40960, 4096, true}, {45056, 8192, false}}},
			{512 << 10, 8192, []piece{{512 << 10, 8192, false}}},
		} {
			require.Equal(t, test.want, readPieces(c, 0, test.off, test.length), "%d bytes at %d", test.length, test.off)
			require.Equal(t, []piece{{test.off, test.length, false}}, readPieces(c, cmdFlagDF, test.off, test.length))
			got, err := c.read(0, test.off, test.length)
			require.Equal(t, ok, err)
			require.True(t, bytes.Equal(m.b[test.off:test.off+test.length], got))
		}
		require.LessOrEqual(t, len(readPieces(c, 0, 0, mib)), maxReadChunks+1)
	}
}

// DF holds for the largest READ, and a failed one is one chunk without data.
func TestReadInOneChunk(t *testing.T) {
	for _, mode := range []replyMode{modeStructured, modeExtended} {
		d := newDisk(maxPayload)
		_, path := newTestServer(t, Options{}, Export{Backend: d})
		c := dialRaw(t, path).enter("", mode)
		require.Equal(t, []piece{{0, maxPayload, false}}, readPieces(c, cmdFlagDF, 0, maxPayload))
		require.Equal(t, []piece{{0, maxPayload, true}}, readPieces(c, 0, 0, maxPayload))
		d.failNext(errors.New("broken"))
		cookie := c.request(cmdRead, 0, 0, 8192)
		r := c.chunk(0)
		require.Equal(t, chunk{cookie: cookie, flags: replyFlagDone, typ: replyError, err: errIO, data: pack(errIO, uint16(0))}, r)
	}
}

func TestRequestOfNothingSucceeds(t *testing.T) {
	eachMode(t, func(t *testing.T, mode replyMode) {
		d := newDisk(mib)
		_, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: d})
		c := dialRaw(t, path).enter("disk", mode)
		for _, typ := range []uint16{cmdRead, cmdWrite, cmdTrim, cmdCache, cmdWriteZeroes} {
			for _, off := range []uint64{0, 512, mib} {
				cookie := c.request(typ, 0, off, 0)
				r := c.chunk(0)
				require.Equal(t, cookie, r.cookie)
				require.Equal(t, ok, r.err, "%s at %d", commandName(typ), off)
			}
		}
	})
}

// More states than a reply may hold: it ends early, which the protocol allows.
func TestBlockStatusOfManyRunsEndsEarly(t *testing.T) {
	d := newDisk(512)
	const size = (maxExtents + 100) * 512
	d.status = func(_ string, off, length int64, yield func(int64, uint32) bool) error {
		for at := off; at < off+length && yield(512, uint32(at/512)&1); at += 512 {
		}
		return nil
	}
	_, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: &sized{d, size}})
	for _, mode := range []replyMode{modeStructured, modeExtended} {
		c := dialRaw(t, path).enter("disk", mode, "silo:state")
		c.request(cmdBlockStatus, 0, 0, size)
		_, es := parseStatus(t, mode, c.chunk(0))
		require.Len(t, es, maxExtents)
		require.Equal(t, []extent{{512, 0}, {512, 1}}, es[:2])
	}
}

// The backends that go-nbd brings are served as they are.
func TestBackendsOfGoNBDAreServed(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, f.Truncate(mib))
	for name, b := range map[string]backend.Backend{
		"memory": backend.NewMemoryBackend(make([]byte, mib)), "file": backend.NewFileBackend(f),
	} {
		t.Run(name, func(t *testing.T) {
			_, path := newTestServer(t, Options{}, Export{Backend: b})
			c := dialRaw(t, path).enter("", modeStructured)
			require.EqualValues(t, mib, c.size)
			data := bytes.Repeat([]byte("silo"), 3000)
			c.write(mib-12_000, data)
			got, err := c.read(0, mib-12_000, 12_000)
			require.Equal(t, ok, err)
			require.Equal(t, data, got)
			require.Equal(t, ok, c.do(cmdFlush, 0, 0, 0))
		})
	}
}
