package main

import (
	"context"
	"errors"
	"net"
	"sync"

	"github.com/silo-nbd/silo-nbd/internal/addr"
	"github.com/silo-nbd/silo-nbd/internal/control"
	"github.com/silo-nbd/silo-nbd/internal/tlsdir"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/nbdexport"
)

// liveExport serves the disks of a source that are in use.
type liveExport struct {
	server   *nbdexport.Server
	listener net.Listener
	disks    []migrate.SourceDisk
	console  *console
	at       addr.Addr // where it is reached
	secure   bool      // NBD is TLS
	drained  chan struct{}
	loops    sync.WaitGroup
}

// openExport listens; nobody is served before serve.
func (f *sourceFlags) openExport(ctx context.Context, disks []migrate.SourceDisk, certs *tlsdir.Dir, c *console) (*liveExport, error) {
	ln, err := f.live.nbd.listen(ctx, &f.wire)
	if err != nil {
		return nil, err
	}
	options := nbdexport.Options{Log: c.log}
	f.live.memory.apply(&options, c.log)
	x := &liveExport{listener: ln, disks: disks, console: c, at: addr.Of(ln.Addr()), drained: make(chan struct{})}
	if certs != nil {
		options.TLS = certs.ServerConfig()
		x.at, x.secure = f.live.nbd.Named(x.at), true
	}
	x.server = nbdexport.NewServer(options)
	for _, d := range disks {
		if err := x.server.AddExport(nbdexport.Export{Name: d.Name, Backend: d.Live}); err != nil {
			return nil, errors.Join(err, ln.Close())
		}
	}
	return x, nil
}

// serve begins, and says where, unless the disks were handed off: then every
// request is refused, and a "ready" line would be a lie. It calls fail if it
// cannot go on.
func (x *liveExport) serve(fail func(error), handedOff bool) {
	x.loops.Go(func() {
		if err := x.server.Serve(x.listener); !errors.Is(err, nbdexport.ErrServerClosed) && !x.draining() {
			fail(&serveError{err})
		}
	})
	if handedOff {
		return
	}
	for _, d := range x.disks {
		x.console.ready(d.Name, exportAt(x.at, x.secure, d.Name))
	}
}

// drain takes no new clients from now on. The source ends by itself when all is
// complete. It is called once.
func (x *liveExport) drain() {
	close(x.drained) // first: that the listener ends is no failure then
	if err := x.listener.Close(); err != nil {
		x.console.log.Warn("the export's socket was not closed cleanly", "error", err)
	}
}

func (x *liveExport) draining() bool {
	select {
	case <-x.drained:
		return true
	default:
		return false
	}
}

// clients says who uses the exports.
func (x *liveExport) clients() control.NBD {
	return control.NBD{Clients: x.server.Connections(), Waiting: x.server.Waits().Count}
}

// end ends all service; what was answered is on stable storage then.
func (x *liveExport) end() error {
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	err := x.server.Shutdown(ctx)
	x.loops.Wait()
	return err
}
