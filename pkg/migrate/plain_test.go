package migrate

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// rawPeer speaks frames and nothing else.
type rawPeer struct {
	conn io.ReadWriteCloser
	r    *bufio.Reader
	mu   sync.Mutex // one frame at a time goes out
	id   uint32     // guarded by mu
}

func newRawPeer(conn io.ReadWriteCloser) *rawPeer {
	return &rawPeer{conn: conn, r: bufio.NewReader(conn)}
}

type appender interface {
	AppendBinary([]byte) ([]byte, error)
}

// request sends m under a transaction id of its own.
func (p *rawPeer) request(dev uint32, m appender) (id uint32, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.id++
	return p.id, p.writeLocked(dev, p.id, m)
}

func (p *rawPeer) answer(dev, id uint32, m appender) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.writeLocked(dev, id, m)
}

func (p *rawPeer) writeLocked(dev, id uint32, m appender) error {
	packet, err := m.AppendBinary(nil)
	if err != nil {
		return err
	}
	_, err = p.conn.Write(append(wire.Header{Dev: dev, ID: id, Length: uint32(len(packet))}.Append(nil), packet...))
	return err
}

func (p *rawPeer) read() (h wire.Header, packet []byte, err error) {
	var head [wire.HeaderSize]byte
	if _, err := io.ReadFull(p.r, head[:]); err != nil {
		return h, nil, err
	}
	if err := h.UnmarshalBinary(head[:]); err != nil {
		return h, nil, err
	}
	packet = make([]byte, h.Length)
	_, err = io.ReadFull(p.r, packet)
	return h, packet, err
}

type bare wire.Command

func (b bare) AppendBinary(p []byte) ([]byte, error) { return append(p, byte(b)), nil }

// plainDestination takes disks as WIRE.md says that Silo's own destination
// does, and fails on whatever would kill or stall that one.
type plainDestination struct {
	*rawPeer
	needs int           // blocks to ask for once each device is known
	live  bool          // the source's disks are
	slow  time.Duration // before a block lands
	kept  *plainDevice  // what is here from an earlier connection

	answers sync.WaitGroup
	mu      sync.Mutex
	// Guarded by mu:
	devs       map[uint32]*plainDevice
	events     []wire.EventType // of all devices
	unanswered int
	err        error
}

type plainDevice struct {
	info      wire.DevInfo
	data      []byte
	inFlight  map[int64]bool // by offset
	held      map[int64]bool // what comes for these is answered, and not taken
	again     int            // blocks that came and were held
	completed bool
}

// device is the only one there is.
func (d *plainDestination) device() *plainDevice {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.devs[firstDevice]
}

// told says whether the event has come.
func (d *plainDestination) told(ev wire.EventType) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Contains(d.events, ev)
}

// run serves until the source closes the connection.
func (d *plainDestination) run() error {
	d.devs = make(map[uint32]*plainDevice)
	for {
		h, packet, err := d.read()
		if err != nil {
			d.answers.Wait()
			d.mu.Lock()
			defer d.mu.Unlock()
			if d.err == nil && err != io.EOF {
				d.err = err
			}
			return d.err
		}
		if err := d.take(h, packet); err != nil {
			d.answers.Wait()
			return err
		}
	}
}

func (d *plainDestination) take(h wire.Header, packet []byte) error {
	d.mu.Lock()
	dev := d.devs[h.Dev]
	d.mu.Unlock()
	if dev == nil {
		return d.begin(h, packet)
	}
	switch c := wire.Command(packet[0]); c {
	case wire.CommandWriteAt:
		return d.write(h, dev, packet)
	case wire.CommandEvent:
		d.mu.Lock()
		dev.completed = dev.completed || packet[1] == byte(wire.EventCompleted)
		d.events = append(d.events, wire.EventType(packet[1]))
		d.mu.Unlock()
		return d.answer(h.Dev, h.ID, bare(wire.CommandEventResponse))
	case wire.CommandDirtyList:
		if err := d.forget(dev, packet); err != nil {
			return err
		}
		return d.answer(h.Dev, h.ID, bare(wire.CommandDirtyListResponse))
	default:
		return fmt.Errorf("a plain destination is sent %v", c)
	}
}

