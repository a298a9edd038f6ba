package migrate

import (
	"fmt"
	"log/slog"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
)

// A change of state that finds no room in the map is tried again as long as the
// connection lasts, and answered when it has succeeded: at a handoff the source has
// given the disk up already (fault F13, trap I11).
func TestChangeOfStateWaitsForRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log syncBuffer
		dst, err := NewDestination(DestinationOptions{
			Open:  func(Announcement) (DestinationDisk, error) { return DestinationDisk{}, nil },
			Ready: func(string, *lazy.Device) error { return nil },
			Log:   slog.New(slog.NewTextHandler(&log, nil)),
		})
		require.NoError(t, err)
		disk, err := dst.newDestDisk(Announcement{Name: "vm", Size: 1 << 20, BlockSize: 65536}, false, DestinationDisk{Store: memory("vm", 1<<20)})
		require.NoError(t, err)
		full := fmt.Errorf("write the map: %w", syscall.ENOSPC)
		gone := make(chan struct{})

		tries, begin := 0, time.Now()
		require.NoError(t, disk.withRoom(gone, func() error {
			if tries++; tries < 5 {
				return full
			}
			return nil
		}))
		require.Equal(t, 5, tries)
		require.Positive(t, time.Since(begin), "it waits between two tries")
		require.NoError(t, disk.status().Err, "there is room again")
		require.Equal(t, 1, log.count("there is room again"))

		ended := make(chan error)
		go func() { ended <- disk.withRoom(gone, func() error { return full }) }()
		<-time.After(time.Minute) // of the bubble
		require.Error(t, disk.status().Err)
		select {
		case err := <-ended:
			t.Fatalf("it has ended while the connection lasts: %v", err)
		default:
		}
		close(gone)
		require.ErrorIs(t, <-ended, syscall.ENOSPC)
		require.NoError(t, disk.close())
	})
}
