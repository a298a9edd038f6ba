package link

import (
	"bytes"
	"io"
	"math/bits"
	"net"
	"testing"

	"github.com/stretchr/testify/require"
)

// send writes n zeroes and returns what arrives.
func send(t *testing.T, from, to net.Conn, n int) []byte {
	t.Helper()
	go func() { _, _ = from.Write(make([]byte, n)) }() // a failure shows as missing bytes
	got := make([]byte, n)
	_, err := io.ReadFull(to, got)
	require.NoError(t, err)
	return got
}

// changed returns the places that are not zero, of which each has one bit.
func changed(t *testing.T, b []byte) (at []int) {
	t.Helper()
	for i, v := range b {
		if v != 0 {
			require.Equal(t, 1, bits.OnesCount8(v))
			at = append(at, i)
		}
	}
	return at
}

func TestCorruptAtChangesOneBitAtEachPlace(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		l, conns := start(t, network, Options{})
		client := dial(t, l)
		server := <-conns
		l.CorruptAt(ToTarget, 300_000)
		l.CorruptAt(ToTarget, 0)
		l.CorruptAt(ToTarget, 99)
		l.CorruptAt(FromTarget, 7)
		require.Equal(t, []int{0, 99}, changed(t, send(t, client, server, 200_000)))
		require.Equal(t, []int{7}, changed(t, send(t, server, client, 100)))
		again := dial(t, l) // the count goes on over connections
		require.Equal(t, []int{100_000}, changed(t, send(t, again, <-conns, 200_000)))
		require.Empty(t, changed(t, send(t, client, server, 100_000)))
		to, from := l.Corrupted()
		require.EqualValues(t, 3, to)
		require.EqualValues(t, 1, from)
	})
}

func TestCorruptEveryChangesAsManyAsItSaysUntilItIsStopped(t *testing.T) {
	l, conns := start(t, "unix", Options{})
	client := dial(t, l)
	server := <-conns
	l.CorruptEvery(ToTarget, 1000)
	at := changed(t, send(t, client, server, 1_000_000))
	require.Greater(t, len(at), 800)
	require.Less(t, len(at), 1200)
	require.Empty(t, changed(t, send(t, server, client, 100_000)), "the other way is as it was")
	l.CorruptEvery(ToTarget, 0)
	require.Empty(t, changed(t, send(t, client, server, 100_000)))
	to, from := l.Corrupted()
	require.EqualValues(t, len(at), to)
	require.Zero(t, from)
	l.CorruptEvery(FromTarget, 1)
	got := send(t, server, client, 1000)
	require.Greater(t, len(changed(t, got)), 300)
	require.False(t, bytes.Equal(got, make([]byte, 1000)))
}
