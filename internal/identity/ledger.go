package identity

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/silo-nbd/silo-nbd/internal/durable"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// Spec is a disk of a source.
type Spec struct {
	Disk  Disk
	Name  string // what its source calls it
	State string // the path of its state file; empty: the default
}

// Options of Open.
type Options struct {
	// Live: the disks are served here while they move. Otherwise they are frozen.
	Live bool
	// Clone: the disks are images of which several destinations get copies.
	Clone bool
	// Reclaim takes disks back that were handed off.
	Reclaim bool
	// Moved: a disk that is found elsewhere, or under another inode, is the one of
	// its state file, and not another one or a copy.
	Moved bool
	// Keep reports whether what has changed since a live disk's last run began is
	// still known, so that its generation may stay. It is called before the
	// disk is served, and only where it can be so. nil: it is not known.
	Keep func(disk string, last Run) bool
	// Doubt is told, once, that a disk which must not be written has got another
	// change time and nothing else, so that it is not proved that it is as it was. nil:
	// no one is.
	Doubt func(disk string)
	// At is the destination's address; empty if it connects to the source.
	At string
	// Files is where the state files lie; nil: durable.OS.
	Files durable.FS
}

// Run is the last run of a source that served a disk.
type Run struct {
	Identity migrate.Identity // which the disk had in it
	// Ended: it ended in order, and the disk is as it was then. Otherwise it was
	// killed, and the host has been running since: whether another program has
	// written the disk meanwhile only Disk can tell.
	Ended bool
	Disk  sources.Stamp // as the disk is now
	State string        // the path of the disk's state file
}

// maxWorkers is how many disks are written at the same time.
const maxWorkers = 32

// Ledger keeps which disks a source has and to which destination they belong. It
// is their migrate.Ledger. The state files are locked until Close.
type Ledger struct {
	keeper
	live  bool
	doubt func(disk string)
	at    string
	// workers is how many disks are written at the same time.
	workers int
	notes   atomic.Pointer[[]*Note] // of the disks, as of the last change

	mu sync.Mutex // held over I/O: what others look at is in notes
	// Guarded by mu:
	disks     set
	handedOff bool
	finished  bool
	staged    *staging // by Prepare
}

// entry is what a Ledger knows of a disk.
type entry struct {
	found
	name  string
	given bool         // the user said where the state file is to lie
	lock  durable.File // the state file; nil: there is none
	lacks error        // why no state file can be kept; nil: one is
	watch sources.Stamp
	// begin is what the disk was before a live source opened it; nil: not proved.
	begin *beginning
	// doubt is the change time of a disk of which nothing else has changed, and
	// with which its samples were compared; 0: no one has touched it.
	doubt     int64
	reclaimed bool // it had been handed off
	crashed   bool
	had       bool // there was a source before
}

// beginning is a disk that no one had changed when a live source opened it.
type beginning struct {
	uuid       string
	generation number
	cloned     bool
	disk       sources.Stamp
}

// Open reads and locks the state files of the disks, or makes them, and finds
// out which disks they are and to whom they belong. When it returns, disks of this
// host may be served: that they are in use is durable. Disks that were handed off
// are left so, unless o.Reclaim. The caller must Close the Ledger before it closes
// the disks, and when none of them is being written.
func Open(disks []Spec, o Options) (_ *Ledger, err error) {
	l := &Ledger{keeper: keeper{o.Files}, live: o.Live, doubt: o.Doubt, at: o.At}
	l.workers = 1 // in tests one operation follows the other
	if l.files == nil {
		l.files, l.workers = durable.OS, maxWorkers
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.disks.unlock())
		}
	}()
	for _, d := range disks {
		e, err := l.open(d)
		l.disks = append(l.disks, e)
		if err != nil {
			return nil, err
		}
	}
	if !o.Reclaim {
		l.recall()
	}
	l.handedOff, l.finished, err = l.disks.judge(o)
	if err != nil {
		return nil, err
	}
	if l.handedOff {
		err = l.stay(o)
	} else {
		err = l.begin(o)
	}
	l.show()
	return l, err
}

