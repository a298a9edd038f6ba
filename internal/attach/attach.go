// Package attach makes an NBD export a block device of this host, with the
// kernel's own client: it connects and shakes hands, and hands the sockets over
// by netlink. Nothing of ours has to run for the device from then on.
package attach

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
)

const (
	sector      = 512                // of a block device, in bytes
	maxBlock    = 4096               // the largest block of a device, in bytes: a page
	maxTimeout  = 7 * 24 * time.Hour // the kernel counts in ticks, of which 32 bits hold 24 days at 1000 a second
	settleTime  = 10 * time.Second   // for a device to show up, or to be let go of
	settleCheck = 20 * time.Millisecond
)

// Options say how an export is attached.
type Options struct {
	Device      Device // which device; Auto: one that is free
	Connections int    // how many connections; more than one only if the server allows it. 0 is 1
	// Timeout is how long the kernel waits for an answer before it takes the
	// connection for dead; 0: for ever, which it can with one connection only.
	Timeout time.Duration
	// DeadTimeout is how long requests wait for new connections, when all
	// are dead, before they fail.
	DeadTimeout time.Duration
	// BlockSize is that of the device, in bytes; 0 is what its partition table
	// was made for.
	BlockSize int
}

// Check says what of the options makes no sense.
func (o Options) Check() error {
	switch {
	case o.Connections < 0 || o.Connections > 16:
		return fmt.Errorf("--connections: %d is no number of connections: want 1 to 16", o.Connections)
	case o.Timeout < 0 || o.Timeout > maxTimeout:
		return fmt.Errorf("--timeout: %v is out of range: want 0s, which is for ever, to %v", o.Timeout, maxTimeout)
	case o.DeadTimeout < 0 || o.DeadTimeout > maxTimeout:
		return fmt.Errorf("--dead-timeout: %v is out of range: want 0s to %v", o.DeadTimeout, maxTimeout)
	case o.BlockSize != 0 && (o.BlockSize < sector || o.BlockSize > maxBlock || bits.OnesCount(uint(o.BlockSize)) != 1):
		return fmt.Errorf("--block-size: %d is not a block size: want a power of two from %d to %d", o.BlockSize, sector, maxBlock)
	case o.Connections > 1 && o.Timeout == 0:
		return errors.New("--connections: with several of them the kernel cannot wait for ever: give --timeout too, longer than an outage may last")
	}
	return nil
}

// Result is what was attached.
type Result struct {
	Device Device
	Size   int64 // of the device, in bytes
	Cut    int64 // how many bytes at the export's end are no whole block, and so not part of the device
	// Unread says that the export did not show its partition table in time, so
	// that the block size is the smallest.
	Unread  bool
	Renewed bool // the device was attached already and is in use: connections of its that were dead are new
}

// Attach makes the export that an NBD URI names a block device. It returns when
// that can be used.
func Attach(ctx context.Context, uri string, opts Options) (Result, error) {
	if err := opts.Check(); err != nil {
		return Result{}, err
	}
	t, err := nbdclient.ParseURI(uri)
	if err != nil {
		return Result{}, err
	}
	if t.TLS {
		return Result{}, fmt.Errorf("%s: the kernel speaks no TLS: attach the unix socket of a proxy that does, such as nbdkit -U PATH nbd tls=require (docs/OPERATIONS.md has the line)", uri)
	}
	if t.Network == "unix" {
		if t.Address, err = filepath.Abs(t.Address); err != nil {
			return Result{}, err
		}
	}
	n, err := openNetlink()
	if err != nil {
		return Result{}, err
	}
	defer n.Close() // only asked
	a := &attacher{host: thisHost(), kernel: n, opts: opts, backend: t.String()}
	return a.attach(ctx, t)
}

// attacher attaches one export.
type attacher struct {
	host
	kernel
	opts    Options
	backend string // the export, as the kernel shows it to others
}

func (a *attacher) attach(ctx context.Context, t nbdclient.Target) (Result, error) {
	p, err := a.plan(a.opts.Device, a.backend)
	if err != nil {
		return Result{}, err
	}
	defer p.release()
	conns, err := a.dial(ctx, t, p)
	if err != nil {
		return Result{}, err
	}
	defer conns.close() // the kernel has its own hold on what it took
	r := Result{Device: p.device, Size: conns.size, Cut: conns.cut, Unread: conns.unread, Renewed: p.what == renew}
	switch p.what {
	case renew:
		return r, a.renew(r, conns)
	case replace:
		if _, err := a.do(cmdDisconnect, attrs(nil).u32(attrIndex, uint32(p.device))); err != nil {
			return Result{}, fmt.Errorf("%v: letting go of what it was attached to: %w", p.device, noRoot(err))
		}
	}
	p.release() // the kernel attaches nothing to a device that is open
	if r.Device, err = a.connect(ctx, p.device, conns); err != nil {
		return Result{}, err
	}
	if err := a.await(ctx, r); err != nil {
		_, _ = a.do(cmdDisconnect, attrs(nil).u32(attrIndex, uint32(r.Device))) // err says what counts
		return Result{}, err
	}
	return r, nil
}

