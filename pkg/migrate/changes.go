package migrate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"
	"sync/atomic"

	"github.com/silo-nbd/silo-nbd/pkg/storage/bootfile"
)

// Changes is what a live source knows of its disk and of the destination, in memory
// that outlives the process: which blocks were written since they were sent, and which
// device was met last, in which state. A source that is started again goes on with it,
// under the same generation, unless the host was started anew meanwhile. Whether
// another program has written the disk since is for the caller to find out.
//
// It belongs to one Tracker.
type Changes struct {
	mem   bootMemory
	geo   geometry
	head  []atomic.Uint64
	dirty atomicBitmap
	kept  bool
	uuid  [16]byte
	valid atomic.Bool // another process may go on with it
	clock clock
}

// ChangesOptions say whose changes they are.
type ChangesOptions struct {
	RunDir    string   // a directory that lives as long as the boot
	Disk      Identity // with the generation that the changes are counted from
	Size      int64    // of the disk, in bytes
	BlockSize int64    // of the migration, in bytes
}

// bootMemory is memory that lives as long as the boot: see bootfile.File.
type bootMemory interface {
	Kept() bool
	Bytes() []byte
	Reserve(off, length int64) error
	Validate()
	Forget() error
	Close() error
}

// changesVersion is that of the layout below.
const changesVersion = 2

// Words of the first page. The peer is there twice, and one word says which counts: a
// process may be killed while it writes the other.
const (
	changesGeneration = iota
	changesSize
	changesBlockSize
	changesBegun // when the last write began, in nanoseconds since 1970
	changesEnded // when the last write ended
	changesClock // by how much the time of day was ahead of the time since the boot then, in nanoseconds
	changesPeer  // which of the two counts
	changesPeers // here they begin
	peerWords    = 6
)

const changesHead = 4096 // bytes

// maxChanges is how large the bits may be, in bytes. They take memory all at once.
const maxChanges = 64 << 20

// OpenChanges opens what an earlier process of this boot has left of the disk, or
// begins anew if there is nothing of this generation: Kept reports which.
func OpenChanges(o ChangesOptions) (*Changes, error) {
	name := fmt.Sprintf("%x.source", o.Disk.UUID)
	return openChanges(o, func(size int64) (bootMemory, error) {
		return bootfile.Open(o.RunDir, name, changesVersion, size)
	})
}

func openChanges(o ChangesOptions, open func(size int64) (bootMemory, error)) (*Changes, error) {
	geo, err := newGeometry(o.Size, o.BlockSize)
	if err != nil {
		return nil, fmt.Errorf("migrate: %w", err)
	}
	size := (geo.blocks + 63) / 64 * 8
	if size > maxChanges {
		return nil, fmt.Errorf("migrate: what changes would take %d MiB of memory, and at most %d are taken: choose larger blocks", size>>20, maxChanges>>20)
	}
	for range 2 {
		mem, err := open(changesHead + size)
		if err != nil {
			return nil, err
		}
		if err := mem.Reserve(0, changesHead+size); err != nil {
			return nil, errors.Join(err, mem.Close())
		}
		words := bootfile.Words(mem.Bytes())
		c := &Changes{mem: mem, geo: geo, head: words[:changesHead/8], dirty: atomicBitmap(words[changesHead/8:]), kept: mem.Kept(), uuid: o.Disk.UUID, clock: systemClock}
		if !c.kept {
			c.head[changesGeneration].Store(o.Disk.Generation)
			c.head[changesSize].Store(uint64(o.Size))
			c.head[changesBlockSize].Store(uint64(o.BlockSize))
			return c, nil
		}
		if c.belongs(o) {
			c.valid.Store(true)
			return c, nil
		}
		if err := c.Forget(); err != nil {
			return nil, err
		}
	}
	return nil, errors.New("migrate: what an earlier process has left cannot be removed")
}

// belongs reports whether what was kept is about these contents of the disk.
func (c *Changes) belongs(o ChangesOptions) bool {
	return c.head[changesGeneration].Load() == o.Disk.Generation && o.Disk.Generation != 0 &&
		c.head[changesSize].Load() == uint64(o.Size) && c.head[changesBlockSize].Load() == uint64(o.BlockSize)
}

// Kept reports whether an earlier process has left what it knew.
func (c *Changes) Kept() bool { return c.kept }

// dirt is what remembers the changes from now on.
func (c *Changes) dirt() *dirt {
	d := newDirtOver(c.geo, c.dirty)
	for w := range c.dirty {
		d.count.Add(int64(bits.OnesCount64(c.dirty[w].Load())))
	}
	return d
}

