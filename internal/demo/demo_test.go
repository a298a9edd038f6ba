package demo

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// quick is a demo that lasts a second or two.
func quick(t *testing.T) (Options, *bytes.Buffer) {
	t.Helper()
	var out bytes.Buffer
	t.Setenv("TMPDIR", t.TempDir())
	return Options{Size: MinSize, Rate: 12 << 20, Out: &out}, &out
}

func requireNothingLeft(t *testing.T) {
	t.Helper()
	left, err := os.ReadDir(os.TempDir())
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestEveryClaimHolds(t *testing.T) {
	o, out := quick(t)
	require.NoError(t, Run(t.Context(), o), "%s", out)
	require.Contains(t, out.String(), "All of it held")
	require.NotContains(t, out.String(), "FAILED")
	require.NotContains(t, out.String(), "\x1b", "no control characters in a pipe")
	requireNothingLeft(t)
}

func TestWithoutMkfsTheDiskIsATarStream(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d")
	f, err := os.Create(path)
	require.NoError(t, err)
	defer f.Close()
	c := content{From: "."}
	require.NoError(t, c.makeTar(t.Context(), f, MinSize))
	require.NotZero(t, c.Files)
	info, err := f.Stat()
	require.NoError(t, err)
	require.Less(t, info.Size(), int64(MinSize))
}

func TestInterruptLeavesNothing(t *testing.T) {
	o, out := quick(t)
	o.Rate = 1 << 20
	ctx, cancel := context.WithTimeoutCause(t.Context(), 4*time.Second, errors.New("enough"))
	defer cancel()
	require.Error(t, Run(ctx, o))
	require.NotContains(t, out.String(), "complete")
	requireNothingLeft(t)
}

func TestKeepLeavesTheDisks(t *testing.T) {
	o, out := quick(t)
	o.Keep = filepath.Join(t.TempDir(), "kept")
	require.NoError(t, Run(t.Context(), o), "%s", out)
	for _, name := range []string{sourceFile, destFile} {
		info, err := os.Stat(filepath.Join(o.Keep, name))
		require.NoError(t, err)
		require.EqualValues(t, MinSize, info.Size())
	}
	entries, err := os.ReadDir(o.Keep)
	require.NoError(t, err)
	require.Len(t, entries, 2, "sockets and staged files are removed")
	require.ErrorContains(t, Run(t.Context(), o), "exists already")
}

func TestWhatDoesNotHoldIsAnError(t *testing.T) {
	var out bytes.Buffer
	s := &stage{Options: Options{Out: &out, Rate: 1 << 20}, data: 16 << 20}
	s.result.wantSum, s.result.gotSum = []byte{1}, []byte{2}
	err := s.judge()
	require.ErrorContains(t, err, "no byte lost")
	require.ErrorContains(t, err, "the first reads need no copy")
	require.Contains(t, out.String(), "FAILED")
	require.NotContains(t, out.String(), "All of it held")
}

func TestTooSmallADiskIsRefused(t *testing.T) {
	require.ErrorContains(t, Run(t.Context(), Options{Size: 1, Out: &bytes.Buffer{}}), "shows nothing")
}

func TestOverlay(t *testing.T) {
	o := newOverlay(strings.NewReader(strings.Repeat("s", 4*ioSize)))
	o.write(bytes.Repeat([]byte("w"), ioSize), ioSize)
	got := make([]byte, 2*ioSize)
	n, err := o.ReadAt(got, ioSize/2)
	require.NoError(t, err)
	require.Equal(t, 2*ioSize, n)
	want := strings.Repeat("s", ioSize/2) + strings.Repeat("w", ioSize) + strings.Repeat("s", ioSize/2)
	require.Equal(t, want, string(got))
	n, _ = o.ReadAt(got, ioSize+ioSize/2)
	require.Equal(t, strings.Repeat("w", ioSize/2)+strings.Repeat("s", ioSize+ioSize/2), string(got[:n]))
	require.EqualValues(t, 1, o.blocks())
}

func TestQuantiles(t *testing.T) {
	var l latencies
	require.Zero(t, l.quantile(0.5))
	for i := range 100 {
		l = append(l, time.Duration(100-i)*time.Millisecond)
	}
	require.Equal(t, 51*time.Millisecond, l.quantile(0.5))
	require.Equal(t, 100*time.Millisecond, l.quantile(0.99))
	require.Equal(t, "p50 51ms, p99 100ms, max 100ms", l.String())
}
