package migrate

import (
	"errors"
	"sync"
)

// memLedger is the state files of the source.
type memLedger struct {
	noLedger
	file       sync.Mutex
	generation uint64 // guarded by file
	failing    int    // guarded by file; so many writes fail
}

var errNoRoomForState = errors.New("no room for the state file")

func (l *memLedger) fail() error {
	l.file.Lock()
	defer l.file.Unlock()
	if l.failing == 0 {
		return nil
	}
	l.failing--
	return errNoRoomForState
}

func (l *memLedger) setFailing(n int) {
	l.file.Lock()
	defer l.file.Unlock()
	l.failing = n
}

func (l *memLedger) Confirm(disk string, o Owner) error {
	if err := l.fail(); err != nil {
		return err
	}
	return l.noLedger.Confirm(disk, o)
}

func (l *memLedger) Prepare(to map[string]Owner) error {
	if err := l.fail(); err != nil {
		return err
	}
	return l.noLedger.Prepare(to)
}

// HandOff fails when it is not known how far it came.
func (l *memLedger) HandOff() error { return errors.Join(l.noLedger.HandOff(), l.fail()) }

func (l *memLedger) Taken() error {
	if err := l.fail(); err != nil {
		return err
	}
	return l.noLedger.Taken()
}
