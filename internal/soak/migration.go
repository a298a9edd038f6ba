package soak

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/addr"
	"github.com/silo-nbd/silo-nbd/internal/link"
)

const (
	kib = 1 << 10
	mib = 1 << 20

	// moveTime is how long a migration may take from the moment at which nothing
	// is done to it any more. Longer than that it hangs.
	moveTime = 2 * time.Minute
	// metTime is how long a source may take to find that the destination, to
	// which it was connecting, has died.
	metTime = 5 * time.Second
)

// migration is a source and a destination with a link between them, and what
// the destination's clients know.
type migration struct {
	o     *Options
	sum   *Summary
	r     *rand.Rand // of the round; one goroutine uses it
	dir   string
	block int64
	rate  int64 // of the link, bytes per second

	destListens bool // else the source does
	exits       bool // dest ends by itself when complete

	link         *link.Link
	listen       addr.Addr // of the side that listens
	nbd          string
	source, dest *proc
	sourceDone   bool // it has said that all is moved
	hardlyMet    int  // cuts in a row after which nothing may have moved
	destLost     bool // the destination was killed since the source was started

	disk    *disk    // of the clients here
	fioDisk *fioDisk // of fio; nil: there is none
	clients *clients // nil: none are attached
}

// disk is a disk of the migration.
type disk struct {
	name     string
	src, dst string // paths
	size     int64  // bytes
	base     *os.File
	sum      uint32 // of the source's disk
	model    *model
}

// newMigration makes the disks and the link. What it is like is up to chance.
func newMigration(ctx context.Context, o *Options, sum *Summary, r *rand.Rand, dir, kind string) (*migration, error) {
	m := &migration{
		o: o, sum: sum, r: r, dir: dir,
		block:       []int64{4 * kib, 64 * kib, 64 * kib, 64 * kib, 256 * kib}[r.IntN(5)],
		destListens: r.IntN(3) == 0,
		exits:       r.IntN(3) == 0,
	}
	size := 8*mib + r.Int64N(16*mib)
	if kind == Cut { // so much that it lasts for all cuts
		m.block = min(m.block, 64*kib)
		size += 400 * m.block
	}
	if r.IntN(2) == 0 {
		size = size / m.block * m.block // else the last block is short, and so may be the last sector
	}
	var err error
	if m.disk, err = m.newDisk("a", size); err != nil {
		return nil, err
	}
	if o.Fio != "" && r.IntN(3) == 0 {
		d, err := m.newDisk("b", 8*mib)
		if err != nil {
			return nil, err
		}
		m.fioDisk = &fioDisk{disk: d}
	}
	return m, m.connect(ctx)
}

// connect chooses the addresses and starts the link.
func (m *migration) connect(ctx context.Context) error {
	wire, between := "unix://"+filepath.Join(m.dir, "wire"), "unix://"+filepath.Join(m.dir, "link")
	m.nbd = "unix://" + filepath.Join(m.dir, "nbd")
	if m.r.IntN(2) == 0 {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		wire, between = "tcp://"+ln.Addr().String(), "tcp://127.0.0.1:0"
		if err := ln.Close(); err != nil {
			return err
		}
	}
	var err error
	if m.listen, err = addr.Parse(wire); err != nil {
		return err
	}
	at, err := addr.Parse(between)
	if err != nil {
		return err
	}
	m.link, err = link.Listen(ctx, link.Options{
		Listen: at, Target: m.listen, Rate: m.rate, Delay: time.Duration(m.r.Int64N(3)) * time.Millisecond,
	})
	return err
}

