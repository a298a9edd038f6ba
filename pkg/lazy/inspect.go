package lazy

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Inspection is what a map says, read by somebody who does not own it.
type Inspection struct {
	Identity Identity
	State    MapState
	InUse    bool // a process has it: the numbers are those of its last save

	Blocks  int64 // all of them: Fetched + Written + Missing
	Fetched int64 // blocks that came from the source; all of them once complete
	Written int64 // blocks that were wholly written here; not known once complete
	Missing int64 // blocks that are not here, durably
	Partial int64 // of the missing, blocks of which part was written here

	BytesLocal int64 // bytes of the blocks that are here
	Logged     int64 // bytes of flushed writes that are in the log, and perhaps not yet on the disk

	Binding  Binding // what the map knows of its disk
	Bindable bool    // it is of a version that binds maps to their disks

	state *state
}

// Inspect reads the map at path and changes nothing, also while a device has
// it. The errors are those of OpenMap, but ErrMapInUse.
func Inspect(path string) (*Inspection, error) {
	f, err := openFile(path, os.O_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, errno(err))
	}
	defer f.Close() // only read
	busy := f.lock(unix.LOCK_SH)
	if busy == nil {
		// Not held: who wants to begin now should not be told that it is in use.
		busy = f.lock(unix.LOCK_UN)
	}
	i, err := inspect(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	i.InUse = errors.Is(busy, ErrMapInUse)
	return i, nil
}

// InspectHeader is Inspect for what the header says: Identity, State and Binding. It
// does not look whether the map is in use.
func InspectHeader(path string) (*Inspection, error) {
	f, err := openFile(path, os.O_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, errno(err))
	}
	defer f.Close() // only read
	head, _, err := readHeader(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, errno(err))
	}
	return &Inspection{
		Identity: head.id, State: head.state, Binding: head.binding(), Bindable: head.version > 1, state: newState(0),
	}, nil
}

func inspect(file mapFile) (*Inspection, error) {
	head, _, err := readHeader(file)
	if err != nil {
		return nil, errno(err)
	}
	m := &Map{file: file, layout: head.layout(), log: newRedo(file, head), head: head}
	s := newState(m.layout.blocks)
	s.partial.limit = maskLimit(0, m.layout.maskWords())
	if err := m.load(s, false); err != nil {
		return nil, err
	}
	local, written := s.local.Load(), s.writes.Load()
	i := &Inspection{
		Identity: head.id, State: head.state,
		Blocks: s.blocks, Fetched: local - written, Written: written, Missing: s.blocks - local,
		Partial:    s.partial.n.Load() + s.partial.waiting.Load(),
		BytesLocal: local * head.id.BlockSize,
		Binding:    head.binding(), Bindable: head.version > 1,
		state: s,
	}
	if m.log != nil && head.state != MapComplete {
		err := m.log.replay(func(r record, laid bool) error {
			if !laid {
				i.Logged += int64(len(r.data))
			}
			return nil
		})
		if err != nil {
			return nil, m.error("read the log of", err)
		}
	}
	if last := s.blocks - 1; last >= 0 && s.isLocal(last) {
		i.BytesLocal -= s.blocks*head.id.BlockSize - head.id.Size
	}
	return i, nil
}

// EachMissing calls yield for every run of blocks that are not here, ascending,
// in bytes, until it returns false.
func (i *Inspection) EachMissing(yield func(off, length int64) bool) {
	bs, n := i.Identity.BlockSize, i.Blocks
	for lo := i.state.nextMissing(0, n); lo < n; {
		hi := i.state.nextLocal(lo, n)
		if !yield(lo*bs, min(hi*bs, i.Identity.Size)-lo*bs) {
			return
		}
		lo = i.state.nextMissing(hi, n)
	}
}