// A plan is what becomes of a device.
type plan struct {
	what    int
	device  Device // Auto only with create
	release func() // lets go of the device; may be called again
}

const (
	create  = iota // attach it
	replace        // nobody uses what a predecessor has left: let go of that, and attach it
	renew          // it is in use and attached to the same export: give it new connections
)

// plan says what to do so that the wanted device is attached to backend, and
// holds the device, unless it is in use.
func (h host) plan(want Device, backend string) (plan, error) {
	if want == Auto {
		all, err := h.devices()
		if err != nil {
			return plan{}, err
		}
		for _, d := range all {
			if h.attached(d) && h.backend(d) == backend {
				p, err := h.planFor(d, backend)
				if err == nil && p.what == renew {
					err = fmt.Errorf("%v is attached to this export already, and in use: a second device would destroy what is on it; --device %v gives it new connections, should it need some", d, d)
				}
				return p, err
			}
		}
		return plan{device: Auto, release: func() {}}, nil
	}
	return h.planFor(want, backend)
}

func (h host) planFor(d Device, backend string) (plan, error) {
	attached, to := h.attached(d), h.backend(d)
	if attached && to != backend {
		if to == "" {
			to = "something else"
		}
		return plan{}, fmt.Errorf("%v is attached to %s: take another device, or let go of that first: silo-nbd detach %v", d, to, d)
	}
	release, users, err := h.hold(d)
	switch {
	case err != nil:
		return plan{}, err
	case users != "" && !attached:
		return plan{}, fmt.Errorf("%v is not attached, but %s: end that first, or take another device", d, users)
	case users != "":
		return plan{what: renew, device: d, release: func() {}}, nil
	}
	held := true
	p := plan{device: d, release: func() {
		if held {
			held = false
			release()
		}
	}}
	if attached {
		p.what = replace
	}
	return p, nil
}

// connections have been shaken hands on.
type connections struct {
	size, cut int64
	block     uint32
	unread    bool // the block size is a guess
	flags     uint16
	all       []*nbdclient.Transport
	files     []*os.File
}

func (c *connections) close() {
	for _, f := range c.files {
		f.Close() // nothing was written
	}
	for _, t := range c.all {
		t.Conn.Close()
	}
}

func (c *connections) sockets() []int {
	fds := make([]int, len(c.files))
	for i, f := range c.files {
		fds[i] = int(f.Fd())
	}
	return fds
}

