package control

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

const mib = 1 << 20

// TestStatesAreHonest: each state is said when it is true, and what cannot be
// known is not said.
func TestStatesAreHonest(t *testing.T) {
	moving := func(done int64, live *Live) Sample {
		return Sample{DiskStatus: migrate.DiskStatus{
			Name: "vm", Size: 1000 * mib, BytesDone: done, Connected: true, State: migrate.StateMigrating,
		}, Live: live}
	}
	pass := func(n int, writes int64) *Live { return &Live{Pass: n, WriteRate: writes, LinkRate: 180 * mib} }
	waits := moving(500*mib, nil)
	waits.DiskStatus.State = migrate.StateStandby
	full, fullHere := moving(999*mib, pass(2, 1)), moving(500*mib, nil)
	full.Err, fullHere.Err = fmt.Errorf("disk: %w", migrate.ErrFull), fmt.Errorf("write: %w", syscall.ENOSPC)
	compares := moving(500*mib, nil)
	compares.DiskStatus.State, compares.BytesCompared, compares.BytesToCompare = migrate.StateComparing, 10*mib, 500*mib
	for name, c := range map[string]struct {
		r             reading
		state, detail string
	}{
		"source alone":   {reading{Sample: Sample{DiskStatus: migrate.DiskStatus{Size: 1}}, role: RoleSource}, StateWaitingForDest, ""},
		"dest alone":     {reading{Sample: Sample{DiskStatus: migrate.DiskStatus{Size: 1}}, role: RoleDest, paused: true}, StateWaitingForSource, ""},
		"just begun":     {reading{Sample: moving(0, nil)}, StateStarting, ""},
		"copying":        {reading{Sample: moving(10*mib, nil), known: true, ends: true, done: mib}, StateCopying, ""},
		"nothing moves":  {reading{Sample: moving(10*mib, nil), known: true}, StateStalled, ""},
		"paused":         {reading{Sample: moving(10*mib, nil), known: true, paused: true}, StatePaused, ""},
		"to confirm":     {reading{Sample: moving(1000*mib, nil), known: true, paused: true}, StateFinishing, ""},
		"complete":       {reading{Sample: Sample{DiskStatus: migrate.DiskStatus{State: migrate.StateComplete}}}, StateComplete, ""},
		"first pass":     {reading{Sample: moving(10*mib, pass(1, 0)), known: true, sent: mib, done: -mib}, StateFirstPass, ""},
		"first, stalled": {reading{Sample: moving(10*mib, pass(1, 0)), known: true}, StateStalled, ""},
		"converging": {
			reading{Sample: moving(10*mib, pass(2, 170*mib)), known: true, done: 1},
			StateConverging, "writes 170 MiB/s, link 180 MiB/s",
		},
		"not converging": {
			reading{Sample: moving(10*mib, pass(2, 210*mib)), known: true, done: -1},
			StateNotConverging, "writes 210 MiB/s, link 180 MiB/s",
		},
		"a steady few":  {reading{Sample: moving(900*mib, pass(3, 90*mib)), known: true}, StateReady, ""},
		"none missing":  {reading{Sample: moving(1000*mib, pass(2, 1)), known: true, sent: 1, done: 1}, StateReady, ""},
		"no room there": {reading{Sample: full, role: RoleSource, known: true}, StateNoRoom, ""}, // fault H4
		"no room here":  {reading{Sample: fullHere, role: RoleDest, known: true}, StateNoRoom, ""},
		"standby":       {reading{Sample: waits, role: RoleDest, known: true}, StateStandby, ""},
		"handed off":    {reading{Sample: moving(900*mib, &Live{Pass: 2, HandedOff: true}), known: true, ends: true, done: 1}, StateCopying, ""},
		"comparing":     {reading{Sample: compares, known: true, paused: true}, StateComparing, "10.0 MiB of 500 MiB"},
	} {
		state, detail := c.r.judge()
		require.Equal(t, c.state, state, name)
		require.Equal(t, c.detail, detail, name)
		d := c.r.disk()
		require.Equal(t, c.state == StateComplete, d.Percent == 100, name)
		if state != StateCopying && state != StateStandby && state != StateFirstPass && state != StateConverging {
			require.Nil(t, d.ETA, name)
		}
		require.Equal(t, c.r.known && state != StateComplete, d.Rate != nil, name)
	}
}

