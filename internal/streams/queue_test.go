package streams

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// reader is an output that takes nothing until it is opened.
type reader struct {
	open chan struct{}
	mu   sync.Mutex
	text strings.Builder
}

func (r *reader) Write(p []byte) (int, error) {
	<-r.open
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.Write(p)
}

// A log that is not read holds up nothing; what was lost is counted when it is
// read again (fault H5).
func TestUnreadOutputHoldsUpNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &reader{open: make(chan struct{})}
		q := NewQueue(r, func(out io.Writer, n int) { fmt.Fprintf(out, "%d lost\n", n) })
		line := strings.Repeat("x", 1023) + "\n"
		for range 2 * maxQueued / len(line) {
			n, err := q.Write([]byte(line))
			require.NoError(t, err)
			require.Equal(t, len(line), n)
		}
		synctest.Wait()
		close(r.open)
		synctest.Wait()
		kept := strings.Count(r.text.String(), line)
		require.GreaterOrEqual(t, kept, maxQueued/len(line))
		require.LessOrEqual(t, kept, maxQueued/len(line)+1, "one is being written")
		require.True(t, strings.HasSuffix(r.text.String(), fmt.Sprintf("\n%d lost\n", 2*maxQueued/len(line)-kept)))
		q.Close(time.Second)
		require.NotContains(t, r.text.String(), "\n0 lost")
	})
}

// What was written before Close is written (fault H5).
func TestCloseWritesWhatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &reader{open: make(chan struct{})}
		q := NewQueue(r, nil)
		for i := range 100 {
			fmt.Fprintln(q, i)
		}
		time.AfterFunc(time.Second/2, func() { close(r.open) })
		q.Close(time.Second)
		require.Equal(t, 100, strings.Count(r.text.String(), "\n"))
	})
}

// The end waits for a reader that does not read for a bounded time (fault H5).
func TestCloseGivesUpOnAReaderThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &reader{open: make(chan struct{})}
		q := NewQueue(r, nil)
		fmt.Fprintln(q, "a line")
		began := time.Now()
		q.Close(time.Second)
		require.Equal(t, time.Second, time.Since(began))
		close(r.open) // or the bubble would wait for the writer
	})
}

type broken struct{ writes int }

func (b *broken) Write([]byte) (int, error) { b.writes++; return 0, errors.New("broken pipe") }

// A reader that has gone is no error of whoever writes (fault H5).
func TestReaderThatHasGoneIsNoError(t *testing.T) {
	b := &broken{}
	q := NewQueue(b, nil)
	for range 3 {
		_, err := fmt.Fprintln(q, "a line")
		require.NoError(t, err)
	}
	q.Close(time.Minute)
	require.Equal(t, 3, b.writes)
}
