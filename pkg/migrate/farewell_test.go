package migrate

import (
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"
)

// slowComplete is a ledger that takes its time to note that all is there.
type slowComplete struct {
	noLedger
	in, out chan struct{}
}

func (l *slowComplete) Complete() error {
	close(l.in)
	<-l.out
	return l.noLedger.Complete()
}

// TestADestinationIsLetGoWhenItsCompletenessIsNoted: a source that was killed between
// the two would wait for it for good when it is started again (rule 9, fault H12).
func TestADestinationIsLetGoWhenItsCompletenessIsNoted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _ := testDisk(t, 1<<20, 1)
		l := &slowComplete{in: make(chan struct{}), out: make(chan struct{})}
		m := startMove(t, SourceOptions{Ledger: l}, SourceDisk{Name: "disk", Store: store, Identity: testID})
		h := newHost(t)
		h.start(m.ctx, from(m.wires.dst))
		<-l.in
		synctest.Wait()
		require.Empty(t, h.done, "it waits for the source to come back")
		require.Empty(t, m.done)
		close(l.out)
		require.NoError(t, <-m.done)
		require.NoError(t, <-h.done)
		h.close()
		m.end()
	})
}
