package migrate

import (
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"

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
