package lazy

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
)

var (
	// ErrMapInUse says that another process has the map, and so the disk.
	ErrMapInUse = fmt.Errorf("in use by another process: stop that one first: %w", syscall.EBUSY)
	// ErrNotMap says that a file is something else.
	ErrNotMap = errors.New("is not a map of silo-nbd: choose another path; it was not touched")
	// ErrMapNewer says that a map was made by a later version of this program.
	ErrMapNewer = errors.New("is a map of a later version of silo-nbd: use that version, or begin anew")
	// ErrMapDamaged says that a map is not as it was written. What is on its disk
	// cannot be told from what is not.
	ErrMapDamaged = errors.New("is a damaged map: restore it, or remove it and begin anew")
	// ErrMapMismatch says that a map belongs to another disk or another source.
	ErrMapMismatch = errors.New("is the map of something else")
)

// Map is the map of a device on disk: which of its blocks are here, durably. A
// map is for one Device; it is locked, so that no other process has it. The file
// is described in docs/MAP.md.
type Map struct {
	path   string
	file   mapFile
	layout layout
	log    *redo       // nil: none
	fresh  bool        // nothing was ever written to its disk by way of it
	used   atomic.Bool // a device has it
	mirror *mirror     // is told of each header; nil: none. Set before the device is used

	backing Backing // nil: not bound by this process
	borne   Mark    // by the backing, as far as is known

	mu   sync.Mutex
	head header // as it is in the file; guarded by mu, changed by update only
}

// CreateMap makes the map of a new device none of whose blocks is here, in
// standby. id.Device may be zero: then it gets one by chance. The file must not
// exist (os.ErrExist); when CreateMap returns it is on stable storage, with its
// directory entry. A crash leaves all of it, or nothing at path.
func CreateMap(path string, id Identity) (*Map, error) {
	if err := id.check(); err != nil {
		return nil, fmt.Errorf("%s: lazy: a map for %w", path, err)
	}
	if id.Device == (UUID{}) {
		id.Device = newUUID()
	}
	var m *Map
	file, err := createFile(path, func(f osFile) (err error) {
		m, err = newMap(f, id, logSize(id.Size))
		return err
	})
	switch {
	case errors.Is(err, os.ErrExist):
		return nil, fmt.Errorf("%s: a map is there already: go on with it, or remove it to begin anew: %w", path, os.ErrExist)
	case err != nil:
		return nil, fmt.Errorf("%s: create the map: %w", path, errno(err))
	}
	m.path, m.file = path, file
	return m, nil
}

// newUUID is a UUID of version 4.
func newUUID() (u UUID) {
	rand.Read(u[:]) // never fails
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return u
}

// maxReserve is how much space is taken beforehand for bits, in bytes.
const maxReserve = 16 << 20

// newMap writes a map to an empty file, with a log of so many bytes, or none.
func newMap(file mapFile, id Identity, log int64) (*Map, error) {
	m := &Map{file: file, fresh: true}
	m.head = header{version: mapVersion, seq: 1, state: MapStandby, id: id, log: log, epoch: newEpochs()}
	if log > 0 {
		m.head.flags |= flagLog
	}
	m.layout, m.log = m.head.layout(), newRedo(file, m.head)
	if err := file.Truncate(m.layout.size); err != nil {
		return nil, err
	}
	if err := m.reserve(); err != nil {
		return nil, err
	}
	slot := m.head.encode()
	if _, err := file.WriteAt(append(slot, slot...), 0); err != nil {
		return nil, err
	}
	return m, file.Sync()
}

// reserve takes space for the bits and the log.
func (m *Map) reserve() error {
	r, ok := m.file.(interface{ reserve(off, length int64) error })
	if !ok {
		return nil
	}
	if m.log != nil {
		if err := r.reserve(m.layout.end, m.layout.size-m.layout.end); err != nil {
			return err
		}
	}
	if bits := m.layout.page(2 * m.layout.pages); bits <= maxReserve {
		return r.reserve(0, bits)
	}
	return nil
}

// OpenMap opens a map that CreateMap made, to go on with it. What is not zero in
// want must be in the map, too (ErrMapMismatch). Nothing is changed that is
// refused. The errors say what to do, and are one of ErrMapInUse, ErrNotMap,
// ErrMapNewer, ErrMapDamaged, ErrMapMismatch, or of the file system.
func OpenMap(path string, want Identity) (*Map, error) {
	f, err := openFile(path, os.O_RDWR)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, errno(err))
	}
	m, err := lockMap(f, want)
	if err != nil {
		f.Close() // the error to report is the one before
		return nil, fmt.Errorf("%s: %w", path, errno(err))
	}
	m.path = path
	return m, nil
}

func openFile(path string, flags int) (osFile, error) {
	f, err := os.OpenFile(path, flags|syscall.O_NONBLOCK, 0) // a FIFO is no reason to hang
	if err != nil {
		return osFile{}, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = ErrNotMap
	}
	if err != nil {
		f.Close() // the error to report is the one before
	}
	return osFile{f}, err
}

func lockMap(f osFile, want Identity) (*Map, error) {
	if err := f.lockToOwn(); err != nil {
		return nil, err
	}
	return openMap(f, want)
}

