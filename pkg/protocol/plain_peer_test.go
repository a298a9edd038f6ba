package protocol

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// disk is one device of the tests with a plain peer: sizes are no multiples of
// the block.
type disk struct {
	dev   uint32
	block int64
	data  []byte
	order []int64 // offsets of the blocks
}

func plainDisks() []*disk {
	rnd := rand.New(rand.NewPCG(3, 4))
	var disks []*disk
	for dev, block := range []int64{4 << 10, 64 << 10, 1 << 20} { // from 0 up, as silo serve does
		d := &disk{dev: uint32(dev), block: block, data: make([]byte, 5*block/2+8<<20+777)}
		for i := range d.data {
			d.data[i] = byte(rnd.Uint32())
		}
		clear(d.data[2<<20 : 4<<20]) // zeroes travel as runs
		for off := int64(0); off < int64(len(d.data)); off += block {
			d.order = append(d.order, off)
		}
		rnd.Shuffle(len(d.order), func(i, j int) { d.order[i], d.order[j] = d.order[j], d.order[i] })
		disks = append(disks, d)
	}
	return disks
}

func (d *disk) blockAt(off int64) []byte {
	return d.data[off:min(off+d.block, int64(len(d.data)))]
}

// A source that knows WIRE.md and nothing else feeds our destination: several
// devices, up to 1,000 blocks in flight, in any order, run length and data.
func TestAPlainSourceAndOurDestination(t *testing.T) {
	a, b := socketPair(t)
	t.Cleanup(func() { _ = a.Close() })
	raw := newRawPeer(t, a)
	disks := plainDisks()
	stores := make(map[uint32]*sources.MemoryStorage)
	for _, d := range disks {
		stores[d.dev] = sources.NewMemoryStorage(len(d.data))
	}
	p := NewProtocolRW(t.Context(), b, b, func(p Protocol, dev uint32) {
		from := NewFromProtocol(dev, keep(stores[dev]), p)
		if err := from.NeedAt(0, 1); err != nil {
			t.Error(err)
		}
	}, Options{Memory: 8 << 20})
	handle(t, p)

	flight := make(chan struct{}, 1000)
	var mu sync.Mutex
	want := make(map[uint32]packet) // the answer to each id
	heard := make(chan error, 1)
	go func() {
		heard <- func() error {
			needs := 0
			for got := range raw.got {
				if got.body[0] == 3 {
					needs++
					continue
				}
				mu.Lock()
				exp, ok := want[got.id]
				delete(want, got.id)
				left := len(want)
				mu.Unlock()
				if !ok || exp.dev != got.dev || string(exp.body) != string(got.body) {
					return fmt.Errorf("answer %x on device %d for id %d, want %x", got.body, got.dev, got.id, exp.body)
				}
				<-flight
				if got.body[0] == 0x85 && left == 0 {
					if needs != len(disks) {
						return fmt.Errorf("%d NeedAts", needs)
					}
					return nil
				}
			}
			return fmt.Errorf("the connection ended")
		}()
	}()
	id := uint32(0)
	send := func(dev uint32, body, answer []byte) {
		id++
		if answer != nil {
			flight <- struct{}{}
			mu.Lock()
			want[id] = packet{dev, id, answer}
			mu.Unlock()
		}
		raw.mustSend(dev, id, body)
	}
	for _, d := range disks {
		send(d.dev, devInfo(int64(len(d.data)), uint32(d.block)), nil)
	}
	for more := true; more; {
		more = false
		for _, d := range disks {
			for range 1 << 20 / d.block {
				if len(d.order) == 0 {
					break
				}
				off := d.order[0]
				d.order = d.order[1:]
				more = true
				data := d.blockAt(off)
				body := writeAt(off, data)
				if data[0] == 0 && data[len(data)-1] == 0 {
					body = wire.AppendRLE(wire.AppendWriteAtHead(nil, wire.WriteRunLength, off), data)
				}
				send(d.dev, body, written(len(data)))
			}
		}
	}
	for _, d := range disks {
		send(d.dev, []byte{7, 0}, []byte{0x85})
		send(d.dev, []byte{7, 1}, []byte{0x85})
	}
	send(disks[0].dev, []byte{7, 4}, []byte{0x85})
	require.NoError(t, <-heard)
	for _, d := range disks {
		require.True(t, string(d.data) == string(content(t, stores[d.dev])), "device %d", d.dev)
	}
	require.NoError(t, p.Err())
}

