package attach

import (
	"context"
	"encoding/binary"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/pojntfx/go-nbd/pkg/backend"
	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
	"github.com/silo-nbd/silo-nbd/pkg/nbdexport"
)

// serve serves a disk over a unix socket.
func serve(t *testing.T, disk backend.Backend) nbdclient.Target {
	t.Helper()
	dir, err := os.MkdirTemp("", "attach") // short enough for a socket
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	ln, err := net.Listen("unix", filepath.Join(dir, "n"))
	require.NoError(t, err)
	s := nbdexport.NewServer(nbdexport.Options{})
	require.NoError(t, s.AddExport(nbdexport.Export{Name: "vm", Backend: disk}))
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ln) }()
	t.Cleanup(func() {
		require.NoError(t, s.Close())
		<-ended
	})
	return nbdclient.Target{Network: "unix", Address: filepath.Join(dir, "n"), Export: "vm"}
}

// blockOf is the block size that the kernel is told.
type blockOf struct {
	*machine
	block uint64
}

func (m *blockOf) do(cmd uint8, a attrs) ([]byte, error) {
	if v, ok := attr(a, attrBlockSize); ok {
		m.block = binary.NativeEndian.Uint64(v)
	}
	return m.machine.do(cmd, a)
}

// TestBlocksAreThoseOfThePartitionTable: a GPT of 4096-byte sectors means something
// else on a device of 512-byte ones (fault H7).
func TestBlocksAreThoseOfThePartitionTable(t *testing.T) {
	table := func(at ...int) []byte {
		disk := make([]byte, 1<<20+512)
		for _, a := range at {
			copy(disk[a:], "EFI PART")
		}
		return disk
	}
	for name, c := range map[string]struct {
		disk  []byte
		asked int
		block uint64
		cut   int64
	}{
		"none":               {table(), 0, 512, 0},
		"512":                {table(512), 0, 512, 0},
		"4096":               {table(4096), 0, 4096, 512},
		"both":               {table(512, 4096), 0, 512, 0},
		"asked for":          {table(512), 4096, 4096, 512},
		"asked for too":      {table(4096), 512, 512, 0},
		"a very small disk":  {table()[:4096], 0, 512, 0},
		"between the two":    {table(2048), 0, 2048, 512},
		"not where one lies": {table(8191 - 8), 0, 512, 0},
	} {
		m := &blockOf{machine: newMachine(t)}
		to := serve(t, backend.NewMemoryBackend(c.disk))
		a := &attacher{host: m.host, kernel: m, opts: Options{Device: Auto, BlockSize: c.asked}, backend: to.String()}
		r, err := a.attach(t.Context(), to)
		require.NoError(t, err, name)
		require.Equal(t, c.block, m.block, name)
		require.Equal(t, c.cut, r.Cut, name)
		require.False(t, r.Unread)
	}
	require.ErrorContains(t, Options{BlockSize: 1000}.Check(), "--block-size: 1000 is not a block size")
	require.ErrorContains(t, Options{BlockSize: 8192}.Check(), "--block-size: 8192 is not a block size")
}

// stuck is a disk whose reads wait, as those of a destination that waits for its source.
type stuck struct{ backend.Backend }

func (stuck) ReadAtContext(ctx context.Context, _ []byte, _ int64) (int, error) {
	<-ctx.Done()
	return 0, context.Cause(ctx)
}

// TestAnExportThatDoesNotAnswerIsAttachedAllTheSame (fault H7).
func TestAnExportThatDoesNotAnswerIsAttachedAllTheSame(t *testing.T) {
	before := tableTime
	tableTime = 20 * time.Millisecond
	t.Cleanup(func() { tableTime = before })
	to := serve(t, stuck{backend.NewMemoryBackend(make([]byte, 1<<20))})
	m := newMachine(t)
	r, err := m.attach(to, Options{Device: Auto})
	require.NoError(t, err)
	require.True(t, r.Unread)
	require.Equal(t, []string{"connect -1"}, m.sent)

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = (&attacher{host: m.host, kernel: m, opts: Options{Device: Auto}, backend: "x"}).attach(ctx, to)
	require.ErrorIs(t, err, context.Canceled)
}

// TestADeviceInUseKeepsItsBlocks: new connections do not change them (fault H7).
func TestADeviceInUseKeepsItsBlocks(t *testing.T) {
	to := serve(t, backend.NewMemoryBackend(make([]byte, 1<<20+512)))
	m := newMachine(t)
	m.device(0, to.String(), 1<<20)
	m.write("block/nbd0/queue/logical_block_size", "4096\n")
	m.busy[0] = true
	m.write("proc/self/mountinfo", "36 35 43:0 / /mnt rw - ext4 /dev/nbd0 rw\n")
	r, err := m.attach(to, Options{Device: 0})
	require.NoError(t, err)
	require.True(t, r.Renewed)
	require.Equal(t, int64(512), r.Cut)
}
