package main

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/nbdexport"
)

// Many reads that are given up together are one line for each disk.
func TestReadsGivenUpTogetherAreOneLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dest, err := migrate.NewDestination(migrate.DestinationOptions{
			Open: func(migrate.Announcement) (migrate.DestinationDisk, error) {
				return migrate.DestinationDisk{}, errors.ErrUnsupported
			},
			Ready: func(string, *lazy.Device) error { return nil },
		})
		require.NoError(t, err)
		var log bytes.Buffer
		r := &receiver{dest: dest, console: &console{log: slog.New(slog.NewTextHandler(&log, nil))}}
		wait := nbdexport.Wait{Export: "a", Command: "READ", Off: 4096, Length: 512, Waited: time.Minute}
		for range 100 {
			r.waited(wait) // waits on: the device's to tell
		}
		giveUp := func(export string, off uint64) {
			w := wait
			w.Export, w.Off, w.GivenUp = export, off, true
			r.waited(w)
		}
		for i := range uint64(64) {
			giveUp("a", 4096+i)
		}
		require.Empty(t, log.String(), "more may come")
		giveUp("b", 7)
		time.Sleep(gatherGivenUp)
		synctest.Wait()
		require.Equal(t, 2, strings.Count(log.String(), "\n"), log.String())
		require.Contains(t, log.String(), "disk=a requests=64 first_offset=4096 waited=1m0s source_attached=false")
		require.Contains(t, log.String(), "disk=b requests=1 first_offset=7")
		giveUp("a", 1)
		time.Sleep(gatherGivenUp)
		synctest.Wait()
		require.Contains(t, log.String(), "disk=a requests=1 first_offset=1 ")
		require.Equal(t, 3, strings.Count(log.String(), "\n"), log.String())
	})
}
