package main

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

// A destination in standby may have all, and still not be the disk's owner.
func TestWhatIsMissingIsSaid(t *testing.T) {
	done := migrate.DiskStatus{Name: "done", Size: 10, BytesDone: 10, State: migrate.StateComplete}
	all := migrate.DiskStatus{Name: "all", Size: 10, BytesDone: 10, State: migrate.StateStandby}
	part := migrate.DiskStatus{Name: "part", Size: 10, BytesDone: 4, State: migrate.StateMigrating}
	require.Empty(t, missing([]migrate.DiskStatus{done}))
	require.Equal(t, "nothing is missing on all, but that was not confirmed yet and 6 of 10 bytes missing on part",
		missing([]migrate.DiskStatus{done, all, part}))
}