// forget takes a dirty list: none of its blocks may be in flight.
func (d *plainDestination) forget(dev *plainDevice, packet []byte) error {
	var m wire.DirtyList
	if err := m.UnmarshalBinary(packet); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.live {
		return fmt.Errorf("a frozen source sends a dirty list of %d blocks", len(m.Blocks))
	}
	for _, b := range m.Blocks {
		if off := int64(b) * int64(m.BlockSize); off >= int64(dev.info.Size) || dev.inFlight[off] {
			return fmt.Errorf("a dirty list names block %d of %d bytes, which is in flight or past the end", b, m.BlockSize)
		}
		delete(dev.held, int64(b)*int64(m.BlockSize))
	}
	return nil
}

// begin decodes DevInfo as Silo does: what follows the schema is not looked at.
func (d *plainDestination) begin(h wire.Header, packet []byte) error {
	if h.ID == 0 || packet[0] != byte(wire.CommandDevInfo) {
		return fmt.Errorf("first packet: id %d, %x", h.ID, packet)
	}
	var dev plainDevice
	dev.info.Size = binary.LittleEndian.Uint64(packet[1:])
	dev.info.BlockSize = binary.LittleEndian.Uint32(packet[9:])
	name := int(binary.LittleEndian.Uint16(packet[13:]))
	dev.info.Name = string(packet[15 : 15+name])
	dev.data = make([]byte, dev.info.Size)
	dev.inFlight, dev.held = make(map[int64]bool), make(map[int64]bool)
	if d.kept != nil {
		dev.data, dev.held = d.kept.data, d.kept.held
	}
	d.mu.Lock()
	d.devs[h.Dev] = &dev
	d.mu.Unlock()
	for i := range d.needs { // a block at a time, from the end
		off := (int64(dev.info.Size)-1)/int64(dev.info.BlockSize)*int64(dev.info.BlockSize) - int64(i)*int64(dev.info.BlockSize)
		if off < 0 {
			break
		}
		d.answers.Go(func() {
			_, _ = d.request(h.Dev, &wire.NeedAt{Off: off, Length: int32(dev.info.BlockSize)}) // the source may have gone
		})
	}
	return nil
}

