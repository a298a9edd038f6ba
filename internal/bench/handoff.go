package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/addr"
	"github.com/silo-nbd/silo-nbd/internal/control"
	"github.com/silo-nbd/silo-nbd/internal/link"
	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
)

const (
	writerRegion = 64 * mib               // at the start of the disk, where the steady writer writes
	writerPause  = 200 * time.Microsecond // between two writes
)

// handoffPart measures how long a writer waits in a handoff, from the answer to its last write at the source to that of
// its first one at the destination.
func handoffPart(ctx context.Context, b *bench) error {
	dirty := []int64{0, 100 * mib, gib}
	if b.quick {
		dirty = []int64{0, 4 * mib}
	}
	fmt.Println("   last write answered at the source to first at the destination, ms; median and most of the rounds")
	for _, trip := range []time.Duration{0, 5 * time.Millisecond, 30 * time.Millisecond} {
		for _, d := range dirty {
			var took []float64
			for range b.rounds {
				gap, err := b.handOff(ctx, trip, d, slices.Max(dirty)+writerRegion)
				if err != nil {
					return err
				}
				took = append(took, gap.Seconds()*1e3)
			}
			limit := (3*trip + 10*time.Millisecond).Seconds() * 1e3
			fmt.Printf("   round trip %2d ms, %4d MiB dirty: %6.1f  %6.1f   (3 round trips + 10 ms: %.0f)\n",
				trip.Milliseconds(), d/mib, median(took), percentile(took, 100), limit)
		}
	}
	return nil
}

// handOff makes one handoff of a disk of which so many bytes are dirty, and returns how long the writer waited.
func (b *bench) handOff(ctx context.Context, trip time.Duration, dirty, size int64) (time.Duration, error) {
	src, dst := filepath.Join(b.memory, "src.raw"), filepath.Join(b.memory, "dst.raw")
	if err := sparseFile(src, size); err != nil {
		return 0, err
	}
	defer os.Remove(src)
	defer os.Remove(dst)
	defer os.Remove(src + ".silo-nbd-source")
	m, between, err := b.liveMigration(ctx, src, dst, trip)
	if err != nil {
		return 0, err
	}
	defer between.Close()
	defer m.stop()
	first, err := m.source.ready("ready disk ")
	if err != nil {
		return 0, err
	}
	c, err := control.NewClient(filepath.Join(b.memory, "control.sock"))
	if err != nil {
		return 0, err
	}
	if err := settled(ctx, c); err != nil {
		return 0, err
	}
	if _, err := c.Pause(ctx); err != nil { // what is dirty stays it
		return 0, err
	}
	if err := makeDirty(ctx, first, dirty); err != nil {
		return 0, err
	}
	type result struct {
		gap time.Duration
		err error
	}
	waited := make(chan result, 1)
	go func() {
		gap, err := moveWriter(ctx, first, m.uri)
		waited <- result{gap, err}
	}()
	time.Sleep(100 * time.Millisecond) // a few hundred writes
	if err := c.Handoff(ctx); err != nil {
		return 0, err
	}
	r := <-waited
	return r.gap, r.err
}

// liveMigration starts a migration of a disk in use over a link.
func (b *bench) liveMigration(ctx context.Context, src, dst string, trip time.Duration) (*migration, *link.Link, error) {
	wire := "unix://" + filepath.Join(b.memory, "wire.sock")
	listen, err := addr.Parse("unix://" + filepath.Join(b.memory, "link.sock"))
	if err != nil {
		return nil, nil, err
	}
	target, err := addr.Parse(wire)
	if err != nil {
		return nil, nil, err
	}
	between, err := link.Listen(ctx, link.Options{Listen: listen, Target: target, Delay: trip / 2})
	if err != nil {
		return nil, nil, err
	}
	m, err := b.migrate(ctx, setup{src: src, dst: dst, listen: wire, connect: listen.String(), sourceArgs: []string{
		"--nbd", "unix://" + filepath.Join(b.memory, "src.sock"), "--control", filepath.Join(b.memory, "control.sock"),
	}})
	if err != nil {
		return nil, nil, errors.Join(err, between.Close())
	}
	return m, between, nil
}

// settled waits until all is at the destination.
func settled(ctx context.Context, c *control.Client) error {
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		st, err := c.Status(ctx)
		if err != nil {
			return err
		}
		if d := st.Disks[0]; d.Connected && d.Live.Pass > 0 && d.Done == d.Size {
			return nil
		}
	}
	return errors.New("the disk has not arrived within a minute")
}

// makeDirty writes behind the writer's region.
func makeDirty(ctx context.Context, uri string, bytes int64) error {
	c, err := nbdclient.Dial(ctx, uri)
	if err != nil {
		return err
	}
	defer c.Close()
	p := make([]byte, mib)
	_, _ = rand.NewChaCha8([32]byte{3}).Read(p) // never fails
	for off := int64(0); off < bytes; off += mib {
		if _, err := c.WriteAt(p, writerRegion+off); err != nil {
			return err
		}
	}
	return c.Flush()
}

// moveWriter writes at the first export until that refuses, then one block to the second, and returns how long that took
// since the last answer.
func moveWriter(ctx context.Context, first, second string) (time.Duration, error) {
	there, err := nbdclient.Dial(ctx, second)
	if err != nil {
		return 0, err
	}
	defer there.Close()
	here, err := nbdclient.Dial(ctx, first)
	if err != nil {
		return 0, err
	}
	defer here.Close()
	p := make([]byte, 4*kib)
	_, _ = rand.NewChaCha8([32]byte{4}).Read(p) // never fails
	for last := time.Now(); ; {
		time.Sleep(writerPause)
		off := rand.Int64N(writerRegion/int64(len(p))) * int64(len(p))
		_, err := here.WriteAt(p, off)
		if errors.Is(err, syscall.ESHUTDOWN) {
			_, err = there.WriteAt(p, off)
			return time.Since(last), err
		}
		if err != nil {
			return 0, err
		}
		last = time.Now()
	}
}
