//go:build linux

package nbdexport

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// pipeDisk is a disk that takes payloads out of a pipe. part is called before each.
type pipeDisk struct {
	*disk

	lock sync.Mutex
	part func(off, length int64) error // guarded by lock; nil for nothing
}

// onPart has f called before each part from now on.
func (d *pipeDisk) onPart(f func(off, length int64) error) {
	d.lock.Lock()
	defer d.lock.Unlock()
	d.part = f
}

func (d *pipeDisk) CanSplice() bool { return true }

func (d *pipeDisk) SpliceAt(pipe int, off, length int64) error {
	if err := d.call("splice"); err != nil {
		return err
	}
	d.lock.Lock()
	part := d.part
	d.lock.Unlock()
	if part != nil {
		if err := part(off, length); err != nil {
			return err
		}
	}
	d.memory.mu.Lock()
	defer d.memory.mu.Unlock()
	for b := d.b[off : off+length]; len(b) > 0; {
		n, err := unix.Read(pipe, b)
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

func newPipeDisk(size int, part func(off, length int64) error) *pipeDisk {
	return &pipeDisk{disk: newDisk(size), part: part}
}

func noise(n int) []byte {
	b, r := make([]byte, n), rand.NewChaCha8([32]byte{})
	_, _ = r.Read(b) // never fails
	return b
}

// dialTCP serves d over TCP, too, and attaches there.
func dialTCP(t *testing.T, s *Server, mode replyMode) *rawClient {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	go s.Serve(ln) // ends with the server, which the test looks after
	nc, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	return newRawClient(t, nc).enter("", mode)
}

func TestLargePayloadsGoThroughThePipe(t *testing.T) {
	const size = 8 * mib
	eachMode(t, func(t *testing.T, mode replyMode) {
		var parts atomic.Int64
		d := newPipeDisk(size, nil)
		s, path := newTestServer(t, Options{pipeStuck: time.Hour}, Export{Backend: d})
		want, r := make([]byte, size), rand.New(rand.NewPCG(1, uint64(mode)))
		for i, c := range []*rawClient{dialRaw(t, path).enter("", mode), dialTCP(t, s, mode)} {
			before := parts.Load()
			for n := range 15 {
				length := pipePayload + r.IntN(2*mib)
				if n > 0 && r.IntN(4) == 0 {
					length = 1 + r.IntN(2*pipePage)
				}
				off := r.IntN(size - length)
				if r.IntN(2) == 0 {
					off &^= 4095
				}
				p := noise(length)
				p[0], p[length-1] = byte(n), byte(i)
				copy(want[off:], p)
				begin, end := int64(off), int64(off+length)
				d.onPart(func(off, length int64) error {
					parts.Add(1)
					if off+length != end && (off+length)%pipePage != 0 {
						return errors.New("a part ends inside a page")
					}
					if off < begin || off+length > end {
						return errors.New("a part of something else")
					}
					return nil
				})
				c.write(uint64(off), p)
			}
			d.onPart(nil)
			// The first did: of the others that depends on how slow they are found.
			require.Greater(t, parts.Load(), before, "nothing went through the pipe")
			got, e := c.read(0, 0, size)
			require.Equal(t, ok, e)
			require.True(t, bytes.Equal(want, got), "not what was written")
		}
	})
}

// A pipe takes so many pieces, however small, and a socket keeps those of a client
// that sends byte by byte apart: nobody may wait for a socket that has more, with
// a pipe that takes nothing more.
func TestAPayloadThatComesByteByByte(t *testing.T) {
	d := newPipeDisk(mib, nil)
	_, path := newTestServer(t, Options{pipeStuck: time.Hour}, Export{Backend: d})
	c := dialRaw(t, path).enter("", modeSimple)
	want := noise(pipePayload)
	c.request(cmdWrite, 0, 777, pipePayload)
	for i := range want {
		c.send(want[i : i+1])
	}
	require.Equal(t, ok, c.status(c.cookie))
	got, e := c.read(0, 777, pipePayload)
	require.Equal(t, ok, e)
	require.True(t, bytes.Equal(want, got), "not what was written")
}

func TestAPayloadThatFailsInItsMiddle(t *testing.T) {
	eachMode(t, func(t *testing.T, mode replyMode) {
		second := make(chan struct{})
		parts := 0
		d := newPipeDisk(4*mib, nil)
		d.onPart(func(int64, int64) error {
			if parts++; parts == 1 {
				close(second) // now the rest comes
				return nil
			}
			return syscall.ENOSPC
		})
		_, path := newTestServer(t, Options{pipeStuck: time.Hour}, Export{Backend: d})
		c := dialRaw(t, path).enter("", mode)
		p := noise(2 * mib)
		c.request(cmdWrite, 0, 0, uint64(len(p)), p[:64<<10])
		<-second
		c.send(p[64<<10:])
		require.Equal(t, errNoSpace, c.status(c.cookie))
		d.onPart(nil)
		c.write(100, p) // in step, and nothing of the first is left in a pipe
		got, e := c.read(0, 100, uint64(len(p)))
		require.Equal(t, ok, e)
		require.True(t, bytes.Equal(p, got), "not what was written")
	})
}

func TestFUAOfAPayloadThroughThePipeIsASync(t *testing.T) {
	d := newPipeDisk(mib, nil)
	_, path := newTestServer(t, Options{pipeStuck: time.Hour}, Export{Backend: d})
	c := dialRaw(t, path).enter("", modeSimple)
	require.Equal(t, ok, c.do(cmdWrite, cmdFlagFUA, 0, mib, noise(mib)))
	calls := d.called()
	require.Equal(t, "splice", calls[0])
	require.Equal(t, "sync", calls[len(calls)-1])
}

func TestReadOnlyTakesNoPayloadThroughThePipe(t *testing.T) {
	d := newPipeDisk(mib, nil)
	_, path := newTestServer(t, Options{pipeStuck: time.Hour}, Export{Backend: d, ReadOnly: true})
	c := dialRaw(t, path).enter("", modeSimple)
	require.Equal(t, errPerm, c.do(cmdWrite, 0, 0, mib, noise(mib)))
	require.Empty(t, d.called())
}

// N7: no part of a write of a client that has gone comes after its successor has begun.
func TestPartsOfADeadClientsWriteEndBeforeItsSuccessorBegins(t *testing.T) {
	entered, gate := make(chan struct{}, 100), make(chan struct{})
	d := newPipeDisk(2*mib, func(int64, int64) error {
		entered <- struct{}{}
		<-gate
		return nil
	})
	_, path := newTestServer(t, Options{pipeStuck: time.Hour}, Export{Name: "disk", Backend: d})
	old := dialRaw(t, path).enter("disk", modeSimple)
	old.request(cmdWrite, 0, 0, 2*mib, noise(100<<10)) // and never the rest
	<-entered
	old.send(noise(100 << 10))
	require.NoError(t, old.Close())

	next := dialSuccessor(t, path)
	close(gate)
	next.replies(optGo)
	require.Equal(t, []string{"splice"}, d.called(), "a part was written after the client had gone")
}

func TestClientsThatGoInAPayloadLeaveNoPipe(t *testing.T) {
	left := make(chan struct{}, 1)
	d := newPipeDisk(mib, nil)
	_, path := newTestServer(t, Options{pipeStuck: time.Hour, OnDisconnect: func(string, int) { left <- struct{}{} }}, Export{Backend: d})
	before := openPipes(t)
	for range 50 {
		c := dialRaw(t, path).enter("", modeSimple)
		c.write(0, noise(pipePayload))
		c.request(cmdWrite, 0, 0, mib, noise(64<<10))
		require.NoError(t, c.Close())
		<-left
	}
	require.Equal(t, before, openPipes(t))
}

// openPipes is how many ends of pipes this process has.
func openPipes(t *testing.T) (n int) {
	fds, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	for _, fd := range fds {
		if to, err := os.Readlink(filepath.Join("/proc/self/fd", fd.Name())); err == nil && len(to) > 4 && to[:4] == "pipe" {
			n++
		}
	}
	return n
}

// payloadConn is a connection of which a test is the leader, and its client, which
// has sent p; ahead bytes of that were read ahead.
func payloadConn(t *testing.T, o Options, d *pipeDisk, p []byte, ahead int) (*conn, *net.UnixConn) {
	server, client, err := socketPair()
	require.NoError(t, err)
	c := pipeConn(t, o, d, server, client)
	_, err = client.Write(p)
	require.NoError(t, err)
	require.NoError(t, c.in.fill(ahead))
	return c, client
}

// pipeConn is server of a connection of which a test is the leader.
func pipeConn(t *testing.T, o Options, d *pipeDisk, server, client net.Conn) *conn {
	c := &conn{s: NewServer(o), nc: server, store: &store{splicer: d}, in: newReader(server, readBuffer)}
	t.Cleanup(func() {
		c.pipe.close()
		server.Close()
		client.Close()
	})
	require.True(t, c.mayPipe(pipePayload))
	return c
}

// wantPayload wants p to be written to the start of d, or to be in memory and next.
func (r *request) wantPayload(t *testing.T, d *pipeDisk, p []byte) {
	got, charged := slices.Clone(d.b[:r.written]), int64(0)
	for _, s := range r.segments {
		got = append(got, s.buf.b[:s.n]...)
		charged += int64(bufferSize(s.n))
	}
	require.Equal(t, charged, r.charged)
	require.True(t, bytes.Equal(p, got), "%d bytes of %d, or not what was sent", len(got), len(p))
	r.dropData()
}

func TestASlowBackendGetsPayloadsInOnePiece(t *testing.T) {
	p, sent := noise(pipePayload+777), 99_999
	d := newPipeDisk(mib, nil)
	c, client := payloadConn(t, Options{}, d, p[:sent], 10_000)
	parts := 0
	d.onPart(func(int64, int64) error {
		if parts++; parts == 1 {
			pass(2 * defaultPipeStuck)
			_, err := client.Write(p[sent:])
			require.NoError(t, err)
		}
		return nil
	})
	r := &request{c: c}
	require.NoError(t, r.receiveWrite(len(p)))
	require.Equal(t, 1, parts, "the rest of the payload went on so")
	require.NotEmpty(t, r.segments)
	r.wantPayload(t, d, p)
	for range pipeRest {
		require.False(t, c.mayPipe(pipePayload))
	}
	require.True(t, c.mayPipe(pipePayload), "not tried again")

	c.pace.workers = true
	require.False(t, c.mayPipe(pipePayload), "a worker would write it while others are read")
	c.pace.workers = false
	require.False(t, c.mayPipe(pipePayload-1))
	require.False(t, c.mayPipe(bigRequest))
}

func TestASocketWithoutSpliceIsReadTheOrdinaryWay(t *testing.T) {
	p := noise(pipePayload)
	for _, ahead := range []int{0, 5000} {
		d := newPipeDisk(mib, nil)
		c, _ := payloadConn(t, Options{pipeStuck: time.Hour}, d, p, ahead)
		null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
		require.NoError(t, err)
		defer null.Close()
		require.NoError(t, c.pipe.put(c.in.buf[:c.in.w])) // what null would take
		w := c.pipe.w
		c.pipe.w = int(null.Fd()) // no pipe: EINVAL, as of a socket that has no splice
		r := &request{c: c}
		require.NoError(t, r.receiveWrite(len(p)))
		c.pipe.w = w
		require.Empty(t, d.called())
		r.wantPayload(t, d, p)
		require.False(t, c.mayPipe(pipePayload), "tried again")
	}
}

// splice(2) does not get past urgent data, and the socket says all the time that
// there is something to be read.
func TestUrgentDataHoldsNoPayloadUp(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	client, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	server, err := ln.Accept()
	require.NoError(t, err)
	d, p := newPipeDisk(mib, nil), noise(pipePayload)
	c := pipeConn(t, Options{pipeStuck: time.Hour}, d, server, client)

	_, err = client.Write(p[:5000])
	require.NoError(t, err)
	require.NoError(t, c.in.fill(5000))
	raw, err := client.(*net.TCPConn).SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) { err = unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil) }))
	require.NoError(t, err)
	_, err = client.Write(p[5000:6000])
	require.NoError(t, err)
	received := make(chan error, 1)
	r := &request{c: c}
	go func() { received <- r.receiveWrite(len(p)) }()
	require.Eventually(t, func() bool { // it is read, whatever comes after it
		n := 0
		raw, err := server.(*net.TCPConn).SyscallConn()
		require.NoError(t, err)
		require.NoError(t, raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) }))
		require.NoError(t, err)
		return n == 0
	}, 10*time.Second, time.Millisecond)
	_, err = client.Write(p[6000:])
	require.NoError(t, err)
	require.NoError(t, <-received)
	r.wantPayload(t, d, p)
	require.False(t, c.mayPipe(pipePayload))
}