// put keeps what is known of the destination.
func (c *Changes) put(p LastPeer) {
	next := 1 - c.head[changesPeer].Load()&1
	w := c.head[changesPeers+peerWords*next:][:peerWords]
	w[0].Store(binary.LittleEndian.Uint64(p.Device[:8]))
	w[1].Store(binary.LittleEndian.Uint64(p.Device[8:]))
	w[2].Store(p.Epoch)
	w[3].Store(uint64(p.Steps))
	w[4].Store(uint64(p.Pending))
	w[5].Store(bitOf(p.Taken)<<1 | bitOf(p.Met))
	c.head[changesPeer].Store(next)
}

// peer is what put has kept last.
func (c *Changes) peer() (p LastPeer) {
	w := c.head[changesPeers+peerWords*(c.head[changesPeer].Load()&1):][:peerWords]
	binary.LittleEndian.PutUint64(p.Device[:8], w[0].Load())
	binary.LittleEndian.PutUint64(p.Device[8:], w[1].Load())
	p.Epoch = w[2].Load()
	p.Steps = uint32(w[3].Load())
	p.Pending = uint32(w[4].Load())
	p.Taken, p.Met = w[5].Load()&2 != 0, w[5].Load()&1 != 0
	return p
}

func bitOf(b bool) uint64 {
	if b {
		return 1
	}
	return 0
}

// invalidate has the next process begin anew: the disk was handed off, or its changes
// are remembered otherwise.
func (c *Changes) invalidate() {
	if c != nil {
		c.valid.Store(false)
		_ = c.mem.Forget() // what cannot be removed does not count any more all the same
	}
}

// savedMagic begins what Saved returns: then come words in little-endian order (the
// disk's UUID, the first page up to the peers, the peer, the bits), and a CRC32C.
const savedMagic = "silo-chg"

// Saved is all of it, for a file that outlives the boot; nil if there is nothing that
// another process could use. Nobody may write the disk any more. Whoever goes on with it
// must remove the file before the disk is written.
func (c *Changes) Saved() []byte {
	if !c.valid.Load() {
		return nil
	}
	b := append([]byte(savedMagic), c.uuid[:]...)
	for i := range c.head[:changesPeer] {
		b = binary.LittleEndian.AppendUint64(b, c.head[i].Load())
	}
	at := changesPeers + peerWords*(c.head[changesPeer].Load()&1)
	for i := range c.head[at : at+peerWords] {
		b = binary.LittleEndian.AppendUint64(b, c.head[at+uint64(i)].Load())
	}
	for i := range c.dirty {
		b = binary.LittleEndian.AppendUint64(b, c.dirty[i].Load())
	}
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Restore takes what Saved has returned, if it is of these contents of the disk: then
// it is as if an earlier process of this boot had left it. It is for Changes that are
// not Kept, before their Tracker is made.
func (c *Changes) Restore(b []byte) error {
	const fixed = len(savedMagic) + 16
	want := fixed + 8*(changesPeer+peerWords+len(c.dirty)) + 4
	if len(b) != want || string(b[:len(savedMagic)]) != savedMagic || [16]byte(b[len(savedMagic):fixed]) != c.uuid {
		return errors.New("migrate: these are not the changes of this disk")
	}
	if crc32.Checksum(b[:want-4], castagnoli) != binary.LittleEndian.Uint32(b[want-4:]) {
		return errors.New("migrate: what has changed is damaged")
	}
	word := func(i int) uint64 { return binary.LittleEndian.Uint64(b[fixed+8*i:]) }
	for _, i := range [...]int{changesGeneration, changesSize, changesBlockSize} {
		if word(i) != c.head[i].Load() {
			return errors.New("migrate: these are changes of other contents, or in other blocks")
		}
	}
	c.head[changesBegun].Store(word(changesBegun))
	c.head[changesEnded].Store(word(changesEnded))
	c.head[changesClock].Store(uint64(c.clock().ahead)) // that of another boot says nothing
	c.head[changesPeer].Store(0)
	for i := range peerWords {
		c.head[changesPeers+i].Store(word(changesPeer + i))
	}
	for i := range c.dirty {
		c.dirty[i].Store(word(changesPeer + peerWords + i))
	}
	c.kept = true
	c.validate()
	return nil
}

// validate has it count from now on.
func (c *Changes) validate() {
	c.valid.Store(true)
	c.mem.Validate()
}

// Forget ends it for good: the changes are not known any more.
func (c *Changes) Forget() error { return errors.Join(c.mem.Forget(), c.mem.Close()) }

// Close leaves it to the next process. Nobody may write the disk any more.
func (c *Changes) Close() error { return c.mem.Close() }
