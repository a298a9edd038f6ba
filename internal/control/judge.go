package control

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/progress"
	"github.com/silo-nbd/silo-nbd/internal/units"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

// sampleInterval is how often a Monitor measures.
const sampleInterval = time.Second

// Monitor measures how fast the disks of a process move.
type Monitor struct {
	opts  Options
	began time.Time

	mu sync.Mutex
	// Guarded by mu:
	meters   map[string]*meters // by the disk's name
	draining bool
}

// meters are those of one disk.
type meters struct{ done, sent progress.Meter }

// NewMonitor returns a Monitor that has measured nothing yet.
func NewMonitor(opts Options) *Monitor {
	return &Monitor{opts: opts, began: time.Now(), meters: make(map[string]*meters)}
}

// Run measures until ctx ends.
func (m *Monitor) Run(ctx context.Context) {
	tick := time.NewTicker(sampleInterval)
	defer tick.Stop()
	for m.measure(); ; m.measure() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (m *Monitor) measure() {
	all, now := m.opts.Disks(), time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range all {
		k := m.meters[s.Name]
		if k == nil {
			k = &meters{}
			m.meters[s.Name] = k
		}
		k.done.Add(now, s.BytesDone)
		k.sent.Add(now, s.BytesSent)
	}
}

// drain notes that the process was told to drain, and says whether it was not
// before.
func (m *Monitor) drain() (first bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	first = !m.draining
	m.draining = true
	return first
}

// Status says how far the process is: what is done as of now, rates as of the
// last time they were measured.
func (m *Monitor) Status() Status {
	all := m.opts.Disks()
	st := Status{
		Role: m.opts.Role, Version: m.opts.Version, PID: os.Getpid(),
		Uptime: time.Since(m.began).Seconds(), Disks: make([]Disk, 0, len(all)),
	}
	if p := m.opts.Pace; p != nil {
		st.Background = &Background{RateLimit: p.Rate(), Paused: p.Paused()}
	}
	if m.opts.NBD != nil {
		n := m.opts.NBD()
		st.NBD = &n
	}
	if m.opts.Copies != nil {
		n := m.opts.Copies()
		st.Copies = &n
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	st.Draining = m.draining
	for _, s := range all {
		k := m.meters[s.Name]
		if k == nil {
			k = &meters{}
		}
		r := reading{Sample: s, role: m.opts.Role, paused: st.Background != nil && st.Background.Paused}
		r.take(k)
		st.Disks = append(st.Disks, r.disk())
	}
	return st
}

// reading is a disk and how fast it moves.
type reading struct {
	Sample
	role   string
	paused bool

	known      bool  // the rates are
	done, sent int64 // bytes a second
	left       time.Duration
	ends       bool // left is known
}

func (r *reading) take(k *meters) {
	r.done, r.known = k.done.Rate()
	r.sent, _ = k.sent.Rate()
	r.left, r.ends = k.done.ETA(r.Size)
	r.ends = r.ends && r.known
}

// precopy says that clients of the source still write the disk.
func (r *reading) precopy() bool { return r.Live != nil && !r.Live.HandedOff }

// missing is what the destination does not have, in bytes.
func (r *reading) missing() int64 { return max(0, r.Size-r.BytesDone) }

// judge says what is going on. It says what is known rather than what is hoped.
func (r *reading) judge() (state, detail string) {
	switch {
	case r.DiskStatus.State == migrate.StateComplete:
		return StateComplete, ""
	case !r.Connected && r.role == RoleDest:
		return StateWaitingForSource, ""
	case !r.Connected:
		return StateWaitingForDest, ""
	case errors.Is(r.Err, migrate.ErrFull), r.role == RoleDest && errors.Is(r.Err, syscall.ENOSPC):
		return StateNoRoom, ""
	case r.DiskStatus.State == migrate.StateComparing:
		return StateComparing, fmt.Sprintf("%s of %s", units.Human(r.BytesCompared), units.Human(r.BytesToCompare))
	case r.missing() == 0 && r.precopy():
		return StateReady, ""
	case r.missing() == 0 && r.DiskStatus.State == migrate.StateStandby:
		return StateStandby, ""
	case r.missing() == 0:
		return StateFinishing, ""
	case r.paused:
		return StatePaused, ""
	case r.precopy():
		return r.judgeLive()
	case r.DiskStatus.State == migrate.StateStandby:
		return StateStandby, ""
	case !r.known:
		return StateStarting, ""
	case !r.ends:
		return StateStalled, ""
	}
	return StateCopying, ""
}

// judgeLive is judge for a disk that is written meanwhile.
func (r *reading) judgeLive() (state, detail string) {
	speeds := fmt.Sprintf("writes %s/s, link %s/s", units.Human(r.Live.WriteRate), units.Human(r.Live.LinkRate))
	switch {
	case r.Live.Pass <= 1 && r.known && r.sent < 1:
		return StateStalled, ""
	case r.Live.Pass <= 1:
		return StateFirstPass, ""
	case !r.known:
		return StateStarting, ""
	case float64(r.missing()) < float64(r.Live.LinkRate)*readyTime.Seconds():
		return StateReady, ""
	case r.done > 0:
		return StateConverging, speeds
	}
	return StateNotConverging, speeds
}

func (r *reading) disk() Disk {
	d := Disk{
		Name: r.Name, Size: r.Size, BlockSize: r.BlockSize, Done: r.BytesDone,
		Percent: progress.Row{Size: r.Size, Done: r.BytesDone, Complete: r.DiskStatus.State == migrate.StateComplete}.Percent(),
		Sent:    r.BytesSent, Received: r.BytesReceived, Written: r.BytesWritten,
		WaitingReads: r.Waiting, OldestWait: r.OldestWait.Seconds(),
		Connected: r.Connected, Reconnects: r.Reconnects, Damaged: r.Damaged,
		Compared: r.BytesCompared, ToCompare: r.BytesToCompare,
	}
	d.State, d.Detail = r.judge()
	if r.Err != nil {
		d.Error = r.Err.Error()
	}
	d.Owner = r.Owner
	if device := r.Device; device != (migrate.Device{}) || r.Address != "" {
		d.Destination = &Destination{Address: r.Address}
		if device != (migrate.Device{}) {
			d.Destination.Device = hex.EncodeToString(device[:])
		}
	}
	if r.Live != nil {
		d.Live = &LiveDisk{Pass: r.Live.Pass, HandedOff: r.Live.HandedOff, WriteRate: r.Live.WriteRate, LinkRate: r.Live.LinkRate}
	}
	if !r.known || d.State == StateComplete {
		return d
	}
	d.Rate = &r.done
	if moves := d.State == StateCopying || d.State == StateStandby || d.State == StateFirstPass || d.State == StateConverging; moves && r.ends {
		left := r.left.Round(time.Second).Seconds()
		d.ETA = &left
	}
	return d
}