// Who is waited for holds no more memory than he uses.
func TestWhoSendsNoMoreHoldsLittle(t *testing.T) {
	p, sent := noise(mib), pipeSize+1000
	d := newPipeDisk(mib, nil)
	c, client := payloadConn(t, Options{pipeStuck: time.Hour}, d, p[:pipePayload], readBuffer)
	received := make(chan error, 1)
	r := &request{c: c}
	go func() { received <- r.receiveWrite(len(p)) }()
	_, err := client.Write(p[pipePayload:sent])
	require.NoError(t, err)
	require.Eventually(t, func() bool { return c.s.budget.used.Load() == firstSegment && len(d.called()) > 0 }, 10*time.Second, time.Millisecond)
	_, err = client.Write(p[sent:])
	require.NoError(t, err)
	require.NoError(t, <-received)
	require.Zero(t, c.s.budget.used.Load())
	r.wantPayload(t, d, p)
}

// P1: memory of the kernel's is memory of ours.
func TestWhatIsInThePipeIsCharged(t *testing.T) {
	const size = 24 * pipePayload
	for name, c := range map[string]struct{ taken, most int64 }{
		"all is free":           {0, pipeSize},
		"two segments are free": {defaultMemoryBudget - 2*firstSegment, 2 * firstSegment},
		"nothing is free":       {defaultMemoryBudget, firstSegment},
	} {
		t.Run(name, func(t *testing.T) {
			d, p := newPipeDisk(size, nil), noise(size)
			conn, client := payloadConn(t, Options{pipeStuck: time.Hour}, d, p[:pipePayload], readBuffer)
			budget, r, longest := &conn.s.budget, &request{c: conn}, int64(0)
			require.True(t, budget.try(c.taken))
			d.onPart(func(_, length int64) error {
				longest = max(longest, length)
				if held := inPipe(t, conn.pipe.r); held > r.charged || r.charged > c.most {
					return fmt.Errorf("%d bytes in the pipe, %d charged", held, r.charged)
				}
				return nil
			})
			sent := make(chan error, 1)
			go func() {
				_, err := client.Write(p[pipePayload:])
				sent <- err
			}()
			require.NoError(t, r.receiveWrite(size))
			require.NoError(t, <-sent)
			require.Equal(t, ok, r.err)
			require.Equal(t, c.taken, budget.used.Load(), "not given back")
			require.False(t, conn.allowance.Load())
			require.LessOrEqual(t, longest, c.most)
			r.wantPayload(t, d, p)
		})
	}
}

