package migrate

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// returningSource sends one disk as Silo's own source does.
type returningSource struct {
	*rawPeer
	block int
	taken chan byte // the command of each answer
}

// announce begins a disk of blocks blocks of 4 KiB.
func (s *returningSource) announce(t *testing.T, blocks int) {
	s.block, s.taken = 4096, make(chan byte, 1000)
	_, err := s.request(0, &wire.DevInfo{Size: uint64(blocks * s.block), BlockSize: uint32(s.block), Name: "plain"})
	require.NoError(t, err)
}

// readLoop takes answers and claims until the connection ends.
func (s *returningSource) readLoop(claimed func(from, to int)) {
	for {
		_, packet, err := s.read()
		if err != nil {
			close(s.taken)
			return
		}
		if wire.Command(packet[0]) == wire.CommandDontNeedAt {
			off, n := int(binary.LittleEndian.Uint64(packet[1:])), int(binary.LittleEndian.Uint32(packet[9:]))
			claimed(off/s.block, (off+n)/s.block)
			continue
		}
		s.taken <- packet[0]
	}
}

func (s *returningSource) write(t *testing.T, data []byte, b int) {
	_, err := s.request(0, &wire.WriteAt{Off: int64(b * s.block), Data: data[b*s.block : (b+1)*s.block]})
	require.NoError(t, err)
	require.Equal(t, byte(wire.CommandWriteAtResponse), <-s.taken)
}

// TestAPlainSourceThatComesBackSendsAllAgainButWhatWasWrittenHere: it knows no
// handoff and no identity, so that it may have written any block since, or be another
// disk (faults A7 and S1, trap I12).
func TestAPlainSourceThatComesBackSendsAllAgainButWhatWasWrittenHere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const blocks = 64
		_, data := testDisk(t, blocks*4096, 9)
		conns := make(chan io.ReadWriteCloser)
		dst := newDestination(t, DestinationOptions{Disks: 1, Listening: true}, memory)
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		done := make(chan error, 1)
		go func() { done <- dst.Run(ctx, from(conns)) }()

		connect := func(claimed func(from, to int)) (*returningSource, net.Conn) {
			a, b := net.Pipe()
			conns <- b
			s := &returningSource{rawPeer: newRawPeer(a)}
			s.announce(t, blocks)
			go s.readLoop(claimed)
			return s, a
		}
		first, conn := connect(func(int, int) {})
		for b := range 32 {
			first.write(t, data, b)
		}
		dev := <-dst.ready
		here := bytes.Repeat([]byte{0xCC}, 2*4096)
		_, err := dev.WriteAt(here, 20*4096)
		require.NoError(t, err)
		conn.Close()
		synctest.Wait()
		for b := 8; b < 16; b++ { // the machine at the source writes on
			copy(data[b*4096:], bytes.Repeat([]byte{0xEE}, 4096))
		}
		var claims [][2]int
		second, conn := connect(func(from, to int) { claims = append(claims, [2]int{from, to}) })
		synctest.Wait()
		require.Equal(t, [][2]int{{20, 22}}, claims)
		for b := range blocks {
			if b != 20 && b != 21 {
				second.write(t, data, b)
			}
		}
		copy(data[20*4096:], here)
		for _, ev := range []wire.EventType{wire.EventPreLock, wire.EventPostLock, wire.EventCompleted} {
			_, err = second.request(0, &wire.Event{Type: ev})
			require.NoError(t, err)
			require.Equal(t, byte(wire.CommandEventResponse), <-second.taken)
		}
		conn.Close()
		require.NoError(t, <-done)
		require.True(t, bytes.Equal(data, contents(t, dst.disks["plain"])))
		require.NoError(t, dst.Close())
	})
}
