package protocol

import (
	"math"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// M5, M6: whatever a destination asks for, the source is called with ranges that
// lie in its device and are not empty, or not at all.
func TestNeedAtRangesAreCutToTheDevice(t *testing.T) {
	const size = 10_000 // the last block of 4096 is short
	for _, command := range []byte{3, 4} {
		for _, v := range []struct {
			off  int64
			n    int32
			want [][2]int64
		}{
			{0, 4096, [][2]int64{{0, 4096}}},
			{8192, 4096, [][2]int64{{8192, size - 8192}}}, // Silo asks for the whole of the last block
			{0, math.MaxInt32, [][2]int64{{0, size}}},
			{1, 1, [][2]int64{{1, 1}}},
			{0, 0, nil},
			{4096, 0, nil},
			{0, -1, nil},
			{0, math.MinInt32, nil},
			{-4096, 4096, nil},
			{-1, 2, nil},
			{math.MinInt64, 1, nil},
			{size, 1, nil},
			{1 << 40, 4096, nil},
			{math.MaxInt64, math.MaxInt32, nil},
		} {
			synctest.Test(t, func(t *testing.T) {
				raw, p, _ := source(t)
				to := NewToProtocol(size, 1, p)
				var got, other [][2]int64
				need := func(off, length int64) { got = append(got, [2]int64{off, length}) }
				dont := func(off, length int64) { other = append(other, [2]int64{off, length}) }
				if command == 4 {
					need, dont = dont, need
				}
				to.HandleNeedAt(need)
				to.HandleDontNeedAt(dont)
				require.NoError(t, to.SendDevInfo("d", 4096, ""))
				raw.mustSend(1, 1, ranged(command, v.off, v.n))
				synctest.Wait()
				require.Equal(t, v.want, got)
				require.Empty(t, other)
				require.NoError(t, p.Err())
			})
		}
	}
}

func TestNeedAtWithoutAHandlerIsIgnored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, p, _ := source(t)
		require.NoError(t, NewToProtocol(4096, 1, p).SendDevInfo("d", 4096, ""))
		raw.mustSend(1, 1, ranged(3, 0, 4096))
		raw.mustSend(1, 2, ranged(4, 0, 4096))
		synctest.Wait()
		require.NoError(t, p.Err())
	})
}

// The receiver's own API refuses what WIRE.md forbids.
func TestFromProtocolRejectsBadRanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, p, _ := destination(t, nil)
		from := NewFromProtocol(1, keep(sources.NewMemoryStorage(8192)), p)
		require.ErrorIs(t, from.NeedAt(0, 4096), errNotAnnounced, "not before DevInfo")
		require.ErrorIs(t, from.DontNeedAt(0, 4096), errNotAnnounced)
		raw.mustSend(1, 1, devInfo(8192, 4096))
		synctest.Wait()
		for _, r := range [][2]int64{{0, 0}, {0, -1}, {-1, 2}, {8192, 1}, {4096, 4097}, {math.MaxInt64, 2}, {1 << 40, 1}} {
			require.ErrorIs(t, from.NeedAt(r[0], r[1]), storage.ErrOutOfRange, "%v", r)
			require.ErrorIs(t, from.DontNeedAt(r[0], r[1]), storage.ErrOutOfRange, "%v", r)
		}
		synctest.Wait()
		require.Empty(t, raw.got, "nothing of it was sent")
		require.NoError(t, from.NeedAt(4096, 4096))
		raw.expect(1, 1, ranged(3, 4096, 4096))
		require.NoError(t, from.DontNeedAt(0, 8192))
		raw.expect(1, 2, ranged(4, 0, 8192))
	})
}

// What is longer than the wire can say goes as several, cut on blocks.
func TestLongRangesAreSplitOnBlocks(t *testing.T) {
	for _, v := range []struct {
		block     uint32
		off, size int64
	}{{65536, 0, 5 << 30}, {65536, 65536 * 3, 2<<30 + 65536*3}, {1 << 20, 512, 4<<30 + 7}, {0, 0, 3 << 30}, {math.MaxUint32, 0, 6 << 30}} {
		synctest.Test(t, func(t *testing.T) {
			raw, p, _ := destination(t, nil)
			from := NewFromProtocol(1, keep(&discard{size: uint64(v.size)}), p)
			raw.mustSend(1, 1, devInfo(v.size, v.block))
			synctest.Wait()
			require.NoError(t, from.NeedAt(v.off, v.size-v.off))
			synctest.Wait()
			off := v.off
			for len(raw.got) > 0 {
				got := raw.next()
				require.Equal(t, le64(off), got.body[1:9])
				n := int64(int32(uint32(got.body[9]) | uint32(got.body[10])<<8 | uint32(got.body[11])<<16 | uint32(got.body[12])<<24))
				require.Positive(t, n)
				off += n
				if off < v.size && v.block > 0 && v.block < 1<<30 {
					require.Zero(t, off%int64(v.block), "cut on a block")
				}
			}
			require.Equal(t, v.size, off)
		})
	}
}