// inPipe is how many bytes are in a pipe.
func inPipe(t *testing.T, fd int) int64 {
	n, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
	require.NoError(t, err)
	return int64(n)
}

func TestWithoutMemoryForThePipeAPayloadWaits(t *testing.T) {
	d, p := newPipeDisk(mib, nil), noise(pipePayload)
	c, _ := payloadConn(t, Options{}, d, p, 100)
	require.True(t, c.s.budget.try(defaultMemoryBudget))
	c.allowance.Store(true)
	r, done := &request{c: c}, make(chan error, 1)
	go func() { done <- r.receiveWrite(len(p)) }()
	require.Eventually(t, func() bool { return c.s.budget.queue.Load() == 1 }, 10*time.Second, time.Millisecond)
	c.s.budget.release(defaultMemoryBudget)
	require.NoError(t, <-done)
	require.Empty(t, d.called())
	r.wantPayload(t, d, p)
	require.Zero(t, c.s.budget.used.Load())
}

// wrapped is a connection that changes what it reads, and is made of a socket.
type wrapped struct{ *net.UnixConn }

func (w wrapped) Read(p []byte) (int, error) {
	n, err := w.UnixConn.Read(p)
	for i := range p[:n] {
		p[i] ^= 0xff
	}
	return n, err
}

