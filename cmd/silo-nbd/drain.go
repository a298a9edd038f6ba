package main

import (
	"github.com/silo-nbd/silo-nbd/internal/control"
	"github.com/silo-nbd/silo-nbd/pkg/lazy"
)

// drain takes no new clients from now on; dest ends when all is complete and
// the last has gone. It is called once.
func (r *receiver) drain() {
	close(r.drained) // first: that the listener ends is no failure then
	if err := r.listener.Close(); err != nil {
		r.console.log.Warn("the export's socket was not closed cleanly", "error", err)
	}
}

func (r *receiver) draining() bool {
	select {
	case <-r.drained:
		return true
	default:
		return false
	}
}

// clients says who uses the exports.
func (r *receiver) clients() control.NBD {
	return control.NBD{Clients: r.server.Connections(), Waiting: r.server.Waits().Count}
}

// stats are those of the devices by the names of their disks.
func (r *receiver) stats() map[string]lazy.Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make(map[string]lazy.Stats, len(r.devices))
	for name, dev := range r.devices {
		all[name] = dev.Stats()
	}
	return all
}
