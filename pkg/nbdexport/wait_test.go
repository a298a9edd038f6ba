package nbdexport

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// stalledServer is one with a read that waits, at the fake time it began.
func stalledServer(t *testing.T, o Options) (*Server, *disk, *rawClient, uint64) {
	d := newDisk(2 * mib)
	d.missing = mib
	s := NewServer(o)
	require.NoError(t, s.AddExport(Export{Name: "disk", Backend: d}))
	c := pipeClient(t, s).enter("disk", modeSimple)
	cookie := c.request(cmdRead, 0, mib, 4096)
	synctest.Wait()
	require.Equal(t, 1, s.Waits().Count)
	return s, d, c, cookie
}

func TestWaitsShowInTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		s, d, c, cookie := stalledServer(t, Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
		for _, step := range []struct {
			at    time.Duration
			lines int
		}{
			{4 * time.Second, 0}, {6 * time.Second, 1}, {29 * time.Second, 1}, {31 * time.Second, 2}, {61 * time.Second, 3},
			{time.Hour, 3},
		} {
			pass(step.at - s.Waits().Oldest)
			synctest.Wait()
			require.Equal(t, step.lines, strings.Count(log.String(), "request waits for data"), log.String())
		}
		require.Contains(t, log.String(), "off=1048576 length=4096 waited=5s")
		d.arrive()
		_, err := c.readReply(cookie, mib, 4096)
		require.Equal(t, ok, err)
		require.NoError(t, s.Close())
	})
}

// TestClientThatGivesUpBeforeTheDataComesIsTold is trap W2: its own timeout is
// shorter than our wait. One that leaves at once, or is sent away, has none.
func TestClientThatGivesUpBeforeTheDataComesIsTold(t *testing.T) {
	for name, v := range map[string]struct {
		after time.Duration
		leave func(s *Server, c *rawClient)
		lines int
	}{
		"by its own timeout": {30 * time.Second, func(_ *Server, c *rawClient) { _ = c.Close() }, 1},
		"at once":            {time.Second, func(_ *Server, c *rawClient) { _ = c.Close() }, 0},
		"sent away":          {30 * time.Second, func(s *Server, _ *rawClient) { _ = s.Close() }, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log bytes.Buffer
				s, _, c, _ := stalledServer(t, Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
				pass(v.after)
				v.leave(s, c)
				synctest.Wait()
				require.Equal(t, v.lines, strings.Count(log.String(), "client left while its requests waited"), log.String())
				if v.lines > 0 {
					require.Contains(t, log.String(), "requests=1 waited=30s")
				}
				require.NoError(t, s.Close())
			})
		})
	}
}

func TestOnWaitIsToldInsteadOfTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		told := make(chan Wait, 9)
		s, _, c, cookie := stalledServer(t, Options{
			Log: slog.New(slog.NewTextHandler(&log, nil)), StallError: 7 * time.Second,
			OnWait: func(w Wait) { told <- w },
		})
		require.Equal(t, errIO, c.status(cookie))
		w := Wait{Export: "disk", Command: "READ", Off: mib, Length: 4096, Waited: 5 * time.Second}
		given := w
		given.Waited, given.GivenUp = 7*time.Second, true
		require.Equal(t, w, <-told)
		require.Equal(t, given, <-told)
		require.Empty(t, told)
		require.Empty(t, log.String())
		require.NoError(t, s.Close())
	})
}

func TestStallRuleEndsAWaitWithEIO(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _, c, cookie := stalledServer(t, Options{StallError: 7 * time.Second})
		began := time.Now()
		require.Equal(t, errIO, c.status(cookie))
		require.Equal(t, 7*time.Second, time.Since(began))
		// The same request object, used again, waits the whole time again.
		for range 3 {
			began = time.Now()
			require.Equal(t, errIO, c.status(c.request(cmdRead, 0, mib, 4096)))
			require.Equal(t, 7*time.Second, time.Since(began))
		}
		_, err := c.read(0, 0, 4096)
		require.Equal(t, ok, err)
		require.NoError(t, s.Close())
	})
}

func TestCloseEndsWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _, c, _ := stalledServer(t, Options{})
		began := time.Now()
		require.NoError(t, s.Close())
		require.Zero(t, time.Since(began))
		c.wantEnd()
		require.Zero(t, s.Waits().Count)
	})
}

// slowSync takes a second to sync, and each sync waits for the one before, as one
// that may be given up: it asks its context for Done.
type slowSync struct {
	*disk
	turn chan struct{}
}

func (d *slowSync) SyncContext(ctx context.Context) error {
	select {
	case d.turn <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	pass(time.Second)
	<-d.turn
	return nil
}

// The stall rule is for requests that wait for the source: flushes that wait for
// the disk, and for each other, are answered, and are not counted as waiting
// (fault G1, trap R5).
func TestStallRuleLeavesFlushesAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewServer(Options{StallError: 300 * time.Millisecond})
		require.NoError(t, s.AddExport(Export{Name: "disk", Backend: &slowSync{newDisk(mib), make(chan struct{}, 1)}}))
		c := pipeClient(t, s).enter("disk", modeSimple)
		for range 3 {
			c.request(cmdFlush, 0, 0, 0)
		}
		synctest.Wait()
		require.Zero(t, s.Waits().Count)
		for range 3 {
			require.Equal(t, ok, c.chunk(0).err)
		}
		require.NoError(t, s.Close())
	})
}

// A wait that is over counts no more: a write with FUA that waited for the source
// for a moment, and then for the disk, is no write that waits for the source.
func TestWaitThatIsOverIsNotGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &slowSync{newDisk(2 * mib), make(chan struct{}, 1)}
		d.missing = mib
		s := NewServer(Options{StallError: 300 * time.Millisecond})
		require.NoError(t, s.AddExport(Export{Name: "disk", Backend: &waitingWrites{d}}))
		c := pipeClient(t, s).enter("disk", modeSimple)
		time.AfterFunc(200*time.Millisecond, d.arrive)
		require.Equal(t, ok, c.do(cmdWrite, cmdFlagFUA, mib, 4096, make([]byte, 4096)))
		require.NoError(t, s.Close())
	})
}

// waitingWrites is a backend whose writes wait as its reads do.
type waitingWrites struct{ *slowSync }

func (d *waitingWrites) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if _, err := d.ReadAtContext(ctx, make([]byte, len(p)), off); err != nil {
		return 0, err
	}
	return d.slowSync.WriteAtContext(ctx, p, off)
}