// A packet sent from inside the new-device callback does not dead-lock, on
// either side.
func TestNewDeviceCallbackMaySend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		needed := make(chan int64, 1)
		done := make(chan error, 1)
		src, _ := pair(t, func(p Protocol, dev uint32) {
			from := NewFromProtocol(dev, keep(sources.NewMemoryStorage(8192)), p)
			done <- from.NeedAt(4096, 4096)
		})
		to := NewToProtocol(8192, 1, src)
		to.HandleNeedAt(func(off, _ int64) { needed <- off })
		require.NoError(t, to.SendDevInfo("d", 4096, ""))
		require.NoError(t, <-done)
		require.Equal(t, int64(4096), <-needed)
		_, err := to.WriteAt(fill(4096, 1), 0)
		require.NoError(t, err)
	})
}

// The callback fires once a device, by the first packet sent or received.
func TestNewDeviceCallbackFiresOnceOnEitherSide(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		seen := make(chan uint32, 16)
		src, dst := pair(t, func(_ Protocol, dev uint32) { seen <- dev })
		for dev := range uint32(3) {
			to := NewToProtocol(4096, dev, src)
			require.NoError(t, to.SendDevInfo("d", 4096, ""))
			require.Error(t, to.SendDevInfo("d", 4096, ""), "DevInfo goes out once")
			NewFromProtocol(dev, keep(sources.NewMemoryStorage(4096)), dst)
			_, err := to.WriteAt(fill(4096, 1), 0)
			require.NoError(t, err)
			require.Equal(t, dev, <-seen)
		}
		require.Empty(t, seen)
	})
	synctest.Test(t, func(t *testing.T) {
		a, p, _ := source(t)
		seen := make(chan uint32, 16)
		p.newDevice = func(_ Protocol, dev uint32) { seen <- dev }
		to := NewToProtocol(4096, 7, p)
		synctest.Wait()
		require.Empty(t, seen, "nothing was sent yet")
		require.NoError(t, to.SendDevInfo("d", 4096, ""))
		require.Equal(t, uint32(7), <-seen)
		a.mustSend(7, 1, ranged(3, 0, 4096))
		synctest.Wait()
		require.Empty(t, seen)
	})
}

// An id belongs to one user on a connection.
func TestADeviceIDIsUsedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, dst := pair(t, nil)
		require.NoError(t, NewToProtocol(4096, 1, src).SendDevInfo("d", 4096, ""))
		again := NewToProtocol(4096, 1, src)
		require.Error(t, again.SendDevInfo("d", 4096, ""))
		_, err := again.WriteAt(fill(4096, 1), 0)
		require.Error(t, err)
		require.Error(t, again.RemoveDev())
		require.NoError(t, src.Err())

		NewFromProtocol(1, keep(sources.NewMemoryStorage(4096)), dst)
		synctest.Wait()
		require.NoError(t, dst.Err())
		second := NewFromProtocol(1, keep(sources.NewMemoryStorage(4096)), dst)
		require.ErrorContains(t, dst.Err(), "receiver already")
		require.Error(t, second.NeedAt(0, 4096))
		synctest.Wait()
	})
}

// Packets that come before anybody has taken the device wait for it.
func TestPacketsWaitForTheReceiver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, p, _ := destination(t, nil)
		store := sources.NewMemoryStorage(8192)
		raw.mustSend(1, 1, devInfo(8192, 4096))
		raw.mustSend(1, 2, writeAt(4096, fill(4096, 9)))
		raw.mustSend(1, 3, []byte{7, 0})
		synctest.Wait()
		require.Empty(t, raw.got)
		NewFromProtocol(1, keep(store), p)
		raw.expect(1, 2, written(4096))
		raw.expect(1, 3, []byte{0x85})
		require.Equal(t, fill(4096, 9), content(t, store)[4096:])
	})
}
