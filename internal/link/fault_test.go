package link

import (
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestFaultsHappenAtTheirByte(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		l, conns := start(t, network, Options{})
		client := dial(t, l)
		server := <-conns
		for _, after := range []int64{1000, 0, 70_001} {
			l.After(ToTarget, after, l.Cut)
			from := client
			go func() { _, _ = from.Write(make([]byte, 100<<10)) }() // cut in the middle
			n, _ := io.Copy(io.Discard, server)                      // the error is the cut
			if network == "unix" {
				require.Equal(t, after, n)
			} else {
				require.LessOrEqual(t, n, after, "a reset throws away what was not read")
			}
			client = dial(t, l)
			server = <-conns
		}
		exchange(t, client, server, "nothing more is planned")
		exchange(t, server, client, "and nothing was the other way")
	})
}

func TestFaultsOfOneWayHappenInTheirOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPipes(t, Options{})
		client, target := p.connect()
		var mu sync.Mutex
		var order []int
		for _, at := range []int{30, 10, 20, 10} {
			p.After(FromTarget, int64(at), func() {
				mu.Lock()
				defer mu.Unlock()
				order = append(order, at)
				time.Sleep(time.Second) // the flow is held up meanwhile
			})
		}
		began := time.Now()
		p.wg.Go(func() { _, _ = target.Write(make([]byte, 40)) }) // a failure shows as missing bytes
		_, err := io.ReadFull(client, make([]byte, 40))
		require.NoError(t, err)
		require.Equal(t, 4*time.Second, time.Since(began))
		require.Equal(t, []int{10, 10, 20, 30}, order)
	})
}
