package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/addr"
	"github.com/silo-nbd/silo-nbd/internal/connect"
	"github.com/silo-nbd/silo-nbd/internal/control"
	"github.com/silo-nbd/silo-nbd/internal/disks"
	"github.com/silo-nbd/silo-nbd/internal/metrics"
	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/nbdexport"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// shutdownTimeout is how long clients that do not hear may hold up the end.
const shutdownTimeout = 10 * time.Second

// receiver is the running dest.
type receiver struct {
	console *console
	set     *disks.Destination
	nbd     addr.Addr // with its real port
	server  *nbdexport.Server
	dest    *migrate.Destination
	left    chan struct{} // a client has left; capacity 1

	listener net.Listener
	drained  chan struct{} // closed by drain

	secure, readOnly bool // NBD is TLS; clients only read
	overwrite        bool // the same command again would begin anew

	ready chan struct{}  // closed when all disks that are expected are ready
	loops sync.WaitGroup // the NBD server and the command

	mu sync.Mutex
	// Guarded by mu:
	uris    []exportURI // in the order in which they became ready
	devices map[string]*lazy.Device
	forgets bool                // a disk has no map
	givenUp map[string]*givenUp // by export: reads that failed by --stall and were not told of yet
}

// exportURI is where a disk is served.
type exportURI struct{ name, uri string }

// run receives the disks, from the first check to the last flush.
func (f *destFlags) run(ctx context.Context, specs []disks.Spec, c *console) (err error) {
	certs, err := f.wire.certificates(true, c.log)
	if err != nil {
		return err
	}
	set, err := disks.OpenDestination(specs, disks.Options{Dir: f.dir, Overwrite: f.overwrite, Moved: f.moved})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, set.Close()) }()
	ln, err := f.nbd.listen(ctx, &f.wire)
	if err != nil {
		return err
	}
	r := &receiver{
		console: c, set: set, nbd: addr.Of(ln.Addr()), secure: certs != nil, readOnly: f.readOnly, overwrite: f.overwrite,
		left: make(chan struct{}, 1), ready: make(chan struct{}), drained: make(chan struct{}), listener: ln,
		devices: make(map[string]*lazy.Device),
	}
	if certs != nil {
		r.nbd = f.nbd.Named(r.nbd)
	}
	options := nbdexport.Options{Log: c.log, OnDisconnect: r.clientLeft, OnWait: r.waited, StallError: time.Duration(f.stall)}
	f.memory.apply(&options, c.log)
	options.Expected, options.ExpectAny = expected(specs)
	if certs != nil {
		options.TLS = certs.ServerConfig()
	}
	r.server = nbdexport.NewServer(options)
	r.dest, err = migrate.NewDestination(migrate.DestinationOptions{
		Open: r.open, Ready: r.export, Disks: set.Expected(), Listening: !f.wire.listen.IsZero(), MaxCallers: connect.MaxCallers, Log: c.log,
		Waiting: nbdexport.Waiting, RunDir: runDir(),
	})
	if err != nil {
		return errors.Join(err, ln.Close())
	}
	ends, err := f.wire.open(ctx, certs, c.log)
	if err != nil {
		return errors.Join(err, ln.Close())
	}
	defer ends.Close() // nothing is under way any more
	op, err := f.operate.start(ctx, control.Options{
		Role: control.RoleDest, Disks: samples(r.dest.Status), NBD: r.clients, Drain: r.drain,
	}, metrics.Sight{Disks: r.dest.Status, Devices: r.stats, NBD: r.clients}, certs, c)
	if err != nil {
		return errors.Join(err, ln.Close())
	}
	defer func() { err = errors.Join(err, op.Close()) }()
	stopShowing := c.show(r.dest.Status)
	defer stopShowing()

	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	r.loops.Go(func() {
		if err := r.server.Serve(ln); !errors.Is(err, nbdexport.ErrServerClosed) && !r.draining() {
			fail(&serveError{err})
		}
	})
	r.loops.Go(func() {
		select {
		case <-r.ready:
			op.ready()
		case <-ctx.Done():
		}
	})
	if err = r.resume(); err == nil {
		err = r.live(ctx, f, ends.Next)
	}
	fail(nil)
	op.stopping()
	err = errors.Join(err, r.shutdown())
	r.loops.Wait()
	return err
}

// expected are the exports that are to come, for which clients may wait: any is the
// only one, whose name the source says.
func expected(specs []disks.Spec) (names []string, any bool) {
	if len(specs) == 1 && !specs[0].Named {
		return nil, true
	}
	for _, s := range specs {
		names = append(names, s.Name)
	}
	return names, false
}

// open gives the disk that takes what the source announces.
func (r *receiver) open(a migrate.Announcement) (migrate.DestinationDisk, error) {
	d, err := r.set.Open(a)
	if err != nil {
		return migrate.DestinationDisk{}, err
	}
	return r.disk(d), nil
}