// write checks what Silo's destination does not survive, and answers later, in
// whatever order.
func (d *plainDestination) write(h wire.Header, dev *plainDevice, packet []byte) error {
	var m wire.WriteAt
	if err := m.UnmarshalBinary(packet); err != nil {
		return err
	}
	bs, size := int64(dev.info.BlockSize), int64(len(dev.data))
	want := min(bs, size-m.Off)
	data, err := m.Data, error(nil)
	if m.Type == wire.WriteRunLength {
		data, err = wire.ExpandRLE(nil, m.Data, bs)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.unanswered++
	switch {
	case err != nil:
		return err
	case m.Type != wire.WriteData && m.Type != wire.WriteRunLength:
		return fmt.Errorf("a WriteAt of type %d", m.Type)
	case m.Off%bs != 0 || int64(len(data)) != want:
		return fmt.Errorf("%d bytes at %d: want one aligned block", len(data), m.Off)
	case dev.inFlight[m.Off]:
		return fmt.Errorf("the block at %d was sent again before its answer", m.Off)
	case d.unanswered > 32:
		return fmt.Errorf("%d WriteAt without an answer", d.unanswered)
	}
	dev.inFlight[m.Off] = true
	data = bytes.Clone(data)
	d.answers.Go(func() {
		if d.slow > 0 {
			<-time.After(d.slow)
		}
		d.mu.Lock()
		if dev.held[m.Off] {
			dev.again++
		} else {
			copy(dev.data[m.Off:], data)
			dev.held[m.Off] = true
		}
		delete(dev.inFlight, m.Off)
		d.unanswered--
		d.mu.Unlock()
		_ = d.answer(h.Dev, h.ID, &wire.WriteAtResponse{Bytes: uint32(len(data))}) // the source may have gone
	})
	return nil
}

func TestPlainSiloDestinationIsFed(t *testing.T) {
	for _, blockSize := range []int64{4 << 10, 64 << 10, 1 << 20} {
		t.Run(fmt.Sprint(blockSize), func(t *testing.T) {
			var disks []SourceDisk
			want := make(map[string][]byte)
			for i, name := range []string{"a", "b", "c"} {
				store, data := testDisk(t, 3<<20+i*12345, uint64(i))
				disks = append(disks, SourceDisk{Name: name, Store: store})
				want[name] = data
			}
			src := newSource(t, SourceOptions{BlockSize: blockSize}, disks...)
			a, b := net.Pipe()
			d := &plainDestination{rawPeer: newRawPeer(b), needs: 3}
			var wg sync.WaitGroup
			var peerErr error
			wg.Go(func() { peerErr = d.run(); _ = b.Close() })
			require.NoError(t, src.Run(t.Context(), once(a)))
			wg.Wait()
			require.NoError(t, peerErr)
			for _, dev := range d.devs {
				require.True(t, dev.completed)
				require.True(t, bytes.Equal(want[dev.info.Name], dev.data), dev.info.Name)
				delete(want, dev.info.Name)
			}
			require.Empty(t, want)
		})
	}
}

// once is a Connector with one connection in it.
func once(conn io.ReadWriteCloser) Connector {
	c := make(chan io.ReadWriteCloser, 1)
	c <- conn
	return func(ctx context.Context) (io.ReadWriteCloser, error) {
		select {
		case conn := <-c:
			return conn, nil
		default:
			return nil, io.EOF
		}
	}
}

// plainSource sends a disk as WIRE.md says that Silo's own source does: many
// blocks in flight, events in rounds, the disk changing meanwhile.
type plainSource struct {
	*rawPeer
	rnd      *rand.Rand
	dev      uint32
	data     []byte
	block    int
	inFlight chan struct{} // capacity: the most blocks in flight

	mu sync.Mutex
	// Guarded by mu:
	waits  map[uint32]chan byte // by transaction id: the answer's command
	needed []int64              // offsets that the destination asked for
}

// readLoop takes the answers until the connection ends.
func (s *plainSource) readLoop() {
	for {
		h, packet, err := s.read()
		if err != nil {
			return
		}
		s.mu.Lock()
		switch c := wire.Command(packet[0]); {
		case c == wire.CommandNeedAt:
			var m wire.NeedAt
			if m.UnmarshalBinary(packet) == nil {
				s.needed = append(s.needed, m.Off)
			}
		case c.IsResponse():
			if w := s.waits[h.ID]; w != nil {
				w <- packet[0]
			}
		}
		s.mu.Unlock()
	}
}

// call sends m and returns what tells its answer's command.
func (s *plainSource) call(m appender) (chan byte, error) {
	s.mu.Lock()
	w := make(chan byte, 1)
	s.rawPeer.mu.Lock()
	s.waits[s.rawPeer.id+1] = w
	s.rawPeer.mu.Unlock()
	s.mu.Unlock()
	_, err := s.request(s.dev, m)
	return w, err
}

func (s *plainSource) sendBlocks(blocks []int) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, b := range blocks {
		off := b * s.block
		s.inFlight <- struct{}{}
		w, err := s.call(&wire.WriteAt{Off: int64(off), Data: s.data[off:min(off+s.block, len(s.data))]})
		if err != nil {
			return err
		}
		wg.Go(func() { <-w; <-s.inFlight })
	}
	return nil
}

func (s *plainSource) events(all ...wire.EventType) error {
	for _, ev := range all {
		w, err := s.call(&wire.Event{Type: ev})
		if err != nil {
			return err
		}
		if c := wire.Command(<-w); c != wire.CommandEventResponse {
			return fmt.Errorf("%v answered with %v", ev, c)
		}
	}
	return nil
}

