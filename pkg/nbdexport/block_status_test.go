package nbdexport

import (
	"encoding/binary"
	"fmt"
	"math"
	"testing"

	"github.com/stretchr/testify/require"
)

// N10
func TestBlockStatus(t *testing.T) {
	const size = 8 << 30
	d := newDisk(0)
	type run struct {
		length int64
		flags  uint32
	}
	var runs []run
	d.status = func(name string, off, length int64, yield func(int64, uint32) bool) error {
		if name == "silo:state" {
			yield(length, 7)
			return nil
		}
		for _, r := range runs {
			if off >= r.length {
				off -= r.length
				continue
			}
			if !yield(r.length-off, r.flags) {
				return nil
			}
			off = 0
		}
		return nil
	}
	big := &sized{d, size}
	_, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: big})
	hole := stateHole | stateZero

	for _, test := range []struct {
		name        string
		runs        []run
		flags       uint16
		off, length uint64
		want        []extent
		want64      []extent // with extended headers, where it differs
	}{
		{name: "all data", runs: []run{{size, 0}}, length: 1 << 20, want: []extent{{1 << 20, 0}}},
		{name: "the 32-bit edge", runs: []run{{size, 0}}, length: math.MaxUint32, want: []extent{{math.MaxUint32, 0}}},
		{name: "a hole past the request", runs: []run{{4096, 0}, {size - 4096, hole}}, length: 8192,
			want: []extent{{4096, 0}, {4096, hole}}},
		{name: "one only", runs: []run{{4096, 0}, {size - 4096, hole}}, flags: cmdFlagReqOne, length: 8192,
			want: []extent{{4096, 0}}},
		{name: "one, not longer than asked", runs: []run{{size, hole}}, flags: cmdFlagReqOne, off: 512, length: 512,
			want: []extent{{512, hole}}},
		{name: "equal neighbours are one", runs: []run{{512, 0}, {512, 0}, {512, hole}, {0, 0}, {size, hole}}, length: 4096,
			want: []extent{{1024, 0}, {3072, hole}}},
		{name: "equal neighbours are one, also for one only", runs: []run{{512, 0}, {512, 0}, {size, hole}},
			flags: cmdFlagReqOne, length: 4096, want: []extent{{1024, 0}}},
		{name: "the last byte", runs: []run{{size, 0}}, off: size - 1, length: 1, want: []extent{{1, 0}}},
	} {
		for _, mode := range []replyMode{modeStructured, modeExtended} {
			t.Run(fmt.Sprint(test.name, " ", mode), func(t *testing.T) {
				runs = test.runs
				c := dialRaw(t, path).enter("disk", mode, "silo:state", contextAllocation)
				cookie := c.request(cmdBlockStatus, test.flags, test.off, test.length)
				for id := uint32(1); id <= 2; id++ {
					r := c.chunk(0)
					require.Equal(t, cookie, r.cookie)
					require.Equal(t, id == 2, r.flags&replyFlagDone != 0)
					gotID, got := parseStatus(t, mode, r)
					require.Equal(t, id, gotID)
					if id == 1 {
						require.Equal(t, test.want, got)
					} else {
						require.Equal(t, []extent{{test.length, 7}}, got)
					}
				}
			})
		}
	}
	t.Run("64-bit length", func(t *testing.T) {
		runs = []run{{5 << 30, 0}, {3 << 30, hole}}
		c := dialRaw(t, path).enter("disk", modeExtended, contextAllocation)
		c.request(cmdBlockStatus, 0, 0, size)
		_, got := parseStatus(t, modeExtended, c.chunk(0))
		require.Equal(t, []extent{{5 << 30, 0}, {3 << 30, hole}}, got)
	})
	t.Run("payload chooses contexts", func(t *testing.T) {
		runs = []run{{size, 0}}
		c := dialRaw(t, path).enter("disk", modeExtended, contextAllocation, "silo:state")
		require.NotZero(t, c.flags&flagBlockStatusPayload)
		c.request(cmdBlockStatus, cmdFlagPayloadLen, 0, 12, pack(uint64(8192), uint32(2)))
		r := c.chunk(0)
		require.Equal(t, replyFlagDone, r.flags)
		id, got := parseStatus(t, modeExtended, r)
		require.Equal(t, uint32(2), id)
		require.Equal(t, []extent{{8192, 7}}, got)
		for _, bad := range [][]byte{
			pack(uint32(1)), pack(uint64(512)), pack(uint64(512), uint32(3)), pack(uint64(512), uint32(0)),
			pack(uint64(512), uint32(1), uint32(1)), pack(uint64(0), uint32(1)), pack(uint64(size+1), uint32(1)),
			pack(uint64(512), uint32(1), uint32(2), uint32(1)), pack(uint64(512), uint16(1)), {},
		} {
			require.Equal(t, errInval, c.do(cmdBlockStatus, cmdFlagPayloadLen, 0, uint64(len(bad)), bad), "%x", bad)
		}
	})
	for _, mode := range []replyMode{modeStructured, modeExtended} {
		c := dialRaw(t, path).enter("disk", mode, contextAllocation)
		require.Equal(t, errInval, c.do(cmdBlockStatus, 0, size, 1), "past the end")
		require.Equal(t, errInval, c.do(cmdBlockStatus, 0, size-1, 2), "over the end")
		require.Equal(t, errInval, c.do(cmdBlockStatus, 0, 0, 0), "nothing")
		runs = nil
		require.Equal(t, errIO, c.do(cmdBlockStatus, 0, 0, 512), "a backend that says nothing")
		none := dialRaw(t, path).enter("disk", mode)
		require.Equal(t, errInval, none.do(cmdBlockStatus, 0, 0, 512), "no context")
	}
}

// sized is a disk that says it is larger than it is.
type sized struct {
	*disk
	size int64
}

func (s *sized) Size() (int64, error) { return s.size, nil }

func parseStatus(t *testing.T, mode replyMode, r chunk) (id uint32, es []extent) {
	require.Equal(t, ok, r.err)
	id = binary.BigEndian.Uint32(r.data)
	b := r.data[4:]
	if mode == modeExtended {
		require.Equal(t, replyBlockStatusExt, r.typ)
		require.Len(t, b, 4+16*int(binary.BigEndian.Uint32(b)))
		for b = b[4:]; len(b) > 0; b = b[16:] {
			es = append(es, extent{binary.BigEndian.Uint64(b), uint32(binary.BigEndian.Uint64(b[8:]))})
		}
		return id, es
	}
	require.Equal(t, replyBlockStatus, r.typ)
	for ; len(b) > 0; b = b[8:] {
		es = append(es, extent{uint64(binary.BigEndian.Uint32(b)), binary.BigEndian.Uint32(b[4:])})
	}
	return id, es
}