func (r *receiver) disk(d *disks.Disk) migrate.DestinationDisk {
	warnOf([]*sources.File{d.File}, r.console)
	if d.Map == nil {
		r.mu.Lock()
		r.forgets = true
		r.mu.Unlock()
		r.console.log.Warn("no --map for this disk: if dest ends before all is complete, the copy starts again", "disk", d.Path())
	}
	return migrate.DestinationDisk{
		Name: d.Name, Store: d.File, KnownZero: d.KnownZero, Map: d.Map,
		Completed: func() { r.completed(d) },
	}
}

// completed is told that a disk is whole from now on.
func (r *receiver) completed(d *disks.Disk) {
	if err := d.SetAccess(sources.AccessLive); err != nil {
		r.console.log.Warn("others are kept from reading the disk although it is complete", "disk", d.Name, "error", err)
	}
	warnOfFormat([]*sources.File{d.File}, r.console)
}

// resume serves what is here from an earlier run, before there is a source.
func (r *receiver) resume() error {
	var errs []error
	for _, d := range r.set.Resumed() {
		if len(errs) > 0 {
			errs = append(errs, d.Close())
			continue
		}
		if err := r.dest.Resume(d.Map.Identity().Name, r.disk(d)); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// export serves a disk that can be used from now on, and says so.
func (r *receiver) export(name string, dev *lazy.Device) error {
	if err := r.server.AddExport(nbdexport.Export{Name: name, Backend: dev, ReadOnly: r.readOnly}); err != nil {
		return err
	}
	e := exportURI{name, exportAt(r.nbd, r.secure, name)}
	r.mu.Lock()
	r.uris = append(r.uris, e)
	r.devices[name] = dev
	all := len(r.uris) == max(1, r.set.Expected()) // with --dir the first is all that is certain
	r.mu.Unlock()
	r.console.ready(e.name, e.uri)
	if all {
		close(r.ready)
	}
	return nil
}

// clientLeft is told that a client has gone.
func (r *receiver) clientLeft(string, int) {
	select {
	case r.left <- struct{}{}:
	default: // somebody is to look already
	}
}

// serveError says why nobody can attach any more.
type serveError struct{ error }

// endOf says why the time to serve has ended: nil if we were asked to end.
func endOf(ctx context.Context) error {
	var broken *serveError
	if errors.As(context.Cause(ctx), &broken) {
		return broken.error
	}
	return nil
}

// live is the time between start and shutdown.
func (r *receiver) live(ctx context.Context, f *destFlags, connect migrate.Connector) error {
	commandCtx, stopCommand := context.WithCancel(ctx)
	defer stopCommand()
	var ran func() error // waits for the command's end
	if f.command != "" {
		ran = r.startCommand(commandCtx, f.command)
	}
	err := r.dest.Run(ctx, connect)
	switch {
	case err == nil:
		r.console.log.Info("complete: the source is not needed any more")
		return r.serveOn(ctx, f.exit, ran)
	case ctx.Err() == nil:
		return err
	case endOf(ctx) != nil:
		return endOf(ctx)
	}
	return r.interrupted()
}

// interrupted says what is missing when we are asked to end; nil if nothing is.
func (r *receiver) interrupted() error {
	disks := r.dest.Status()
	lack := missing(disks)
	switch {
	case len(disks) == 0:
		return interruptedf("the source has sent nothing yet")
	case len(disks) < r.set.Expected():
		return interruptedf("the source has sent only %d of %d disks", len(disks), r.set.Expected())
	case lack == "":
		return nil
	}
	return r.wayOn(lack)
}

// wayOn says how to go on after an end that came too early. Without a map there
// is no way on, so that it is a failure.
func (r *receiver) wayOn(lack string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.forgets:
		return fmt.Errorf("interrupted: %s, and without --map nothing remembers what is here: begin anew with --overwrite", lack)
	case r.overwrite:
		return interruptedf("%s, run the same command again, but without --overwrite, to go on", lack)
	}
	return interruptedf("%s, run the same command again to go on", lack)
}

// serveOn serves the complete disks for as long as they are wanted.
func (r *receiver) serveOn(ctx context.Context, exit bool, ran func() error) error {
	var exitCode error
	switch {
	case ran != nil:
		exitCode = ran()
	case !exit:
		select {
		case <-r.drained:
		case <-ctx.Done():
		}
	}
	for ctx.Err() == nil && r.server.Connections() > 0 {
		select {
		case <-r.left:
		case <-ctx.Done():
		}
	}
	if ctx.Err() != nil {
		return endOf(ctx)
	}
	return exitCode
}

// shutdown ends the export gracefully and flushes and closes the disks.
func (r *receiver) shutdown() error {
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	return errors.Join(r.server.Shutdown(ctx), r.dest.Close())
}