func (s *plainSource) run() error {
	if _, err := s.request(s.dev, &wire.DevInfo{Size: uint64(len(s.data)), BlockSize: uint32(s.block), Name: "plain"}); err != nil {
		return err
	}
	n := (len(s.data)-1)/s.block + 1
	if err := s.sendBlocks(s.rnd.Perm(n)); err != nil {
		return err
	}
	for range 3 {
		if err := s.events(wire.EventPreLock, wire.EventPostLock, wire.EventPreUnlock, wire.EventPostUnlock); err != nil {
			return err
		}
		dirty := s.rnd.Perm(n)[:1+s.rnd.IntN(n)]
		list := wire.DirtyList{BlockSize: uint32(s.block)}
		for _, b := range dirty {
			list.Blocks = append(list.Blocks, uint32(b))
			s.data[b*s.block] ^= 0xff
		}
		w, err := s.call(&list)
		if err != nil {
			return err
		}
		<-w
		if err := s.sendBlocks(dirty); err != nil {
			return err
		}
	}
	return s.events(wire.EventPreLock, wire.EventPostLock, wire.EventCompleted)
}

func TestPlainSiloSourceIsTaken(t *testing.T) {
	for _, blockSize := range []int{4 << 10, 64 << 10, 1 << 20} {
		t.Run(fmt.Sprint(blockSize), func(t *testing.T) {
			_, data := testDisk(t, 5<<20+4321, 9)
			a, b := net.Pipe()
			s := &plainSource{
				rawPeer: newRawPeer(a), rnd: rand.New(rand.NewPCG(1, uint64(blockSize))), data: data, block: blockSize,
				inFlight: make(chan struct{}, 1000), waits: make(map[uint32]chan byte),
			}
			dst := newDestination(t, DestinationOptions{}, memory)
			var wg sync.WaitGroup
			var peerErr error
			wg.Go(s.readLoop)
			wg.Go(func() { peerErr = s.run(); _ = a.Close() })
			require.NoError(t, dst.Run(t.Context(), once(b)))
			wg.Wait()
			require.NoError(t, peerErr)
			require.True(t, bytes.Equal(s.data, contents(t, dst.disks["plain"])))
			require.NoError(t, dst.Close())
		})
	}
}

func TestCompletedWithABlockMissingIsNotBelieved(t *testing.T) {
	_, data := testDisk(t, 1<<20, 9)
	a, b := net.Pipe()
	s := &plainSource{
		rawPeer: newRawPeer(a), rnd: rand.New(rand.NewPCG(1, 1)), data: data, block: 4096,
		inFlight: make(chan struct{}, 1000), waits: make(map[uint32]chan byte),
	}
	dst := newDestination(t, DestinationOptions{}, memory)
	var wg sync.WaitGroup
	wg.Go(s.readLoop)
	wg.Go(func() {
		_, _ = s.request(0, &wire.DevInfo{Size: 1 << 20, BlockSize: 4096, Name: "plain"})
		_ = s.sendBlocks([]int{0, 1, 2, 4})
		_, _ = s.call(&wire.Event{Type: wire.EventCompleted}) // the connection ends instead of an answer
	})
	greeted, err := dst.session(t.Context(), newCaller(b))
	require.True(t, greeted)
	var incomplete *lazy.IncompleteError
	require.ErrorAs(t, err, &incomplete)
	wg.Wait()
	require.Equal(t, StateWaiting, dst.Status()[0].State)
	require.NoError(t, dst.Close())
}

// frame is a framed DevInfo.
func frame(t testing.TB, dev, id uint32, size uint64, blockSize uint32) []byte {
	t.Helper()
	packet, err := (&wire.DevInfo{Size: size, BlockSize: blockSize, Name: "x"}).AppendBinary(nil)
	require.NoError(t, err)
	return append(wire.Header{Dev: dev, ID: id, Length: uint32(len(packet))}.Append(nil), packet...)
}
