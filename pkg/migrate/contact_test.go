package migrate

import (
	"encoding/hex"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// addressed is a connection with an address.
type addressed struct {
	net.Conn
	at net.TCPAddr
}

func (a *addressed) RemoteAddr() net.Addr { return &a.at }

// TestAHandoffGoesToTheDestinationThatIsMeant: after two have connected, it does not go
// to the one that happens to be there, neither when asked for nor by itself (fault A4).
func TestAHandoffGoesToTheDestinationThatIsMeant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _ := testDisk(t, 64<<10, 1)
		w := newWires()
		port := 1000
		w.wrap = func(c net.Conn) io.ReadWriteCloser {
			port++
			return &addressed{c, net.TCPAddr{IP: net.IPv4(10, 0, 0, 7), Port: port}}
		}
		m := startMoveOver(t, w, SourceOptions{}, SourceDisk{Name: "disk", Live: newTracker(t, store), Identity: testID})
		require.ErrorIs(t, m.src.Handoff(m.ctx), ErrNotConnected)
		meant, other := newHost(t), newHost(t)
		meant.start(m.ctx, from(w.dst))
		m.settled()
		device := meant.dst.all()[0].device
		st := m.src.Status()[0]
		require.Equal(t, device, st.Device)
		require.Equal(t, "10.0.0.7:1001", st.Address)
		meant.end()
		synctest.Wait()
		require.Zero(t, m.src.Status()[0].Device)

		m.src.hand.auto = true
		other.start(m.ctx, from(w.dst))
		<-time.After(time.Hour)
		require.False(t, m.src.HandedOff())
		require.Equal(t, 1, m.log.count("there is no handoff by itself"))
		err := m.src.Handoff(m.ctx)
		require.ErrorIs(t, err, ErrOtherDestination)
		name := hex.EncodeToString(device[:])
		require.ErrorContains(t, err, "device "+name+" at 10.0.0.7:1001")
		require.ErrorContains(t, err, "(connected)")
		require.ErrorIs(t, m.src.HandoffTo(m.ctx, name), ErrOtherDestination)
		require.ErrorIs(t, m.src.HandoffTo(m.ctx, "10.0.0.8"), ErrOtherDestination)
		require.False(t, m.src.HandedOff())
		other.end()

		meant.start(m.ctx, from(w.dst))
		m.settled()
		require.NoError(t, m.src.HandoffTo(m.ctx, name[:8]))
		require.NoError(t, <-m.done)
		require.NoError(t, <-meant.done)
		meant.close()
		m.end()
	})
}

func TestADestinationIsNamedByItsDeviceOrItsAddress(t *testing.T) {
	c := contact{devices: []Device{{0x12, 0x34, 0x56, 0x78, 0x9a}, {0xab, 0xcd, 0xef, 0x01}}, at: "[fe80::1]:99"}
	for _, name := range []string{"12345678", "123456789A000000", "12345678-9a00-0000", "abcdef0100", "[fe80::1]:99", "fe80::1"} {
		require.True(t, c.is(name), name)
	}
	for _, name := range []string{"", "1234567", "12345679", "fe80::2", "99", ":99"} {
		require.False(t, c.is(name), name)
	}
	require.False(t, contact{devices: []Device{unnamed}}.is("ffffffff"))
	require.False(t, contact{devices: []Device{unnamed}}.is(""))
}
