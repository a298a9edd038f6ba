package protocol

import (
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// A store that does not return keeps nobody from hearing that the connection has
// ended, and why: other devices want another one.
func TestAStoreThatStaysDoesNotHideTheEnd(t *testing.T) {
	for name, v := range map[string]struct {
		last  []byte // what the peer says last
		hangs bool   // up
		takes time.Duration
	}{
		"the peer says nonsense": {checkedFrame(1, 9, []byte{0x7a}), false, 0},
		"a packet is damaged":    {damaged(checkedFrame(1, 9, ranged(3, 0, 512))), false, 0},
		"the peer hangs up":      {nil, true, drainTime},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := newGate(4 * 512)
				a, b := net.Pipe()
				p := NewProtocolRW(t.Context(), b, b, func(p Protocol, dev uint32) { NewFromProtocol(dev, keep(store), p) })
				ended := handle(t, p)
				defer store.release()
				peer := newRawPeer(t, a)
				_, err := a.Write(frame(1, 1, checkedInfo(4*512, 512)))
				require.NoError(t, err)
				synctest.Wait()
				_ = peer.next()
				_, err = a.Write(checkedFrame(1, 2, writeAt(0, fill(512, 1))))
				require.NoError(t, err)
				<-time.After(time.Second)
				began := time.Now()
				if v.last != nil {
					_, _ = a.Write(v.last)
				}
				if v.hangs {
					_ = a.Close()
				}
				select {
				case <-p.Done():
				case <-time.After(time.Minute):
					t.Fatal("the connection has not ended")
				}
				require.InDelta(t, v.takes, time.Since(began), float64(100*time.Millisecond))
				select {
				case err := <-ended:
					require.Error(t, err)
				case <-time.After(time.Minute):
					t.Fatal("Handle has not returned")
				}
				_ = a.Close()
			})
		})
	}
}

func damaged(b []byte) []byte { b[len(b)-1] ^= 1; return b }
