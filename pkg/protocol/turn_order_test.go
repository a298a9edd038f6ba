package protocol

import (
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// moody takes more or less time, and knows what it may be told while what runs.
type moody struct {
	*sources.MemoryStorage
	t  *testing.T
	mu sync.Mutex
	// Guarded by mu:
	rnd     *rand.Rand
	running int
	lists   int
	alone   bool
	written []int // by block: how often
	gone    bool
}

func (s *moody) enter(alone bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.alone || alone && s.running > 0 {
		s.t.Error("a list does not run alone")
	}
	s.running++
	s.alone = alone
}

func (s *moody) leave() {
	s.mu.Lock()
	s.running--
	s.alone = false
	s.mu.Unlock()
}

func (s *moody) pause() {
	s.mu.Lock()
	n := s.rnd.IntN(12)
	s.mu.Unlock()
	switch {
	case n < 6:
	case n < 11:
		<-time.After(time.Duration(n-5) * 2 * time.Millisecond)
	default:
		<-time.After(100 * time.Millisecond)
	}
}

func (s *moody) WriteAt(p []byte, off int64) (int, error) {
	s.enter(false)
	defer s.leave()
	s.pause()
	s.mu.Lock()
	if want := int(p[0]); want != s.lists%256 {
		s.t.Errorf("a write of list %d comes after %d", want, s.lists)
	}
	s.written[off/512]++
	s.mu.Unlock()
	return s.MemoryStorage.WriteAt(p, off)
}

func (s *moody) HandleDirtyList(_ uint32, blocks []uint32) error {
	s.enter(true)
	defer s.leave()
	s.pause()
	s.mu.Lock()
	defer s.mu.Unlock()
	if int(blocks[0]) != s.lists {
		s.t.Errorf("list %d comes after %d", blocks[0], s.lists)
	}
	s.lists++
	return nil
}

func (s *moody) HandleRemoveDev() { s.gone = true }

// Whoever reads: lists and writes keep their order, all is done once, also what
// came last.
func TestTurnsKeepTheOrder(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const devices, blocks = 3, 512
				rnd := rand.New(rand.NewPCG(seed, 1))
				stores := map[uint32]*moody{}
				for dev := range uint32(devices) {
					stores[dev] = &moody{MemoryStorage: sources.NewMemoryStorage(blocks * 512), t: t, rnd: rand.New(rand.NewPCG(seed, uint64(dev))), written: make([]int, blocks)}
				}
				a, b := net.Pipe()
				p := NewProtocolRW(t.Context(), b, b, func(p Protocol, dev uint32) {
					NewFromProtocol(dev, func(*DevInfo) storage.StorageProvider { return stores[dev] }, p)
				})
				ended := handle(t, p)
				raw := newRawPeer(t, a)
				answers := 0
				var wg sync.WaitGroup
				wg.Go(func() {
					for got := range raw.got {
						body := got.body
						if body[0] == byte(wire.CommandChecked) {
							body = body[wire.CheckedHead:]
						}
						if body[0] != byte(wire.CommandAlive) {
							answers++
						}
					}
				})
				checked := seed%2 == 0
				send := func(dev, id uint32, body []byte) {
					f := frame(dev, id, body)
					if checked && body[0] != 6 {
						f = checkedFrame(dev, id, body)
					}
					_, err := a.Write(f)
					require.NoError(t, err)
				}
				info := devInfo(blocks*512, 512)
				if checked {
					info = checkedInfo(blocks*512, 512)
				}
				id, lists, next := uint32(0), [devices]int{}, [devices]int{}
				want := 0
				for dev := range uint32(devices) {
					id++
					if checked {
						want++
					}
					_, err := a.Write(frame(dev, id, info))
					require.NoError(t, err)
				}
				for range 900 {
					dev := uint32(rnd.IntN(devices))
					id++
					switch {
					case rnd.IntN(8) == 0 && lists[dev] < 250:
						send(dev, id, cat([]byte{5}, le32(512), le32(1), le32(uint32(lists[dev]))))
						lists[dev]++
						want++
					case next[dev] < blocks:
						send(dev, id, writeAt(int64(next[dev])*512, fill(512, byte(lists[dev]))))
						next[dev]++
						want++
					}
					if rnd.IntN(20) == 0 {
						<-time.After(time.Duration(rnd.IntN(30)) * time.Millisecond)
					}
				}
				for dev := range uint32(devices) {
					id++
					send(dev, id, []byte{0x0a})
				}
				if seed%3 != 0 {
					<-time.After(10 * time.Second)
					require.NoError(t, p.Err())
				}
				_ = a.Close()
				<-ended
				require.NoError(t, p.Close())
				wg.Wait()
				if seed%3 != 0 {
					require.Equal(t, want, answers)
				}
				for dev, s := range stores {
					require.Equal(t, lists[dev], s.lists)
					require.True(t, s.gone)
					for i := range next[dev] {
						require.Equal(t, 1, s.written[i])
					}
				}
				require.Zero(t, p.Stats().Received)
			})
		})
	}
}
