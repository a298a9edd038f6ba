package migrate

import (
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// TestFarewellIsHeardBeforeTheEnd moves small disks again and again: the destination must hear each time that its
// answer to Completed has come (trap M15), although nothing follows but the end of the connection.
func TestFarewellIsHeardBeforeTheEnd(t *testing.T) {
	for range 300 {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		source, err := NewSource([]SourceDisk{
			{Name: "a", Store: sources.NewMemoryStorage(4096)}, {Name: "b", Store: sources.NewMemoryStorage(100)},
		}, SourceOptions{})
		if err != nil {
			t.Fatal(err)
		}
		dest, err := NewDestination(DestinationOptions{
			Disks: 2,
			Open: func(a Announcement) (DestinationDisk, error) {
				return DestinationDisk{Name: a.Name, Store: sources.NewMemoryStorage(int(a.Size)), KnownZero: true}, nil
			},
			Ready: func(string, *lazy.Device) error { return nil },
		})
		if err != nil {
			t.Fatal(err)
		}
		var calls atomic.Int32
		group, ctx := errgroup.WithContext(t.Context())
		group.Go(func() error {
			return dest.Run(ctx, func(context.Context) (io.ReadWriteCloser, error) { return ln.Accept() })
		})
		group.Go(func() error {
			defer ln.Close()
			return source.Run(ctx, func(ctx context.Context) (io.ReadWriteCloser, error) {
				if calls.Add(1) > 1 {
					return nil, &FatalError{errors.New("a second connection")}
				}
				return new(net.Dialer).DialContext(ctx, "tcp", ln.Addr().String())
			})
		})
		if err := group.Wait(); err != nil {
			t.Fatal(err)
		}
		if err := dest.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

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
