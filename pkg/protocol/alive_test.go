package protocol

import (
	"context"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/internal/faultdev"
	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// revision2 is an extension of nothing but its revision.
var revision2 = []byte{1, 0, 4, 0, 2, 0, 0, 0}

// extended announces a device on a connection to another of ours.
func extended(t testing.TB, p Protocol, size uint64) *ToProtocol {
	t.Helper()
	to := NewToProtocol(size, 1, p)
	require.NoError(t, to.SendDevInfoExt(&DevInfo{BlockSize: 4096, Name: "d", Extension: &wire.Extension{Revision: wire.Revision}}))
	return to
}

// stalling is a connection on which nothing arrives any more once it is shut, and
// nobody hears of it.
type stalling struct {
	net.Conn
	shut chan struct{}
}

func (s *stalling) Write(p []byte) (int, error) {
	select {
	case <-s.shut:
		return len(p), nil
	default:
		return s.Conn.Write(p)
	}
}

// TestSilentNetworkIsNoticedAtBothEnds is trap W3: no end of the stream comes, and
// nobody sends anything.
func TestSilentNetworkIsNoticedAtBothEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		shut := make(chan struct{})
		src := NewProtocolRW(t.Context(), &stalling{a, shut}, &stalling{a, shut}, nil)
		dst := NewProtocolRW(t.Context(), &stalling{b, shut}, &stalling{b, shut}, func(p Protocol, dev uint32) {
			NewFromProtocol(dev, keep(sources.NewMemoryStorage(4096)), p)
		})
		srcEnded, dstEnded := handle(t, src), handle(t, dst)
		<-extended(t, src, 4096).PeerKnown()
		<-time.After(24 * time.Hour) // idle, and nobody is missed
		require.NoError(t, src.Err())
		require.NoError(t, dst.Err())
		close(shut)
		began := time.Now()
		first, second := srcEnded, dstEnded
		for range 2 {
			select {
			case err := <-first:
				require.True(t, isSilent(err), "%v", err)
				first = nil
			case err := <-second:
				require.True(t, isSilent(err), "%v", err)
				second = nil
			}
			require.LessOrEqual(t, time.Since(began), 15*time.Second)
		}
	})
}

// isSilent says that a connection ended for silence, here or at the other end.
func isSilent(err error) bool {
	return strings.Contains(err.Error(), ErrSilent.Error()) || strings.Contains(err.Error(), io.EOF.Error())
}

// A packet that takes long to come is no silence: each byte counts.
func TestSlowPeerIsNotTakenForASilentOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, p, ended := destination(t, sources.NewMemoryStorage(1<<20))
		raw.mustSend(1, 1, cat(devInfo(1<<20, 4096), revision2))
		require.Equal(t, byte(0xfd), raw.next().body[0])
		for _, b := range frame(1, 2, writeAt(0, fill(100, 1))) {
			<-time.After(10 * time.Second)
			_, err := raw.conn.Write([]byte{b})
			require.NoError(t, err)
		}
		require.NoError(t, p.Err())
		began := time.Now()
		require.ErrorIs(t, <-ended, ErrSilent)
		require.Equal(t, silentAfter, time.Since(began))
	})
}

// While we wait for our own disk and have no memory for more, we do not listen,
// and it is not the peer who is silent.
func TestStalledStorageIsNotASilentPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newGate(64 << 20)
		src, dst := pair(t, func(p Protocol, dev uint32) { NewFromProtocol(dev, keep(store), p) }, Options{Memory: minMemory})
		to := extended(t, src, 64<<20)
		<-to.PeerKnown()
		answers := make(chan error, 16)
		for i := range int64(16) {
			go func() {
				_, err := to.WriteAt(fill(1<<20, 7), i<<20) // urgent: the window does not hold it
				answers <- err
			}()
		}
		<-time.After(10 * time.Minute)
		require.NoError(t, src.Err())
		require.NoError(t, dst.Err())
		store.release()
		for range 16 {
			require.NoError(t, <-answers)
		}
	})
}

