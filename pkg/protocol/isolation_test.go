package protocol

import (
	"encoding/binary"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// slowAndFast is a destination of two devices: 1 is stuck, 2 works.
func slowAndFast(t *testing.T, size int, opts ...Options) (raw *rawPeer, p *ProtocolRW, slow *gate) {
	slow = newGate(size)
	t.Cleanup(slow.release)
	raw, p, _ = destination(t, nil, opts...)
	NewFromProtocol(1, keep(slow), p)
	NewFromProtocol(2, keep(sources.NewMemoryStorage(size)), p)
	return raw, p, slow
}

// P4: a device that stands still holds up neither the data nor the control
// packets of another, as long as what it has been sent fits into its share and
// the pool. Then the reader stops, which is the only way left to bound memory
// with a peer that was not told a window; and nothing is lost by it.
func TestAStuckDeviceDoesNotStopTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size, block = 64 << 20, 1 << 20
		raw, p, slow := slowAndFast(t, size, Options{Memory: 16 << 20}) // shares of 8 and 2 MiB, a pool of 2
		raw.mustSend(1, 1, devInfo(size, block))
		raw.mustSend(2, 2, devInfo(size, block))
		id := uint32(2)
		for range 10 {
			id++
			raw.mustSend(1, id, writeAt(int64(id)*block, fill(block, 1)))
		}
		synctest.Wait()
		require.Equal(t, int64(10<<20), p.Stats().Received, "the share and all of the pool, but for a page or two")
		for range 50 {
			id++
			raw.mustSend(2, id, writeAt(0, fill(block, 2)))
			raw.expect(2, id, written(block))
		}
		raw.mustSend(2, 100, []byte{7, 0})
		raw.expect(2, 100, []byte{0x85})
		raw.mustSend(1, 101, []byte{7, 0}) // a control packet of the stuck one waits in its queue
		raw.mustSend(3, 102, devInfo(4096, 4096))
		raw.mustSend(2, 103, ranged(1, 0, 4))
		raw.expect(2, 103, cat([]byte{0x81}, le32(4), fill(4, 2)))

		sent := make(chan struct{})
		go func() { // one more for the stuck one is more than there is room for
			raw.mustSend(1, 104, writeAt(0, fill(block, 3)))
			raw.mustSend(2, 105, []byte{7, 0})
			close(sent)
		}()
		synctest.Wait()
		require.Empty(t, raw.got)
		require.Equal(t, int64(10<<20+2*minCharge), p.Stats().Received, "with the control packet and the DevInfo that nobody has taken")
		slow.release()
		<-sent
		answers := make(map[uint32]bool)
		for range 13 { // 11 writes and 2 events
			answers[raw.next().id] = true
		}
		require.Len(t, answers, 13)
		require.True(t, answers[104] && answers[105] && answers[101])
		synctest.Wait()
		require.Equal(t, int64(minCharge), p.Stats().Received, "the DevInfo that nobody has taken")
	})
}

// P4, with a peer of ours: the window that the destination tells keeps a stuck
// device inside its share, so the others are never held up, however much there
// is to send.
func TestTheWindowKeepsAStuckDeviceInsideItsShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size, block = 64 << 20, 1 << 18
		slow := newGate(size)
		defer slow.release()
		src, dst := pair(t, nil)
		NewFromProtocol(1, keep(slow), dst)
		fast := sources.NewMemoryStorage(size)
		NewFromProtocol(2, keep(fast), dst)
		a, b := NewToProtocol(size, 1, src), NewToProtocol(size, 2, src)
		for _, to := range []*ToProtocol{a, b} {
			_, ok := to.Peer()
			require.False(t, ok)
			require.NoError(t, to.SendDevInfoExt(&DevInfo{BlockSize: block, Name: "d", Extension: &wire.Extension{Revision: 1}}))
			<-to.PeerKnown()
		}
		peer, ok := a.Peer()
		require.True(t, ok)
		require.Equal(t, wire.Extension{Revision: wire.Revision, MaxData: 1 << 20, Window: 24 << 20}, peer)

		stuck := make(chan error, 1)
		data := fill(block, 1)
		go func() { // as much as there is, for the stuck one
			for off := int64(0); off < size; off += block {
				if err := a.StartWrite(PriorityBulk, data, off, ignored{}); err != nil {
					stuck <- err
					return
				}
			}
			stuck <- nil
		}()
		<-time.After(2 * maxAside) // of the bubble: the reader is relieved from the stuck store
		synctest.Wait()
		require.Equal(t, int64(peer.Window), dst.Stats().Received)
		for off := int64(0); off < size; off += block {
			c := newCompletion()
			require.NoError(t, b.StartWrite(PriorityBulk, data, off, c))
			require.NoError(t, <-c)
		}
		require.NoError(t, b.SendEvent(t.Context(), &wire.Event{Type: wire.EventCompleted}))
		require.Equal(t, fill(size, 1), content(t, fast))

		// What is asked for is not held by the window.
		c := newCompletion()
		require.NoError(t, a.StartWrite(PriorityUrgent, data, 0, c))
		synctest.Wait()
		require.Empty(t, stuck)
		require.Equal(t, int64(peer.Window)+block, dst.Stats().Received)
		slow.release()
		require.NoError(t, <-stuck)
		require.NoError(t, <-c)
	})
}