// show lets Note return what stands about the disks now.
func (l *Ledger) show() {
	notes := make([]*Note, len(l.disks))
	for i, e := range l.disks {
		if l.handedOff {
			notes[i] = e.note()
		}
	}
	l.notes.Store(&notes)
}

// begin is Open for disks of this host.
func (l *Ledger) begin(o Options) error {
	seen := make(map[string]bool)
	boot := bootID()
	for _, e := range l.disks {
		e.prepareState(o)
		if seen[e.state.UUID] {
			e.state.UUID = newUUID()
			e.state.change(e.now)
		}
		seen[e.state.UUID] = true
		if o.Live {
			e.openLive(o, boot)
		} else if e.state.Live || !e.unchanged() {
			if e.state.Cloned && (e.state.Live || written(e.state.Disk, e.now) != "" || e.differs() != "") {
				e.state.UUID, e.state.Cloned = newUUID(), false // to its copies it is another image
			}
			// What was copied of a live disk has changed since.
			e.state.Live, e.state.Open, e.state.BootID = false, false, ""
			e.state.change(e.now)
		}
		e.watch = e.now
		if !o.Live {
			e.sample()
		}
		e.state.Cloned = e.state.Cloned || o.Clone
	}
	if err := l.eachInOrder(func(e *entry) error { return l.first(e, o) }); err != nil {
		return err
	}
	for _, e := range l.disks {
		if len(e.marks) > 0 { // they have ended, and the state file knows it
			if err := l.unmark(e); err != nil {
				return fmt.Errorf("%s: remove the note that it was handed off: %w", e.disk.Path(), err)
			}
		}
	}
	return nil
}

// eachInOrder does something for each disk: first for those whose state file says
// that they were handed off. Otherwise a power cut could leave such a one without
// what proves that its handoff was never published.
func (l *Ledger) eachInOrder(do func(e *entry) error) error {
	first, then := l.disks.published()
	if err := each(l.workers, first, do); err != nil {
		return err
	}
	return each(l.workers, then, do)
}

// each does something for some disks at the same time, so that they share the
// commits of their file system. It returns the first error.
func each[D any](workers int, disks []D, do func(d D) error) error {
	var group errgroup.Group
	group.SetLimit(workers)
	for _, d := range disks {
		group.Go(func() error { return do(d) })
	}
	return group.Wait()
}

// prepareState makes the state of a disk that is this host's, but for the
// generation.
func (e *entry) prepareState(o Options) {
	switch {
	case e.state == nil:
		e.state = &state{UUID: firstUUID(e.path, e.now)}
	case e.kin == kinCopy && !o.Moved:
		// The original may be in use: the two must not be taken for one another.
		e.state.UUID = newUUID()
		e.state.Generation = 0
		e.had = true
	default:
		e.had = true
	}
	if e.state.Handoff != nil {
		how := endAborted
		if o.Reclaim {
			how, e.reclaimed = endReclaimed, true
		}
		e.state.end(e.state.Handoff.ID, how)
		e.state.Generation = 0
	}
	for _, m := range e.marks {
		if e.state.knows(m.ID) == "" {
			e.state.end(m.ID, endReclaimed)
			e.state.Ended[len(e.state.Ended)-1].Owner = m.Owner
			e.state.Generation = 0
			e.reclaimed = true
		}
	}
}

// openLive marks a disk as in use, under a new generation if it is not known
// what has changed since the last one began.
func (e *entry) openLive(o Options, boot string) {
	s := e.state
	e.crashed = s.Open
	if e.unchanged() && !s.Live {
		e.begin = &beginning{s.UUID, s.Generation, s.Cloned, e.now}
	}
	if s.Cloned && s.Handoff == nil {
		// A copy of it is in use as the disk that the image was, and must not pass for
		// the owner of this one. No destination has anything of this one.
		s.UUID, s.Cloned, s.Peer = newUUID(), false, nil
	}
	last := Run{Identity: s.identity(), Ended: !s.Open && e.unchanged(), Disk: e.now, State: e.where}
	killed := s.Open && e.kin == kinSame && s.Generation != 0 && boot != "" && s.BootID == boot
	if !s.Live || !last.Ended && !killed || o.Keep == nil || !o.Keep(e.name, last) {
		s.change(e.now)
	} else {
		e.crashed, e.had = false, false
	}
	s.Live, s.Open, s.BootID = true, true, boot
}

