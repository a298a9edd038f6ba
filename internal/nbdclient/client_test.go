package nbdclient

import (
	"bytes"
	"context"
	"encoding/hex"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestHandshakeBytes(t *testing.T) {
	var sent []byte
	got := make(chan struct{})
	c, err := against(t, func(s *fakeServer) {
		sent = s.handshake()
		close(got)
	})
	require.NoError(t, err)
	<-got
	require.Equal(t, "00000003"+"49484156454f5054"+"00000007"+"00000009"+"00000001"+"61"+"0001"+"0003", hex.EncodeToString(sent))
	require.EqualValues(t, 1<<20, c.Size())
	require.False(t, c.ReadOnly())
	require.Equal(t, maxPayload, c.payload())
}

func TestHandshakeRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		script func(*fakeServer)
		want   string
	}{
		"closes at once": {func(*fakeServer) {}, "the server closed the connection"},
		"speaks HTTP":    {func(s *fakeServer) { s.conn.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n")) }, "no NBD server"},
		"oldstyle":       {func(s *fakeServer) { s.send("4e42444d41474943", "0000420281861253", "0000") }, "newstyle"},
		"not fixed":      {func(s *fakeServer) { s.send("4e42444d41474943", "49484156454f5054", "0000") }, "fixed newstyle"},
		"unknown export": {func(s *fakeServer) {
			s.send(recordedGreeting)
			s.option()
			s.send("0003e889045565a9", "00000007", "80000006", "00000002", "6869")
		}, `export "a": there is no such export (the server says: "hi")`},
		"TLS only": {func(s *fakeServer) {
			s.send(recordedGreeting)
			s.option()
			s.send("0003e889045565a9", "00000007", "80000005", "00000000")
		}, "wants TLS"},
		"strange error": {func(s *fakeServer) {
			s.send(recordedGreeting)
			s.option()
			s.send("0003e889045565a9", "00000007", "80000042", "00000000")
		}, "error 0x80000042"},
		"no size": {func(s *fakeServer) { s.send(recordedGreeting); s.option(); s.send(recordedAck) }, "did not tell the size"},
		"answer of 4 GiB": {func(s *fakeServer) {
			s.send(recordedGreeting)
			s.option()
			s.send("0003e889045565a9", "00000007", "00000003", "ffffffff")
		}, "4294967295 bytes"},
		"wrong option": {func(s *fakeServer) {
			s.send(recordedGreeting)
			s.option()
			s.send("0003e889045565a9", "00000001", "00000003", "00000000")
		}, "no answer to option 7"},
		"cut in an answer": {func(s *fakeServer) { s.send(recordedGreeting); s.option(); s.send(recordedExport[:20]) }, "closed the connection"},
		"answers for ever": {func(s *fakeServer) {
			s.send(recordedGreeting)
			s.option()
			for range maxReplies {
				s.send(recordedBlocks)
			}
		}, "more than 128 answers"},
		"impossible size": {func(s *fakeServer) {
			s.send(recordedGreeting)
			s.option()
			s.send("0003e889045565a9", "00000007", "00000003", "0000000c", "0000", "ffffffffffffffff", "0001", recordedAck)
		}, "more than can be addressed"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := against(t, c.script)
			require.ErrorContains(t, err, c.want)
		})
	}
}

func TestSilentServerIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer theirs.Close()
		start := time.Now()
		_, err := New(context.Background(), ours, "a")
		require.Error(t, err)
		require.Equal(t, handshakeTimeout, time.Since(start))
	})
}

func TestCancelEndsHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer theirs.Close()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		start := time.Now()
		_, err := New(ctx, ours, "a")
		require.Error(t, err)
		require.Equal(t, time.Second, time.Since(start))
	})
}

func TestRepliesInAnyOrder(t *testing.T) {
	c, err := against(t, func(s *fakeServer) {
		s.handshake()
		first, _ := s.request()
		second, _ := s.request()
		s.reply(second.Cookie, 0, bytes.Repeat([]byte{byte(second.Off)}, int(second.Length)))
		s.reply(first.Cookie, 0, bytes.Repeat([]byte{byte(first.Off)}, int(first.Length)))
		s.request() // the goodbye
	})
	require.NoError(t, err)
	var wg sync.WaitGroup
	for off := range int64(2) {
		wg.Go(func() {
			p := make([]byte, 4)
			n, err := c.ReadAt(p, off)
			if n != 4 || err != nil || !bytes.Equal(p, bytes.Repeat([]byte{byte(off)}, 4)) {
				t.Errorf("read at %d: %d bytes, %x, %v", off, n, p, err)
			}
		})
	}
	wg.Wait()
}

func TestErrorReplies(t *testing.T) {
	c, err := against(t, func(s *fakeServer) {
		s.handshake()
		for range 2 {
			r, _ := s.request()
			s.reply(r.Cookie, uint32(syscall.ENOSPC), nil) // an error carries no data, also for a READ
		}
		r, _ := s.request()
		s.reply(r.Cookie, 0, nil)
		s.request()
	})
	require.NoError(t, err)
	_, err = c.ReadAt(make([]byte, 10), 3)
	require.ErrorIs(t, err, syscall.ENOSPC)
	var e *Error
	require.ErrorAs(t, err, &e)
	require.Equal(t, Error{Op: "read", Off: 3, Len: 10, Errno: syscall.ENOSPC}, *e)
	n, err := c.WriteAt(make([]byte, 10), 3)
	require.ErrorIs(t, err, syscall.ENOSPC)
	require.Zero(t, n)
	require.NoError(t, c.Flush(), "the connection must live on after an error reply")
}

