//go:build !race

// The race detector makes a pool forget some of what it is given.

package quick

import (
	"io"
	"net"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestUseAllocatesNothing(t *testing.T) {
	pairs(t, func(t *testing.T, c *Conn, peer net.Conn) {
		b, got, v := make([]byte, 4096), make([]byte, 3*4096), make(net.Buffers, 2)
		require.Zero(t, testing.AllocsPerRun(100, func() {
			v = append(v[:0], b, b)
			all := v
			_, err1 := c.Write(b)
			_, err2 := c.WriteBuffers(&v)
			_, err3 := io.ReadFull(peer, got)
			_, err4 := peer.Write(b)
			_, err5 := io.ReadFull(c, b)
			v = all
			for _, err := range []error{err1, err2, err3, err4, err5} {
				if err != nil {
					t.Error(err)
				}
			}
		}))
	})
}