// Our sending end feeds a destination that knows WIRE.md and nothing else, and
// which answers in any order.
func TestOurSourceAndAPlainDestination(t *testing.T) {
	a, b := socketPair(t)
	t.Cleanup(func() { _ = a.Close() })
	raw := newRawPeer(t, a)
	p := NewProtocolRW(t.Context(), b, b, nil)
	handle(t, p)
	disks := plainDisks()
	got := make(map[uint32][]byte)
	heard := make(chan error, 1)
	go func() {
		heard <- func() error {
			rnd := rand.New(rand.NewPCG(5, 6))
			var held []packet
			last := uint32(0)
			completed := 0
			for in := range raw.got {
				if in.id <= last {
					return fmt.Errorf("id %d after %d", in.id, last)
				}
				last = in.id
				switch in.body[0] {
				case 6:
					got[in.dev] = make([]byte, binary.LittleEndian.Uint64(in.body[1:]))
				case 2:
					off := binary.LittleEndian.Uint64(in.body[2:])
					data := in.body[10:]
					if in.body[1] == 2 {
						var err error
						if data, err = wire.ExpandRLE(nil, data, 1<<20); err != nil {
							return err
						}
					}
					copy(got[in.dev][off:], data)
					held = append(held, packet{in.dev, in.id, written(len(data))})
				case 7:
					held = append(held, packet{in.dev, in.id, []byte{0x85}})
					completed++
				default:
					return fmt.Errorf("a plain destination does not take %x", in.body[0])
				}
				if len(raw.got) > 0 && len(held) < 8 {
					continue
				}
				rnd.Shuffle(len(held), func(i, j int) { held[i], held[j] = held[j], held[i] })
				for _, h := range held {
					if err := raw.send(h.dev, h.id, h.body); err != nil {
						return err
					}
				}
				held = nil
				if completed == len(disks) {
					return nil
				}
			}
			return fmt.Errorf("the connection ended")
		}()
	}()
	// Device by device, so that the ids on the wire go up; within one, all at once.
	for _, d := range disks {
		to := NewToProtocol(uint64(len(d.data)), d.dev, p)
		require.Error(t, to.StartWrite(PriorityBulk, d.data[:1], 0, ignored{}), "not before DevInfo")
		require.Error(t, to.SendEvent(t.Context(), &wire.Event{}))
		require.NoError(t, to.SendDevInfo("d", uint32(d.block), ""))
		var answers []completion
		for _, off := range d.order {
			c := newCompletion()
			data := d.blockAt(off)
			if string(data) == string(make([]byte, len(data))) {
				require.NoError(t, to.StartZero(PriorityBulk, off, int64(len(data)), c))
			} else {
				require.NoError(t, to.StartWrite(PriorityBulk, data, off, c))
			}
			answers = append(answers, c)
		}
		for _, c := range answers {
			require.NoError(t, <-c)
		}
		require.NoError(t, to.SendEvent(t.Context(), &wire.Event{Type: wire.EventCompleted}))
	}
	require.NoError(t, <-heard)
	for _, d := range disks {
		require.True(t, string(d.data) == string(got[d.dev]), "device %d", d.dev)
	}
}

// A peer that knows no extension never answers one, and nobody waits for it.
func TestAPlainDestinationNeverAnswersTheExtension(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, p, _ := source(t)
		to := NewToProtocol(4096, 1, p)
		require.NoError(t, to.SendDevInfoExt(&DevInfo{Size: 99, BlockSize: 4096, Name: "d", Extension: &wire.Extension{Revision: 1, Live: true}}))
		raw.expect(1, 1, cat(devInfo(4096, 4096), []byte{1, 0, 4, 0, 1, 0, 0, 0, 3, 0, 0, 0}))
		go func() { raw.mustSend(1, raw.next().id, written(4096)) }()
		_, err := to.WriteAt(fill(4096, 1), 0)
		require.NoError(t, err)
		_, known := to.Peer()
		require.False(t, known)
		raw.mustSend(1, 1, []byte{0xfd, 1, 0, 4, 0, 9, 0, 0, 0, 77, 0, 1, 0, 5}) // late, of a later revision
		<-to.PeerKnown()
		peer, known := to.Peer()
		require.True(t, known)
		require.Equal(t, wire.Extension{Revision: 9, Unknown: []wire.Field{{Type: 77, Value: []byte{5}}}}, peer)
		require.NoError(t, p.Err())
	})
}

// Our destination says nothing of its own to a source without the extension, and
// answers one that has it when the store is there.
func TestTheDestinationAnswersTheExtension(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, p, _ := destination(t, nil)
		raw.mustSend(1, 7, cat(devInfo(4096, 4096), []byte{1, 0, 4, 0, 1, 0, 0, 0}))
		raw.mustSend(2, 8, cat(devInfo(4096, 4096), []byte("junk of somebody else's")))
		synctest.Wait()
		require.Empty(t, raw.got)
		NewFromProtocol(1, keep(sources.NewMemoryStorage(4096)), p)
		NewFromProtocol(2, keep(sources.NewMemoryStorage(4096)), p)
		raw.expect(1, 7, []byte{0xfd, 1, 0, 4, 0, 4, 0, 0, 0, 2, 0, 4, 0, 0, 0, 16, 0, 4, 0, 4, 0, 0, 0, 0x80, 1})
		synctest.Wait()
		require.Empty(t, raw.got)
		require.NoError(t, p.Err())
	})
}
