package protocol

import (
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// The smallest conversation, seen from a raw destination: what our source says.
func TestMinimalConversationOfOurSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, p, _ := source(t)
		to := NewToProtocol(1024, 3, p)
		done := make(chan error, 1)
		go func() {
			if err := to.SendDevInfo("d", 1024, ""); err != nil {
				done <- err
				return
			}
			if _, err := to.WriteAt(fill(1024, 0xab), 0); err != nil {
				done <- err
				return
			}
			done <- to.SendEvent(t.Context(), &wire.Event{Type: wire.EventCompleted})
		}()
		raw.expect(3, 1, devInfo(1024, 1024))
		raw.expect(3, 2, writeAt(0, fill(1024, 0xab)))
		raw.mustSend(3, 2, written(1024))
		raw.expect(3, 3, []byte{7, 4})
		synctest.Wait()
		require.Empty(t, done, "the event has not been answered")
		raw.mustSend(3, 3, []byte{0x85})
		require.NoError(t, <-done)
	})
}

// The same, seen from a raw source: what our destination answers.
func TestMinimalConversationOfOurDestination(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := sources.NewMemoryStorage(1024)
		raw, _, _ := destination(t, store)
		raw.mustSend(0, 1, devInfo(1024, 1024))
		raw.mustSend(0, 2, writeAt(0, fill(1024, 0xab)))
		raw.expect(0, 2, written(1024))
		require.Equal(t, fill(1024, 0xab), content(t, store))
		raw.mustSend(0, 3, []byte{7, 4})
		raw.expect(0, 3, []byte{0x85})
		synctest.Wait()
		require.Empty(t, raw.got, "nothing else is said to a plain peer")
	})
}

// The longer one: the block that is asked for overtakes.
func TestMoreComplexConversationOfOurSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, p, _ := source(t)
		to := NewToProtocol(4096, 3, p)
		blocks := map[int64]byte{0: 1, 1024: 2, 2048: 3, 3072: 4}
		needed := make(chan int64, 1)
		to.HandleNeedAt(func(off, length int64) {
			if length == 1024 {
				needed <- off
			}
		})
		done := make(chan error, 1)
		go func() {
			done <- func() error {
				if err := to.SendDevInfo("d", 1024, ""); err != nil {
					return err
				}
				if _, err := to.WriteAt(fill(1024, blocks[0]), 0); err != nil {
					return err
				}
				off := <-needed
				if _, err := to.WriteAt(fill(1024, blocks[off]), off); err != nil {
					return err
				}
				a, b := newCompletion(), newCompletion()
				if err := to.StartWrite(PriorityBulk, fill(1024, blocks[1024]), 1024, a); err != nil {
					return err
				}
				if err := to.StartWrite(PriorityBulk, fill(1024, blocks[3072]), 3072, b); err != nil {
					return err
				}
				if err := <-a; err != nil {
					return err
				}
				if err := <-b; err != nil {
					return err
				}
				return to.SendEvent(t.Context(), &wire.Event{Type: wire.EventCompleted})
			}()
		}()
		raw.expect(3, 1, devInfo(4096, 1024))
		raw.expect(3, 2, writeAt(0, fill(1024, 1)))
		raw.mustSend(3, 1, ranged(3, 2048, 1024)) // NeedAt, under the destination's own counter
		raw.mustSend(3, 2, written(1024))
		raw.expect(3, 3, writeAt(2048, fill(1024, 3)))
		raw.mustSend(3, 3, written(1024))
		raw.expect(3, 4, writeAt(1024, fill(1024, 2)))
		raw.expect(3, 5, writeAt(3072, fill(1024, 4)))
		raw.mustSend(3, 5, written(1024)) // answers come in any order
		raw.mustSend(3, 4, written(1024))
		raw.expect(3, 6, []byte{7, 4})
		raw.mustSend(3, 6, []byte{0x85})
		require.NoError(t, <-done)
	})
}