// A peer of the first revision, and a plain one, hears nothing that it does not
// know, and is not missed.
func TestOlderPeersHearNothingNew(t *testing.T) {
	for name, ext := range map[string][]byte{"plain": nil, "revision 1": {1, 0, 4, 0, 1, 0, 0, 0}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := faultdev.New(sources.NewMemoryStorage(8192), func(faultdev.Op) error { return noRoom{} })
				raw, p, _ := destination(t, store)
				raw.mustSend(1, 1, cat(devInfo(8192, 4096), ext))
				if ext != nil {
					require.Equal(t, byte(0xfd), raw.next().body[0])
				}
				<-time.After(time.Hour)
				synctest.Wait()
				require.Empty(t, raw.got)
				raw.mustSend(1, 2, writeAt(0, fill(4096, 1)))
				raw.expect(1, 2, []byte{0x84})
				require.NoError(t, p.Err())
			})
		})
	}
}

type noRoom struct{}

func (noRoom) Error() string        { return "full" }
func (noRoom) Is(target error) bool { return target == ErrNoRoom || target == syscall.ENOSPC }

func TestRefusalForWantOfRoomIsTold(t *testing.T) {
	full := true
	store := faultdev.New(sources.NewMemoryStorage(8192), func(faultdev.Op) error {
		if full {
			return noRoom{}
		}
		return nil
	})
	src, _ := pair(t, func(p Protocol, dev uint32) { NewFromProtocol(dev, keep(store), p) })
	to := extended(t, src, 8192)
	<-to.PeerKnown()
	_, err := to.WriteAt(fill(4096, 1), 4096)
	require.ErrorIs(t, err, ErrNoRoom)
	require.ErrorContains(t, err, "no room to write 4096 bytes at 4096")
	require.ErrorIs(t, to.ZeroAt(0, 8192, false), ErrNoRoom)
	full = false
	_, err = to.WriteAt(fill(4096, 1), 4096)
	require.NoError(t, err)
}

func TestPeerIsToldWhyItsDeviceIsRefused(t *testing.T) {
	refuse := func(p Protocol, dev uint32) {
		made := make(chan struct{})
		var from *FromProtocol
		from = NewFromProtocol(dev, func(*DevInfo) storage.StorageProvider {
			<-made
			from.Refuse("another\ndisk \x1b[31m" + strings.Repeat("é", 600))
			return nil
		}, p)
		close(made)
	}
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		src := NewProtocolRW(context.Background(), a, a, nil)
		dst := NewProtocolRW(context.Background(), b, b, refuse)
		ended := handle(t, dst)
		handle(t, src)
		began := time.Now()
		to := extended(t, src, 1<<20)
		for off := int64(0); ; off = (off + 4096) % (1 << 20) { // as a source that does not wait
			if err := to.StartWrite(PriorityUrgent, fill(4096, 1), off, ignored{}); err != nil {
				break
			}
		}
		var refused *RefusedError
		require.ErrorAs(t, src.Err(), &refused)
		require.True(t, strings.HasPrefix(refused.Reason, "another disk  [31mé"), refused.Reason)
		require.LessOrEqual(t, len(refused.Reason), wire.MaxRefused)
		<-ended
		require.Less(t, time.Since(began), refusalTime)
	})
	synctest.Test(t, func(t *testing.T) { // one that does not know the word loses the connection all the same
		a, b := net.Pipe()
		dst := NewProtocolRW(context.Background(), b, b, refuse)
		ended := handle(t, dst)
		raw := newRawPeer(t, a)
		raw.mustSend(1, 1, cat(devInfo(8192, 4096), revision2))
		require.Equal(t, []byte{0xfd, 1, 0, 4, 0, wire.Revision, 0, 0, 0, 6, 0}, raw.next().body[:11])
		raw.mustSend(1, 2, writeAt(0, fill(4096, 1)))
		require.ErrorIs(t, <-ended, ErrRefused)
		require.NoError(t, dst.Close())
		require.Zero(t, dst.Stats().Received)
		_ = a.Close()
	})
}
