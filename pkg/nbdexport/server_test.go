package nbdexport

import (
	"bytes"
	"context"
	"net"
	"sync"
	"testing"

	"github.com/pojntfx/go-nbd/pkg/backend"
	"github.com/stretchr/testify/require"
)

// memory is a plain backend: it can do nothing but what go-nbd asks for.
type memory struct {
	mu    sync.RWMutex
	b     []byte
	syncs int
}

var _ backend.Backend = (*memory)(nil)

func newMemory(size int) *memory { return &memory{b: make([]byte, size)} }

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return copy(p, m.b[off:]), nil
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.b[off:], p), nil
}

func (m *memory) Size() (int64, error) { return int64(len(m.b)), nil }

func (m *memory) Sync() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.syncs++
	return nil
}

func TestPlainBackendIsServedUnchanged(t *testing.T) {
	for _, mode := range []replyMode{modeSimple, modeStructured, modeExtended} {
		m := newMemory(1 << 20)
		_, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: m})
		c := dialRaw(t, path).enter("disk", mode)
		require.Equal(t, uint64(1<<20), c.size)
		want := flagHasFlags | flagSendFlush | flagSendFUA | flagCanMultiConn
		if mode >= modeStructured {
			want |= flagSendDF
		}
		require.Equal(t, want, c.flags)

		data := bytes.Repeat([]byte("silo"), 5000)
		c.write(12345, data)
		got, err := c.read(0, 12345, uint64(len(data)))
		require.Equal(t, ok, err)
		require.Equal(t, data, got)
		require.Equal(t, ok, c.do(cmdFlush, 0, 0, 0))
		require.Equal(t, 1, m.syncs)
	}
}

func TestShutdownFlushesAndEnds(t *testing.T) {
	m := newMemory(1 << 20)
	s, path := newTestServer(t, Options{}, Export{Name: "disk", Backend: m})
	c := dialRaw(t, path).enter("disk", modeSimple)
	c.write(0, []byte("kept"))
	require.NoError(t, s.Shutdown(context.Background()))
	require.Equal(t, 1, m.syncs)
	c.wantEnd()
}

// Clients that never finish their handshake, however many, keep out nobody who does
// (trap R3).
func TestIdleHandshakesKeepNoClientOut(t *testing.T) {
	_, path := newTestServer(t, Options{MaxConnections: 4}, Export{Backend: newMemory(mib)})
	for range 40 {
		nc, err := net.Dial("unix", path)
		require.NoError(t, err)
		defer nc.Close()
	}
	c := dialRaw(t, path).enter("", modeSimple)
	_, err := c.read(0, 0, 512)
	require.Equal(t, ok, err)
}
