package migrate

import (
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// testClock is a clock that the test sets. time.Now runs beside it.
type testClock struct {
	set time.Duration // by how much the time of day was set forward
}

func (c *testClock) read() reading {
	r := systemClock()
	return reading{r.now.Add(c.set), r.ahead + c.set}
}

// Another program that writes the disk after a kill is found out by the time of the
// file's change, a tick of the clock after the last write: times lie up to a tick before
// the write, and never after it. (trap I7)
func TestAFileThatAnotherProgramHasWrittenIsFoundOut(t *testing.T) {
	l := new(left)
	_, c := begun(t, l, changesOf)
	at := time.Unix(1000, 123456789)
	c.SetWritten(at)
	for after, want := range map[time.Duration]bool{
		0: true, -5 * time.Millisecond: true, -30 * time.Millisecond: false, time.Nanosecond: false,
		5 * time.Millisecond: false, 100 * time.Millisecond: false, 300 * time.Millisecond: false, time.Hour: false,
	} {
		require.Equal(t, want, c.WrittenLast(at.Add(after)), after)
	}
	tracker, c := begun(t, l, changesOf)
	before := time.Unix(0, time.Now().UnixNano()|1)
	_, err := tracker.WriteAt(make([]byte, 10), 0)
	require.NoError(t, err)
	require.True(t, c.WrittenLast(before))
	require.False(t, c.WrittenLast(at))
	require.False(t, c.WrittenLast(before.Add(100*time.Millisecond)))
}

// A file system with times of seconds, or of hundredths, hides what another program has
// written within them. (trap I7)
func TestCoarseTimesOfAFileProveNothing(t *testing.T) {
	_, c := begun(t, new(left), changesOf)
	for _, coarse := range []time.Duration{2 * time.Second, time.Second, 10 * time.Millisecond, time.Millisecond} {
		at := time.Unix(1000, 0).Add(coarse)
		c.SetWritten(at)
		require.False(t, c.WrittenLast(at), coarse)
	}
}

// A clock that was set back since the last write gives a later one of another program
// the same time. One that is set forward, or slowly, does not. (trap I7)
func TestAClockThatWasSetBackProvesNothing(t *testing.T) {
	for set, want := range map[time.Duration]bool{
		0: true, time.Hour: true, -time.Millisecond: true, -20 * time.Millisecond: false, -time.Hour: false,
	} {
		_, c := begun(t, new(left), changesOf)
		clock := new(testClock)
		c.clock = clock.read
		at := time.Unix(0, time.Now().UnixNano()|1)
		c.SetWritten(at)
		clock.set = set
		require.Equal(t, want, c.WrittenLast(at), set)
	}
}

// dying is a disk in which a write is under way for good.
type dying struct{ *sources.MemoryStorage }

var errDying = errors.New("the process is killed here")

func (d dying) WriteAt([]byte, int64) (int, error) { panic(errDying) }

// A process that is killed while it writes has not noted when that ended: what another
// program has written since cannot be told from it. (trap I7)
func TestAKillInAWriteProvesNothing(t *testing.T) {
	l := new(left)
	c, err := openChanges(changesOf, l.open)
	require.NoError(t, err)
	c.SetWritten(time.Unix(1000, 123456789))
	tracker, err := NewTracker(dying{sources.NewMemoryStorage(int(changesOf.Size))}, TrackerOptions{Changes: c})
	require.NoError(t, err)
	at := time.Unix(0, time.Now().UnixNano()|1)
	require.PanicsWithValue(t, errDying, func() { _, _ = tracker.WriteAt(make([]byte, 10), 0) })
	require.False(t, c.WrittenLast(at))
	require.False(t, c.WrittenLast(time.Unix(1000, 123456789)))
}