func TestWriteThroughIsMarkedFUA(t *testing.T) {
	c, err := against(t, func(s *fakeServer) {
		s.handshake()
		for _, want := range []uint16{flagFUA, 0} {
			r, _ := s.request()
			if r.Flags != want || r.Type != cmdWrite {
				t.Errorf("flags %#x of command %d, want %#x of a write", r.Flags, r.Type, want)
			}
			s.reply(r.Cookie, 0, nil)
		}
		s.request()
	})
	require.NoError(t, err)
	n, err := c.WriteThroughAt(make([]byte, 512), 1024)
	require.NoError(t, err)
	require.Equal(t, 512, n)
	_, err = c.WriteAt(make([]byte, 512), 1024)
	require.NoError(t, err)
}

func TestReadStopsAtTheEnd(t *testing.T) {
	c, err := against(t, func(s *fakeServer) {
		s.handshake()
		r, _ := s.request()
		s.reply(r.Cookie, 0, make([]byte, r.Length))
		s.request()
	})
	require.NoError(t, err)
	n, err := c.ReadAt(make([]byte, 100), c.Size()-7)
	require.Equal(t, 7, n)
	require.ErrorIs(t, err, io.EOF)
	_, err = c.ReadAt(make([]byte, 1), c.Size()+1)
	require.ErrorIs(t, err, syscall.EINVAL)
}

func TestConnectionEndReachesEveryWaiter(t *testing.T) {
	for name, c := range map[string]struct {
		end  func(*fakeServer, fakeRequest)
		want string
	}{
		"closed":         {func(*fakeServer, fakeRequest) {}, "closed the connection"},
		"unknown cookie": {func(s *fakeServer, _ fakeRequest) { s.reply(99, 0, nil) }, "request 99"},
		"garbage":        {func(s *fakeServer, _ fakeRequest) { s.conn.Write(make([]byte, 16)) }, "magic 0x0"},
		"half an answer": {func(s *fakeServer, r fakeRequest) { s.reply(r.Cookie, 0, make([]byte, 5)) }, "middle of an answer"},
	} {
		t.Run(name, func(t *testing.T) {
			cl, err := against(t, func(s *fakeServer) {
				s.handshake()
				r, _ := s.request()
				s.request()
				c.end(s, r)
			})
			require.NoError(t, err)
			var wg sync.WaitGroup
			for range 2 {
				wg.Go(func() {
					_, err := cl.ReadAt(make([]byte, 10), 0)
					if err == nil {
						t.Error("a read succeeded though the server went away")
					}
					requireContains(t, err, c.want)
				})
			}
			wg.Wait()
			_, err = cl.ReadAt(make([]byte, 10), 0)
			require.ErrorIs(t, err, ErrClosed)
		})
	}
}

// mute is a connection that can be told to send nothing more.
type mute struct {
	net.Conn
	on atomic.Bool
}

func (m *mute) Write(p []byte) (int, error) {
	if m.on.Load() {
		return 0, syscall.ENETUNREACH
	}
	return m.Conn.Write(p)
}

func TestWhyARequestWasNotSentIsSaid(t *testing.T) {
	ours, theirs := net.Pipe()
	defer theirs.Close()
	go (&fakeServer{t, theirs}).handshake()
	conn := &mute{Conn: ours}
	cl, err := New(t.Context(), conn, "a")
	require.NoError(t, err)
	conn.on.Store(true)
	_, err = cl.ReadAt(make([]byte, 10), 0)
	require.ErrorIs(t, err, syscall.ENETUNREACH)
	require.ErrorContains(t, err, "could not be sent")
	require.NoError(t, cl.Close())
}

func requireContains(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil || !bytes.Contains([]byte(err.Error()), []byte(want)) {
		t.Errorf("error %q does not contain %q", err, want)
	}
}

func TestCloseWakesWaiters(t *testing.T) {
	asked := make(chan struct{})
	c, err := against(t, func(s *fakeServer) {
		s.handshake()
		s.request()
		close(asked)
		r, _ := s.request()
		if r.Type != cmdDisc {
			t.Errorf("the last request is %d, want NBD_CMD_DISC", r.Type)
		}
	})
	require.NoError(t, err)
	got := make(chan error)
	go func() { got <- c.Flush() }()
	<-asked
	require.NoError(t, c.Close())
	require.ErrorIs(t, <-got, ErrClosed)
	require.NoError(t, c.Close(), "closing twice")
	require.ErrorIs(t, c.Flush(), ErrClosed)
}

func TestLargeRequestsAreSplit(t *testing.T) {
	var offs []uint64
	c, err := against(t, func(s *fakeServer) {
		s.handshake()
		for {
			r, ok := s.request()
			if !ok || r.Type == cmdDisc {
				return
			}
			offs = append(offs, r.Off)
			s.reply(r.Cookie, 0, nil)
		}
	})
	require.NoError(t, err)
	n, err := c.WriteAt(make([]byte, maxPayload+1), 0)
	require.NoError(t, err)
	require.Equal(t, maxPayload+1, n)
	require.NoError(t, c.ZeroAt(0, 3*maxRange))
	require.NoError(t, c.TrimAt(1, 1))
	require.NoError(t, c.Close())
	require.Equal(t, []uint64{0, maxPayload, 0, maxRange, 2 * maxRange, 1}, offs)
}