// bootID names the present boot of the host; empty: it is not known.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// Lacks returns why the i-th disk has no state file; nil if it has one.
func (l *Ledger) Lacks(i int) error { return l.disks[i].lacks }

// HandedOff reports whether the disks belong to a destination.
func (l *Ledger) HandedOff() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.handedOff
}

// Finished reports whether the destination has everything: nothing is left to do.
func (l *Ledger) Finished() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.finished
}

// Crashed are the names of disks whose last source did not end in order, so that
// what was copied before is not trusted.
func (l *Ledger) Crashed() []string {
	return l.disks.names(func(e *entry) bool { return e.crashed })
}

// Reclaimed are the names of disks that had been handed off.
func (l *Ledger) Reclaimed() []string {
	return l.disks.names(func(e *entry) bool { return e.reclaimed })
}

// Ended are the names of disks that had a source before, which ended in order:
// what was copied then is not trusted either, since it is not known what has
// changed.
func (l *Ledger) Ended() []string {
	return l.disks.names(func(e *entry) bool { return e.had && !e.crashed })
}

// Identity is that of the i-th disk.
func (l *Ledger) Identity(i int) migrate.Identity {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.disks[i].state == nil {
		return migrate.Identity{} // only of one that is finished
	}
	return l.disks[i].state.identity()
}

// Former are the devices to which the i-th disk was handed off once, and from which it
// has come back since or was taken back.
func (l *Ledger) Former(i int) (all []migrate.Device) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.disks[i].state == nil {
		return nil
	}
	for _, h := range l.disks[i].state.Ended {
		if d, err := uuid("owner", h.Owner); err == nil && h.How != endAborted {
			all = append(all, d)
		}
	}
	return all
}

// Note is what is noted about the i-th disk; nil: it is this host's. It never waits.
func (l *Ledger) Note(i int) *Note { return (*l.notes.Load())[i] }

// Where is the path of the i-th disk's state file; empty if there is none.
func (l *Ledger) Where(i int) string {
	if l.disks[i].lacks != nil {
		return ""
	}
	return l.disks[i].where
}

// Met returns the address of the destination that had a part of all the disks when
// their last source ended; empty if none had.
func (l *Ledger) Met() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := ""
	for i, e := range l.disks {
		if e.state == nil || e.lacks != nil || i > 0 && e.state.Met != at {
			return ""
		}
		at = e.state.Met
	}
	return at
}

// SetMet keeps what Met returns.
func (l *Ledger) SetMet(address string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var errs []error
	for _, e := range l.disks {
		e.state.Met = address
		errs = append(errs, l.save(e))
	}
	return errors.Join(errs...)
}

// Close notes that the disks are no longer written, and unlocks the state files.
func (l *Ledger) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	errs := []error{l.dropStaged()}
	for _, e := range l.disks {
		switch {
		case l.handedOff:
		case l.live:
			errs = append(errs, l.closeLive(e))
		case e.state.Disk != e.watch: // by our marks
			e.state.Disk = e.watch
			errs = append(errs, l.save(e))
		}
	}
	return errors.Join(append(errs, l.disks.unlock())...)
}

func (l *Ledger) closeLive(e *entry) error {
	now, err := e.disk.Stamp()
	if err != nil {
		return err
	}
	e.state.Open, e.state.Disk = false, now
	if b := e.begin; b != nil && b.disk.Unchanged(now) {
		// Nothing was written: it is what it was before.
		e.state.Live, e.state.BootID, e.state.Generation = false, "", b.generation
		if b.cloned && e.state.Peer == nil {
			e.state.UUID, e.state.Cloned = b.uuid, true
		}
	}
	return l.save(e)
}

func deviceDigits(d migrate.Device) string { return hex.EncodeToString(d[:]) }
