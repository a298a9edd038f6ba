package soak

import (
	"context"
	"fmt"
	"time"
)

const (
	minKills, maxKills = 4, 12 // in one migration, before its end
	// killPause is about how long the programs are left alone between two kills.
	minKillPause, maxKillPause = 15 * time.Millisecond, 400 * time.Millisecond
)

// killRound is a migration in which the programs are killed at random moments.
func killRound(ctx context.Context, m *migration) error {
	kills := minKills + m.r.IntN(maxKills-minKills)
	// As fast as it has to be for about half of it to be moved meanwhile.
	m.link.SetRate(max(128*kib, m.disk.size/int64(kills+1)))
	if err := m.begin(ctx); err != nil {
		return err
	}
	for range kills {
		if err := sleep(ctx, between(m.r, minKillPause, maxKillPause)); err != nil {
			return err
		}
		if err := m.kill(ctx); err != nil {
			return err
		}
	}
	// The end is where most can go wrong: let it come, and kill around it.
	m.link.SetRate(0)
	for range m.r.IntN(3) {
		if err := sleep(ctx, between(m.r, 0, 150*time.Millisecond)); err != nil {
			return err
		}
		if err := m.kill(ctx); err != nil {
			return err
		}
	}
	if err := m.complete(ctx); err != nil {
		return err
	}
	return m.finish(ctx)
}

// kill ends the source, the destination or both without a warning, and starts
// them again with the same commands.
func (m *migration) kill(ctx context.Context) error {
	if err := m.alive(); err != nil {
		return err
	}
	switch m.r.IntN(3) {
	case 0:
		return m.killSource(ctx)
	case 1:
		return m.killDest(ctx)
	}
	m.source.kill()
	restart, err := m.sourceKilled()
	if err != nil {
		return err
	}
	if err := m.killDest(ctx); err != nil { // back without the source
		return err
	}
	if restart {
		return m.startSource()
	}
	return nil
}

// sourceKilled says whether the source has to come back: it does not if it had
// ended by itself, all being moved.
func (m *migration) sourceKilled() (bool, error) {
	switch {
	case m.sourceDone:
		return false, nil
	case m.source.code() >= 0:
		return false, m.sourceEnded()
	}
	m.sum.SourceKills.Add(1)
	return true, nil
}

func (m *migration) killSource(ctx context.Context) error {
	m.source.kill()
	restart, err := m.sourceKilled()
	if err != nil || !restart {
		return err
	}
	if m.r.IntN(2) == 0 { // it may be away for a while
		if err := sleep(ctx, between(m.r, 0, 200*time.Millisecond)); err != nil {
			return err
		}
	}
	return m.startSource()
}

// killDest kills the destination, perhaps again while it starts, and waits until
// it is back.
func (m *migration) killDest(ctx context.Context) error {
	if err := m.lose(); err != nil {
		return err
	}
	if err := m.startDest(); err != nil {
		return err
	}
	for m.r.IntN(4) == 0 {
		if err := sleep(ctx, between(m.r, 0, 40*time.Millisecond)); err != nil {
			return err
		}
		m.dest.kill()
		if m.dest.code() >= 0 {
			return fmt.Errorf("dest has ended by itself: %v", m.dest.cmd.ProcessState)
		}
		m.sum.DestKills.Add(1)
		if err := m.startDest(); err != nil {
			return err
		}
	}
	return m.serve(ctx)
}
