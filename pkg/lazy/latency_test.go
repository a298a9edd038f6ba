package lazy

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

func TestLatencyIsCountedWhereItBelongs(t *testing.T) {
	var h histogram
	for i, bound := range LatencyBounds {
		h.observe(bound)     // no longer than it
		h.observe(bound + 1) // longer
		l := h.latency()
		require.EqualValues(t, 2*i+2, l.Count())
		require.EqualValues(t, 1, l.Counts[i+1])
	}
	l := h.latency()
	require.EqualValues(t, 1, l.Counts[0])
	require.EqualValues(t, 2, l.Counts[1])
	require.Zero(t, testing.AllocsPerRun(100, func() { h.observe(time.Second) }))
	require.Equal(t, l.Sum+101*time.Second, h.latency().Sum)
}

// TestStatsTellHowLongReadsAndFlushesTook: what was here did not wait and does
// not count.
func TestStatsTellHowLongReadsAndFlushesTook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev, err := New(sources.NewMemoryStorage(1<<20), Options{BlockSize: 4096})
		require.NoError(t, err)
		require.NoError(t, dev.GoLive())
		stream := dev.Attach(silent{})
		read := make(chan error, 1)
		go func() {
			_, err := dev.ReadAt(make([]byte, 512), 0)
			read <- err
		}()
		pass(40 * time.Millisecond)
		_, err = stream.WriteAt(make([]byte, 4096), 0)
		require.NoError(t, err)
		require.NoError(t, <-read)
		_, err = dev.ReadAt(make([]byte, 512), 0)
		require.NoError(t, err)
		require.NoError(t, dev.Sync())
		st := dev.Stats()
		require.EqualValues(t, 1, st.DemandReads.Count())
		require.Equal(t, 40*time.Millisecond, st.DemandReads.Sum)
		require.EqualValues(t, 1, st.Flushes.Count())
		require.NoError(t, stream.Close())
		require.NoError(t, dev.Close())
	})
}

// silent is a source that is asked and says nothing.
type silent struct{}

func (silent) NeedAt(_, _ int64)     {}
func (silent) DontNeedAt(_, _ int64) {}