// newDisk makes a source's disk: noise, with holes.
func (m *migration) newDisk(name string, size int64) (*disk, error) {
	d := &disk{name: name, size: size, src: filepath.Join(m.dir, name+".src"), dst: filepath.Join(m.dir, name+".dst")}
	f, err := os.Create(d.src)
	if err != nil {
		return nil, err
	}
	noise := rand.NewChaCha8([32]byte{byte(m.r.Uint32()), byte(m.r.Uint32()), byte(m.r.Uint32())})
	err = f.Truncate(size)
	p := make([]byte, 256*kib)
	for off := int64(0); off < size && err == nil; off += int64(len(p)) {
		if m.r.IntN(6) == 0 {
			continue // a hole
		}
		_, _ = noise.Read(p) // never fails
		_, err = f.WriteAt(p[:min(int64(len(p)), size-off)], off)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	if d.base, err = os.Open(d.src); err != nil {
		return nil, err
	}
	d.model = newModel(m.r.Uint64(), d.base, size)
	d.sum, err = sumOf(d.base)
	return d, err
}

// close ends what runs and forgets the disks.
func (m *migration) close() {
	if m.clients != nil {
		m.clients.close()
	}
	m.source.kill()
	m.dest.kill()
	if m.link != nil {
		_ = m.link.Close() // nobody uses it any more
	}
	for _, d := range m.disks() {
		_ = d.base.Close() // only read
	}
}

// dump leaves the stacks of both programs in their logs.
func (m *migration) dump() {
	for _, p := range []*proc{m.source, m.dest} {
		if p != nil && p.running() {
			_ = p.dump()
		}
	}
}

func (m *migration) disks() []*disk {
	if m.fioDisk != nil {
		return []*disk{m.disk, m.fioDisk.disk}
	}
	return []*disk{m.disk}
}

// begin starts both sides and waits until the destination can be used.
func (m *migration) begin(ctx context.Context) error {
	first, second := m.startSource, m.startDest
	if m.destListens {
		first, second = second, first
	}
	if err := first(); err != nil {
		return err
	}
	if err := m.awaitListener(ctx); err != nil {
		return err
	}
	if err := second(); err != nil {
		return err
	}
	return m.serve(ctx)
}

func (m *migration) startSource() (err error) {
	args := []string{"source", "--block-size", fmt.Sprint(m.block)}
	for _, d := range m.disks() {
		args = append(args, "--disk", d.name+"="+d.src)
	}
	m.destLost = false
	m.source, err = launch("source", filepath.Join(m.dir, "source.log"), m.o.Bin, m.ends(args, !m.destListens)...)
	return err
}

func (m *migration) startDest() (err error) {
	args := []string{"dest", "--nbd", m.nbd}
	for _, d := range m.disks() {
		args = append(args, "--disk", d.name+"="+d.dst)
	}
	if m.exits {
		args = append(args, "--exit-when-complete")
	}
	m.dest, err = launch("dest", filepath.Join(m.dir, "dest.log"), m.o.Bin, m.ends(args, m.destListens)...)
	return err
}

// ends appends where one side listens, or connects to.
func (m *migration) ends(args []string, listens bool) []string {
	if listens {
		return append(args, "--listen", m.listen.String())
	}
	return append(args, "--connect", m.link.Addr().String())
}

// awaitListener waits until the side that listens does.
func (m *migration) awaitListener(ctx context.Context) error {
	p := m.source
	if m.destListens {
		p = m.dest
	}
	for end := time.Now().Add(readyTime); ; {
		ok, err := addr.Listening(m.listen)
		switch {
		case ok || err != nil:
			return err
		case !p.running():
			return fmt.Errorf("%s ended (%v) before it listened", p.name, p.cmd.ProcessState)
		case time.Now().After(end):
			return fmt.Errorf("%s did not listen after %v: %s", p.name, readyTime, p.dump())
		}
		if err := sleep(ctx, 2*time.Millisecond); err != nil {
			return err
		}
	}
}

// serve waits until the destination can be used, checks what was flushed, and
// lets the clients in.
func (m *migration) serve(ctx context.Context) error {
	uris, err := m.dest.uris(len(m.disks()))
	if err != nil {
		return err
	}
	m.clients, err = attach(ctx, uris[m.disk.name], m.disk.model, m.block, &m.sum.counts)
	if err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	if err := m.clients.check(ctx); err != nil {
		return err
	}
	m.clients.work(ctx, rand.New(rand.NewPCG(m.r.Uint64(), 5)))
	if m.fioDisk != nil {
		m.fioDisk.begin(ctx, m, uris[m.fioDisk.name])
	}
	return nil
}

// lose kills the destination, and lets the clients see it.
func (m *migration) lose() error {
	if m.fioDisk != nil {
		m.fioDisk.doomed()
	}
	m.dest.kill()
	err := m.clients.abandon()
	m.clients = nil
	if m.fioDisk != nil {
		err = errors.Join(err, m.fioDisk.end())
	}
	m.disk.model.died()
	m.destLost = true
	m.sum.DestKills.Add(1)
	return err
}

// alive says what is wrong if one of the programs has ended by itself; the
// source may have, if all is moved.
func (m *migration) alive() error {
	switch {
	case !m.dest.running():
		return fmt.Errorf("dest has ended by itself: %v", m.dest.cmd.ProcessState)
	case !m.sourceDone && !m.source.running():
		return m.sourceEnded()
	}
	if m.clients != nil {
		return m.clients.failure()
	}
	return nil
}

// sourceEnded looks at a source that has ended by itself: well, if all is moved. One
// that connects, and has lost its first connection before the destination's
// first word, says so and ends, as that may be anybody: it is started again.
func (m *migration) sourceEnded() error {
	switch code := m.source.code(); {
	case code == 0:
		m.sourceDone = true
		return nil
	case code == 1 && m.destListens && m.destLost && time.Since(m.source.began) < metTime:
		m.destLost = false
		m.sum.Again.Add(1)
		return m.startSource()
	}
	return fmt.Errorf("source has ended by itself: %v", m.source.cmd.ProcessState)
}

// complete waits until the source says that all is moved.
func (m *migration) complete(ctx context.Context) error {
	for end := time.Now().Add(moveTime); ; {
		if err := m.alive(); err != nil || m.sourceDone {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("the migration is not complete after %v: source: %s; dest: %s", moveTime, m.source.dump(), m.dest.dump())
		}
		select {
		case <-m.source.ended:
		case <-m.dest.ended:
		case <-time.After(100 * time.Millisecond): // a client may have found something
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// between is a time from lo to hi.
func between(r *rand.Rand, lo, hi time.Duration) time.Duration {
	return lo + time.Duration(r.Int64N(int64(hi-lo)))
}