// openMap reads the map in file, and makes sure that what it read is durable.
func openMap(file mapFile, want Identity) (*Map, error) {
	// An earlier process may have been killed before it could make durable what
	// it wrote. We believe it, so it has to be. And a sync that failed leaves the
	// pages in the cache, marked clean, as if they were on the device: no later sync
	// writes them, so they are dropped and read anew.
	if err := file.Sync(); err != nil {
		return nil, err
	}
	if err := file.Drop(); err != nil {
		return nil, err
	}
	head, stale, err := readHeader(file)
	if err != nil {
		return nil, err
	}
	if err := head.id.match(want); err != nil {
		return nil, err
	}
	if stale >= 0 {
		if err := writeFull(file, head.encode(), slotSize*stale); err != nil {
			return nil, err
		}
		if err := file.Sync(); err != nil {
			return nil, err
		}
	}
	return &Map{file: file, layout: head.layout(), log: newRedo(file, head), head: head}, nil
}

// readHeader reads the header and holds the size of the file against it.
func readHeader(file mapFile) (h header, stale int64, err error) {
	size, err := file.Size()
	if err != nil {
		return h, 0, err
	}
	if size < headerSize {
		b := make([]byte, min(size, int64(len(mapMagic))))
		if err := readFull(file, b, 0); err != nil {
			return h, 0, err
		}
		if len(b) == 0 || string(b) != mapMagic[:len(b)] {
			return h, 0, ErrNotMap
		}
		return h, 0, fmt.Errorf("%w: it has only %d bytes", ErrMapDamaged, size)
	}
	b := make([]byte, headerSize)
	if err := readFull(file, b, 0); err != nil {
		return h, 0, err
	}
	if h, stale, err = decodeHeader([2][]byte{b[:slotSize], b[slotSize:]}); err != nil {
		return h, 0, err
	}
	if want := h.layout().size; size != want && (h.state != MapComplete || size > want) {
		return h, 0, fmt.Errorf("%w: it has %d bytes, and should have %d", ErrMapDamaged, size, want)
	}
	return h, stale, nil
}

// match holds a map against what it is wanted to be.
func (id Identity) match(want Identity) error {
	mismatch := func(what string, is, want any) error {
		return fmt.Errorf("%w: its %s is %v, and %v is wanted: choose the right one, or remove it and begin anew", ErrMapMismatch, what, is, want)
	}
	switch {
	case want.Size != 0 && want.Size != id.Size:
		return mismatch("size in bytes", id.Size, want.Size)
	case want.BlockSize != 0 && want.BlockSize != id.BlockSize:
		return mismatch("block size in bytes", id.BlockSize, want.BlockSize)
	case want.Device != (UUID{}) && want.Device != id.Device:
		return mismatch("device", id.Device, want.Device)
	case want.Name != "" && want.Name != id.Name:
		return mismatch("source's name", id.Name, want.Name)
	case want.Source != (UUID{}) && want.Source != id.Source:
		return mismatch("source disk", id.Source, want.Source)
	case want.Generation != 0 && want.Generation != id.Generation:
		return mismatch("source's generation", id.Generation, want.Generation)
	}
	return nil
}

// Identity says what the map belongs to.
func (m *Map) Identity() Identity { return m.header().id }

// State is how far the device is, durably.
func (m *Map) State() MapState { return m.header().state }

// Path is where the map lies.
func (m *Map) Path() string { return m.path }

// Close unlocks the map. Close the device first.
func (m *Map) Close() error {
	if err := m.file.Close(); err != nil {
		return m.error("close", err)
	}
	return nil
}

func (m *Map) header() header {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.head
}

// update makes a change of the header durable, if it is one. One at a time.
func (m *Map) update(change func(h *header)) error {
	old := m.header()
	h := old
	if change(&h); h == old {
		return nil
	}
	return m.replaceHeader(h)
}

// replaceHeader makes h durable, with all that was written to the map before.
//
// The slots are written one after the other with a sync between them, so that
// one of them is always whole. The second is made durable by the next sync,
// whatever it is for; and since the next update begins with that slot, the one
// that is known to be durable is overwritten last. For the same reason an update
// that finds no room has changed nothing, and may be tried again.
func (m *Map) replaceHeader(h header) error {
	h.version = mapVersion
	h.seq++
	if m.mirror != nil {
		h.save++
		m.mirror.expect(h.save)
	}
	slot := h.encode()
	if err := writeFull(m.file, slot, slotSize*int64(h.seq&1)); err != nil {
		return m.error("write the header of", err)
	}
	m.mirror.reached(h.save)
	if err := m.file.Sync(); err != nil {
		return &finalError{m.error("sync", err)}
	}
	m.mu.Lock()
	m.head = h
	m.mu.Unlock()
	if err := writeFull(m.file, slot, slotSize*int64(1-h.seq&1)); err != nil && !noRoom(err) {
		return m.error("write the header of", err)
	} // without room the other copy is the one that counts: the next update begins with this one
	return nil
}

// shrink gives back all but the header of a map that is complete.
func (m *Map) shrink() error {
	size, err := m.file.Size()
	if err != nil || size == headerSize {
		return err
	}
	if err := m.file.Truncate(headerSize); err != nil {
		return err
	}
	return m.file.Sync()
}

func (m *Map) error(op string, err error) error {
	return fmt.Errorf("lazy: %s the map %s: %w", op, m.path, errno(err))
}

// errno takes off the operation and path that package os puts around an error
// number: ours are around it.
func errno(err error) error {
	switch e := err.(type) {
	case *os.PathError:
		return e.Err
	case *os.LinkError:
		return e.Err
	}
	return err
}

// readFull reads all of p, or says why not.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// writeFull writes all of p, or says why not.
func writeFull(w io.WriterAt, p []byte, off int64) error {
	n, err := w.WriteAt(p, off)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	return err
}