func TestOnlyASocketItselfIsSpliced(t *testing.T) {
	a, b, err := socketPair()
	require.NoError(t, err)
	defer a.Close()
	defer b.Close()
	p := newPipe(a)
	require.NotNil(t, p)
	require.True(t, p.grow(readBuffer))
	require.False(t, p.grow(readBuffer/2), "what was read ahead does not fit")
	p.close()
	require.Nil(t, newPipe(wrapped{a}), "it would read past the wrapper")
	client, server := net.Pipe()
	defer client.Close()
	require.Nil(t, newPipe(server))
}

func socketPair() (a, b *net.UnixConn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	conns := make([]*net.UnixConn, 2)
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			return nil, nil, err
		}
		conns[i] = c.(*net.UnixConn)
	}
	return conns[0], conns[1], nil
}

func BenchmarkPayloadThroughThePipe(b *testing.B) {
	d := &quietPipeDisk{newMemory(mib)}
	_, path := newTestServer(b, Options{}, Export{Backend: d})
	c := dialRaw(b, path).enter("", modeSimple)
	require.NoError(b, c.SetDeadline(noDeadline))
	all := append(packRequest(modeSimple, cmdWrite, 0, 1, 0, mib), noise(mib)...)
	reply := make([]byte, simpleReplyLen)
	b.SetBytes(mib)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Write(all); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(c, reply); err != nil {
			b.Fatal(err)
		}
	}
}

// quietPipeDisk is a pipeDisk that allocates nothing.
type quietPipeDisk struct{ *memory }

func (d *quietPipeDisk) CanSplice() bool { return true }

func (d *quietPipeDisk) SpliceAt(pipe int, off, length int64) error {
	for length > 0 {
		n, err := unix.Read(pipe, d.b[off:off+length])
		if err != nil {
			return err
		}
		off += int64(n)
		length -= int64(n)
	}
	return nil
}
