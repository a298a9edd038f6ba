package migrate

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

var everyByte = flag.Bool("migrate.everybyte", false, "break the connection at every byte, not at some")

// cutAt lets n more bytes be written, then closes the connection.
type cutAt struct {
	net.Conn
	left  int64
	fired *atomic.Bool
}

func (c *cutAt) Write(p []byte) (int, error) {
	if int64(len(p)) <= c.left {
		n, err := c.Conn.Write(p)
		c.left -= int64(n)
		return n, err
	}
	n, _ := c.Conn.Write(p[:c.left])
	c.left -= int64(n)
	c.fired.Store(true)
	c.Conn.Close()
	return n, io.ErrClosedPipe
}

type plan struct {
	cut    int // which connection is cut at n, from 1
	toDest bool
	n      int64
	first  int64 // if cut==2: where connection 1 is cut (source to dest)
}

// runCut moves a small disk that a client uses meanwhile. It returns whether the cut fired and what went wrong.
func runCut(t *testing.T, p plan, srcListens, dstListens bool) (fired bool, bad string) {
	const size = 5*512 + 100
	store, want := testDisk(t, size, 3)
	want = bytes.Clone(want)
	src := newSource(t, SourceOptions{BlockSize: 512, Listening: srcListens}, SourceDisk{Name: "d", Store: store})
	dst := newDestination(t, DestinationOptions{Disks: 1, Listening: dstListens}, memory)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	srcC, dstC := make(chan io.ReadWriteCloser), make(chan io.ReadWriteCloser)
	var f atomic.Bool
	plug := make(chan struct{})
	go func() {
		defer close(plug)
		for k := 1; ; k++ {
			a, b := net.Pipe()
			var s, d io.ReadWriteCloser = a, b
			var none atomic.Bool
			if p.cut == 2 && k == 1 {
				s = &cutAt{a, p.first, &none}
			}
			if k == p.cut {
				if p.toDest {
					s = &cutAt{a, p.n, &f}
				} else {
					d = &cutAt{b, p.n, &f}
				}
			}
			select {
			case srcC <- s:
			case <-ctx.Done():
				return
			}
			select {
			case dstC <- d:
			case <-ctx.Done():
				return
			}
		}
	}()
	type res struct {
		who string
		err error
	}
	errs := make(chan res, 3)
	go func() { errs <- res{"source", src.Run(ctx, from(srcC))} }()
	go func() { errs <- res{"dest", dst.Run(ctx, from(dstC))} }()
	client := make(chan error, 1)
	go func() {
		select {
		case dev := <-dst.ready:
			w := bytes.Repeat([]byte{0xAB}, 700)
			if _, err := dev.WriteAtContext(ctx, w, 1000); err != nil {
				client <- err
				return
			}
			copy(want[1000:], w)
			b := make([]byte, 600)
			if _, err := dev.ReadAtContext(ctx, b, 2000); err != nil {
				client <- fmt.Errorf("read: %w", err)
				return
			}
			if !bytes.Equal(b, want[2000:2600]) {
				client <- fmt.Errorf("read wrong bytes")
				return
			}
			client <- nil
		case <-ctx.Done():
			client <- ctx.Err()
		}
	}()
	timeout := time.After(10 * time.Minute)
	for range 2 {
		select {
		case r := <-errs:
			if r.err != nil && bad == "" {
				bad = fmt.Sprintf("%s ended with: %v", r.who, r.err)
			}
		case <-timeout:
			if bad == "" {
				bad = "hang"
			}
			stop()
			timeout = nil
		}
		if bad != "" {
			stop()
		}
	}
	if bad == "" {
		if err := <-client; err != nil {
			bad = "client: " + err.Error()
		} else if !bytes.Equal(want, contents(t, dst.disks["d"])) {
			bad = "not equal"
		}
	}
	stop()
	<-plug
	_ = dst.Close()
	return f.Load(), bad
}

func TestConnectionMayBreakAtEveryByte(t *testing.T) {
	stride := 7 // another of the bytes in each run
	if *everyByte {
		stride = 1
	}
	for _, m := range []struct {
		name     string
		cut      int
		src, dst bool
	}{
		{"first/bothListen", 1, true, true},
		{"second/bothListen", 2, true, true},
	} {
		for _, toDest := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/toDest=%v", m.name, toDest), func(t *testing.T) {
				bads := map[string][]int64{}
				total := int64(0)
				for n := int64(rand.IntN(stride)); ; n += int64(stride) {
					var fired bool
					var bad string
					synctest.Test(t, func(t *testing.T) {
						fired, bad = runCut(t, plan{m.cut, toDest, n, 1500}, m.src, m.dst)
					})
					if bad != "" {
						bads[bad] = append(bads[bad], n)
					}
					if !fired {
						break
					}
					total = n
				}
				t.Logf("cut at 0..%d", total)
				for b, ns := range bads {
					t.Errorf("%d of %d cuts (first at byte %d, last %d): %s", len(ns), total, ns[0], ns[len(ns)-1], b)
				}
			})
		}
	}
}
