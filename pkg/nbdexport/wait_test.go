package nbdexport

import (
	"bytes"
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