func TestMoreComplexConversationOfOurDestination(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := sources.NewMemoryStorage(4096)
		raw, p, _ := destination(t, nil)
		raw.mustSend(1, 1, devInfo(4096, 1024))
		from := NewFromProtocol(1, keep(store), p)
		raw.mustSend(1, 2, writeAt(0, fill(1024, 1)))
		raw.expect(1, 2, written(1024))
		require.NoError(t, from.NeedAt(2048, 1024))
		raw.expect(1, 1, ranged(3, 2048, 1024))
		raw.mustSend(1, 3, writeAt(2048, fill(1024, 3)))
		raw.expect(1, 3, written(1024))
		raw.mustSend(1, 4, writeAt(1024, fill(1024, 2)))
		raw.mustSend(1, 5, writeAt(3072, fill(1024, 4)))
		ids := []uint32{raw.next().id, raw.next().id}
		require.ElementsMatch(t, []uint32{4, 5}, ids)
		raw.mustSend(1, 6, []byte{7, 4})
		raw.expect(1, 6, []byte{0x85})
		require.Equal(t, cat(fill(1024, 1), fill(1024, 2), fill(1024, 3), fill(1024, 4)), content(t, store))
	})
}

// What a real Silo source sent is answered as Silo's destination answered it.
func TestRecordedSiloSourceIsAnswered(t *testing.T) {
	for _, version := range []string{"v0.1.5", "v0.2.21"} {
		synctest.Test(t, func(t *testing.T) {
			v := vectors(t, version)
			store := sources.NewMemoryStorage(1024)
			raw, _, _ := destination(t, store)
			want := make(map[uint32]packet)
			for _, p := range frames(t, v["conversation.dst_to_src"]) {
				if p.body[0] >= 0x80 {
					want[p.id] = p
				}
			}
			answered := 0
			for _, p := range frames(t, v["conversation.src_to_dst"]) {
				if p.body[0] == 1 { // ReadAt of what was written: the source waits for the writes
					for ; answered < len(want)-1; answered++ {
						got := raw.next()
						require.Equal(t, want[got.id], got)
					}
				}
				raw.mustSend(p.dev, p.id, p.body)
			}
			got := raw.next()
			require.Equal(t, want[got.id], got, "the answer to ReadAt")
			require.Equal(t, fill(16, 0x11), content(t, store)[:16])
			require.Equal(t, fill(16, 0x22), content(t, store)[512:528])
		})
	}
}

// What a real Silo source sent is what ours sends, byte for byte, and the
// recorded answers of Silo's destination satisfy it.
func TestRecordedSiloDestinationIsUnderstood(t *testing.T) {
	for _, version := range []string{"v0.1.5", "v0.2.21"} {
		synctest.Test(t, func(t *testing.T) {
			v := vectors(t, version)
			raw, p, _ := source(t)
			to := NewToProtocol(1024, 1, p)
			var need, dontNeed [2]int64
			to.HandleNeedAt(func(off, length int64) { need = [2]int64{off, length} })
			to.HandleDontNeedAt(func(off, length int64) { dontNeed = [2]int64{off, length} })
			sent := frames(t, v["conversation.src_to_dst"])
			var hashes wire.Hashes
			require.NoError(t, hashes.UnmarshalBinary(sent[3].body))
			read := make([]byte, 4)
			a, b := newCompletion(), newCompletion()
			steps := []func() error{
				func() error { return to.SendDevInfo("test", 512, "x") },
				func() error { return to.StartWrite(PriorityBulk, fill(16, 0x11), 0, a) },
				func() error { return to.StartWrite(PriorityUrgent, fill(16, 0x22), 512, b) },
				func() error { return to.SendHashes(t.Context(), hashes.Hashes) },
				func() error { return to.SendDirtyList(t.Context(), 512, []uint32{1}) },
			}
			for e := wire.EventPreLock; e <= wire.EventCompleted; e++ {
				steps = append(steps, func() error { return to.SendEvent(t.Context(), &wire.Event{Type: e}) })
			}
			steps = append(steps, func() error { _, err := to.ReadAt(read, 0); return err })
			answers := frames(t, v["conversation.dst_to_src"])
			done := make(chan error, len(steps))
			for i, step := range steps {
				go func() { done <- step() }()
				raw.expect(sent[i].dev, sent[i].id, sent[i].body)
				for _, p := range answers {
					if p.id == sent[i].id && p.body[0] >= 0x80 {
						raw.mustSend(p.dev, p.id, p.body)
					}
				}
				require.NoError(t, <-done)
			}
			for _, p := range answers {
				if p.body[0] < 0x80 {
					raw.mustSend(p.dev, p.id, p.body)
				}
			}
			require.NoError(t, <-a)
			require.NoError(t, <-b)
			require.Equal(t, fill(4, 0x11), read)
			synctest.Wait()
			require.Equal(t, [2]int64{512, 512}, need)
			require.Equal(t, [2]int64{0, 512}, dontNeed)
		})
	}
}