// A plain Silo source has 1,000 blocks of 1 MiB in flight. They all arrive, in
// bounded memory.
func TestAThousandBlocksInFlight(t *testing.T) {
	const block, blocks = 1 << 20, 1000
	store := &discard{size: block * blocks}
	raw, p, _ := destination(t, store, Options{Memory: 8 << 20})
	raw.mustSend(1, 1, devInfo(block*blocks, block))
	sent := make(chan error, 1)
	go func() {
		b := frame(1, 0, writeAt(0, fill(block, 1))) // one copy, patched for each block
		for i := range uint64(blocks) {
			binary.LittleEndian.PutUint32(b[4:], uint32(i)+2)
			binary.LittleEndian.PutUint64(b[14:], i*block)
			if _, err := raw.conn.Write(b); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	answered := make(map[uint32]bool)
	for range blocks {
		got := raw.next()
		require.Equal(t, written(block), got.body)
		answered[got.id] = true
		require.LessOrEqual(t, p.Stats().Received, int64(8<<20))
	}
	require.NoError(t, <-sent)
	require.Len(t, answered, blocks)
}

// The first device, which is often the only one, may have 24 MiB on their way: at
// a round trip of 30 ms that is 800 MiB/s. Later ones get less, and always
// something.
func TestFewDevicesHaveMuchInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, p, _ := destination(t, nil)
		var sum int64
		for i := range uint32(defaultMaxDevices) {
			NewFromProtocol(i, keep(sources.NewMemoryStorage(4096)), p)
			di := wire.DevInfo{Size: 4096, BlockSize: 4096, Name: "d", Extension: &wire.Extension{Revision: 1}}
			body, err := di.AppendBinary(nil)
			require.NoError(t, err)
			raw.mustSend(i, i+1, body)
			var m wire.DevInfoResponse
			require.NoError(t, m.UnmarshalBinary(raw.next().body))
			want := []uint32{24 << 20, 6 << 20, 3 << 20, 3 << 19, 3 << 18}
			if int(i) < len(want) {
				require.Equal(t, want[i], m.Extension.Window, "device %d", i)
			}
			require.GreaterOrEqual(t, m.Extension.Window, uint32(minCharge), "0 would mean that there is no limit")
			require.Equal(t, min(1<<20, m.Extension.Window), m.Extension.MaxData, "one packet fits into the window")
			sum += int64(m.Extension.Window)
		}
		require.Less(t, sum, int64(defaultMemory))
	})
}

// Every device has a share, also the last of many, and no one more than all.
func TestSharesAreDealtOutWithinTheMemory(t *testing.T) {
	for _, memory := range []int64{minMemory, minMemory + 12345, defaultMemory, 1 << 30} {
		var b budget
		b.init(memory)
		sum := b.total
		for i := range Options.withDefaults(Options{Memory: memory}).MaxDevices {
			var a account
			part := b.open(&a)
			require.Equal(t, part+minShare, a.share)
			sum += a.share
			if i == 0 {
				require.InDelta(t, float64(memory/2), float64(a.share), 2*minShare)
			}
		}
		require.LessOrEqual(t, sum, memory)
	}

	var b budget
	b.init(defaultMemory)
	// A packet larger than everything is let in alone, or it would wait for ever.
	var a, other account
	b.open(&a)
	require.True(t, b.acquire(&a, defaultMemory))
	require.Negative(t, b.free)
	b.release(&a, defaultMemory)
	require.Equal(t, b.total, b.free)
	require.True(t, b.acquire(&other, 1))
	b.release(&other, 1)
	require.Zero(t, b.inUse())
	b.close()
	require.False(t, b.acquire(&a, 1))
}

// A factory that waits holds up its own device only.
func TestASlowFactoryDoesNotStopTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, dst := pair(t, nil)
		opening := make(chan struct{})
		NewFromProtocol(1, func(*DevInfo) storage.StorageProvider {
			<-opening
			return sources.NewMemoryStorage(4096)
		}, dst)
		NewFromProtocol(2, keep(sources.NewMemoryStorage(4096)), dst)
		a, b := NewToProtocol(4096, 1, src), NewToProtocol(4096, 2, src)
		require.NoError(t, a.SendDevInfo("a", 4096, ""))
		require.NoError(t, b.SendDevInfo("b", 4096, ""))
		c := newCompletion()
		require.NoError(t, a.StartWrite(PriorityBulk, fill(4096, 1), 0, c))
		_, err := b.WriteAt(fill(4096, 2), 0)
		require.NoError(t, err)
		require.Empty(t, c)
		close(opening)
		require.NoError(t, <-c)
	})
}