// TestMonitorMeasures: rates and the time that is left are those of what
// happened, and a question does not disturb the measuring.
func TestMonitorMeasures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		at := func() int64 { return int64(time.Since(begin).Seconds()) }
		m := NewMonitor(Options{Role: RoleSource, Version: "1", Disks: func() []Sample {
			return []Sample{
				{DiskStatus: migrate.DiskStatus{
					Name: "frozen", Size: 1000 * mib, BytesDone: at() * mib, BytesSent: at() * mib, Connected: true, State: migrate.StateMigrating,
					Err: errors.New("a block was refused"),
				}},
				{DiskStatus: migrate.DiskStatus{
					Name: "live", Size: 1000 * mib, BytesDone: (500 - at()) * mib, BytesSent: at() * 2 * mib, Connected: true, State: migrate.StateMigrating,
				}, Live: &Live{Pass: 3, WriteRate: 3 * mib, LinkRate: 2 * mib}},
			}
		}})
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); m.Run(ctx) }()
		synctest.Wait()
		require.Equal(t, StateStarting, m.Status().Disks[0].State)
		for range 100 {
			time.Sleep(time.Second)
			for range 100 {
				m.Status()
			}
		}
		st := m.Status()
		require.Equal(t, "source", st.Role)
		require.InDelta(t, 100, st.Uptime, 1)
		require.Nil(t, st.Background)
		frozen, live := st.Disks[0], st.Disks[1]
		require.Equal(t, StateCopying, frozen.State)
		require.EqualValues(t, mib, *frozen.Rate)
		require.InDelta(t, 900, *frozen.ETA, 2)
		require.Equal(t, 10, frozen.Percent)
		require.Equal(t, "a block was refused", frozen.Error)
		require.Equal(t, StateNotConverging, live.State)
		require.Equal(t, "writes 3.00 MiB/s, link 2.00 MiB/s", live.Detail)
		require.EqualValues(t, -mib, *live.Rate)
		require.EqualValues(t, 3*mib, live.Live.WriteRate)
		require.EqualValues(t, 2*mib, live.Live.LinkRate)
		require.Nil(t, live.ETA)
		stop()
		<-ended
	})
}

func TestTableIsReadable(t *testing.T) {
	rate, eta, down := int64(98*mib), float64(192), int64(-mib)
	st := Status{
		Role: RoleSource, PID: 7, Uptime: 3723, Draining: true,
		Background: &Background{RateLimit: 100 * mib, Paused: true}, NBD: &NBD{Clients: 1},
		Disks: []Disk{
			{Name: "vm", State: StateFirstPass, Done: 1 << 30, Size: 20 << 30, Percent: 5, Rate: &rate, ETA: &eta, Live: &LiveDisk{Pass: 1}},
			{
				Name: "data", State: StateNotConverging, Detail: "writes 210 MiB/s, link 180 MiB/s", Size: 20 << 30, Rate: &down,
				Live: &LiveDisk{Pass: 3}, WaitingReads: 2, OldestWait: 61, Error: "no\x1b[31m\nway",
			},
		},
	}
	var b strings.Builder
	require.NoError(t, WriteTable(&b, st))
	require.Equal(t, `source, pid 7, up 1:02:03, rate at most 100 MiB/s, paused, 1 NBD client, draining
DISK  STATE                                                      DONE      OF        %  RATE         ETA   WAITING
vm    first pass                                                 1.00 GiB  20.0 GiB  5  98.0 MiB/s   3:12  -
data  not converging, pass 3 (writes 210 MiB/s, link 180 MiB/s)  0 B       20.0 GiB  0  -1.00 MiB/s  -     2 reads, 1:01
data: no?[31m?way
`, b.String())
	b.Reset()
	require.NoError(t, WriteTable(&b, Status{Role: RoleDest, PID: 7}))
	require.Equal(t, "dest, pid 7, up 0:00\nno disk yet: the source has not come\n", b.String())
}
