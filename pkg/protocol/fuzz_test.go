package protocol

import (
	"bytes"
	"context"
	"io"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// FuzzConnection feeds a connection any bytes, as source and as destination: it
// ends with an error, keeps no memory, and its store holds nothing that was not
// answered for.
func FuzzConnection(f *testing.F) {
	for _, version := range []string{"v0.1.5", "v0.2.21"} {
		v := vectors(f, version)
		f.Add(v["conversation.src_to_dst"])
		f.Add(v["conversation.dst_to_src"])
		f.Add(cat(frame(1, 1, devInfo(1<<20, 4096)), frame(1, 2, v["WriteAt.rle.mixed"]), frame(1, 3, v["WriteAt.gzip.mixed"])))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		p := NewProtocolRW(context.Background(), bytes.NewReader(in), io.Discard, nil, Options{Memory: 4 << 20})
		NewFromProtocol(1, keep(sources.NewMemoryStorage(1<<20)), p)
		to := NewToProtocol(1<<20, 2, p)
		to.HandleNeedAt(func(off, length int64) {
			if off < 0 || length <= 0 || off+length > 1<<20 {
				t.Errorf("NeedAt %d+%d", off, length)
			}
		})
		require.NoError(t, to.SendDevInfo("d", 4096, ""))
		require.NoError(t, to.StartWrite(PriorityBulk, make([]byte, 512), 0, ignored{}))
		if p.Handle() == nil {
			t.Error("Handle returned nil")
		}
		require.NoError(t, p.Close())
		require.Equal(t, int64(0), p.Stats().Received)
		require.Zero(t, p.Stats().Unanswered)
	})
}