// dial connects as often as is asked for. Close what it returns.
func (a *attacher) dial(ctx context.Context, t nbdclient.Target, p plan) (*connections, error) {
	c := &connections{block: a.wantedBlock(p)}
	var err error
	if c.block == 0 {
		err = c.first(ctx, t)
	}
	for i := 0; err == nil && i < max(a.opts.Connections, 1); i++ {
		if i == len(c.all) {
			var conn *nbdclient.Transport
			if conn, err = nbdclient.DialTransport(ctx, t); err != nil {
				break
			}
			c.all = append(c.all, conn)
		}
		err = c.add(i, c.all[i], a.opts.Connections)
	}
	if err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

func (c *connections) add(i int, t *nbdclient.Transport, want int) error {
	if i == 0 {
		if want > 1 && t.Flags&nbdclient.FlagMultiConn == 0 {
			return errors.New("--connections: the server allows no more than one")
		}
		if err := c.shape(t); err != nil {
			return err
		}
	}
	if int64(t.Size) != c.size+c.cut || t.Flags != c.flags {
		return errors.New("the export has changed while it was being attached: try again")
	}
	f, err := t.File()
	if err != nil {
		return err
	}
	c.files = append(c.files, f)
	return nil
}

// shape finds the size and the block size of the device. A disk's partition table
// counts in blocks, so they are what it was made for, and otherwise as small as may
// be.
func (c *connections) shape(t *nbdclient.Transport) error {
	least := max(t.MinBlock, sector)
	switch {
	case least > maxBlock || bits.OnesCount32(least) != 1:
		return fmt.Errorf("the server wants blocks of %d bytes: the kernel takes powers of two up to %d", least, maxBlock)
	case c.block != 0 && c.block < least:
		return fmt.Errorf("--block-size: the server wants blocks of %d bytes, more than %d", least, c.block)
	}
	c.block, c.flags = max(least, c.block), t.Flags
	c.cut = int64(t.Size % uint64(c.block))
	c.size = int64(t.Size) - c.cut
	if c.size <= 0 {
		return fmt.Errorf("an export of %d bytes is no block device", t.Size)
	}
	return nil
}

// seconds rounds up: 0 means something else.
func seconds(d time.Duration) uint64 { return uint64((d + time.Second - 1) / time.Second) }

// request is what connect and renew have in common.
func (a *attacher) request(d Device, c *connections) attrs {
	var m attrs
	if d != Auto {
		m = m.u32(attrIndex, uint32(d))
	}
	return m.u64(attrTimeout, seconds(a.opts.Timeout)).
		u64(attrDeadTimeout, seconds(a.opts.DeadTimeout)).
		u64(attrServerFlags, uint64(c.flags)).
		text(attrBackend, a.backend).
		sockets(c.sockets())
}

// connect gives a device its connections, and says which one it was.
func (a *attacher) connect(ctx context.Context, d Device, c *connections) (Device, error) {
	m := a.request(d, c).u64(attrSize, uint64(c.size)).u64(attrBlockSize, uint64(c.block))
	var reply []byte
	err := settle(ctx, func() (done bool, err error) {
		reply, err = a.do(cmdConnect, m)
		// Who looks into a device, as udev does now and then, keeps it for a moment.
		busy := errors.Is(err, unix.EBUSY) && d != Auto && !a.attached(d)
		return !busy, err
	})
	switch {
	case errors.Is(err, unix.EBUSY):
		return 0, fmt.Errorf("%v is in use: take another device", d)
	case errors.Is(err, unix.EPERM):
		return 0, noRoot(err)
	case err != nil:
		return 0, fmt.Errorf("the kernel did not attach it, its log (dmesg) may say why: %w", err)
	}
	index, ok := attr(reply, attrIndex)
	if !ok || len(index) != 4 {
		return 0, errors.New("the kernel attached it, but did not say as which device: see /sys/block/nbd*/backend")
	}
	return Device(binary.NativeEndian.Uint32(index)), nil
}

// renew replaces the connections that are dead.
func (a *attacher) renew(r Result, c *connections) error {
	if was := a.size(r.Device); was != c.size {
		return fmt.Errorf("%v has %d bytes and is in use, the export has %d now: it is another disk", r.Device, was, c.size)
	}
	if _, err := a.do(cmdReconfigure, a.request(r.Device, c)); err != nil {
		return fmt.Errorf("%v: new connections: %w", r.Device, noRoot(err))
	}
	return nil
}

// await returns when the device can be used.
func (a *attacher) await(ctx context.Context, r Result) error {
	err := settle(ctx, func() (bool, error) {
		_, err := os.Stat(filepath.Join(a.dev, r.Device.name()))
		return err == nil && a.attached(r.Device) && a.size(r.Device) == r.Size, nil
	})
	if err != nil {
		return fmt.Errorf("%v was attached, but did not show up in %s: is there a udev or a devtmpfs? (%w)", r.Device, a.dev, err)
	}
	return nil
}

// settle asks again until something is done, or its time is up.
func settle(ctx context.Context, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	tick := time.NewTicker(settleCheck)
	defer tick.Stop()
	for {
		ok, err := done()
		if ok {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		}
	}
}

// Detach ends what Attach began. A device that somebody uses is refused, unless
// force is given: then all that is asked of it fails from then on.
func Detach(ctx context.Context, d Device, force bool) error {
	n, err := openNetlink()
	if err != nil {
		return err
	}
	defer n.Close() // only asked
	return detach(ctx, thisHost(), n, d, force)
}

func detach(ctx context.Context, h host, k kernel, d Device, force bool) error {
	if !h.attached(d) {
		return fmt.Errorf("%v is not attached", d)
	}
	release := func() {}
	if !force {
		var users string
		var err error
		release, users, err = h.hold(d)
		if err != nil {
			return fmt.Errorf("%w; --force detaches it without a look", err)
		}
		if users != "" {
			return fmt.Errorf("%v is %s: end that first; --force detaches it all the same, and what is not written yet is lost", d, users)
		}
	}
	_, err := k.do(cmdDisconnect, attrs(nil).u32(attrIndex, uint32(d)))
	release() // the kernel keeps it as long as somebody holds it
	if err != nil {
		return fmt.Errorf("%v: %w", d, noRoot(err))
	}
	if force {
		return nil // it stays as long as its users do
	}
	if err := settle(ctx, func() (bool, error) { return !h.attached(d), nil }); err != nil {
		return fmt.Errorf("%v does not go away, somebody has opened it meanwhile: %w", d, err)
	}
	return nil
}
