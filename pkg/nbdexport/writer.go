package nbdexport

import "net"

// writer sends replies. It belongs to whoever has set conn.writing.
type writer struct {
	nc      net.Conn
	vectors buffersWriter // nc, if it takes many slices in one system call
	batch   []*request
	slices  [][]byte    // of the batch
	rest    net.Buffers // the part of slices that is not sent yet
	joined  []byte      // small slices put together, for an nc without vectors
}

// buffersWriter is a connection that takes many slices in one system call. If it
// is a syscall.Conn as well, what it reads is what its socket reads.
type buffersWriter interface {
	// WriteBuffers writes v, with the contract of net.Buffers.WriteTo.
	WriteBuffers(v *net.Buffers) (int64, error)
}

// vectored is a socket as the standard library makes it.
type vectored struct{ net.Conn }

func (c vectored) WriteBuffers(v *net.Buffers) (int64, error) { return v.WriteTo(c.Conn) }

func (w *writer) init(nc net.Conn) {
	w.nc = nc
	switch c := nc.(type) {
	case buffersWriter:
		w.vectors = c
	case *net.TCPConn, *net.UnixConn:
		w.vectors = vectored{nc}
	}
}

// write sends the replies of the batch.
func (w *writer) write() error {
	w.slices = w.slices[:0]
	for _, r := range w.batch {
		w.slices = append(w.slices, r.out...)
	}
	defer clear(w.slices)
	if len(w.slices) == 1 {
		_, err := w.nc.Write(w.slices[0])
		return err
	}
	if w.vectors != nil {
		w.rest = w.slices
		_, err := w.vectors.WriteBuffers(&w.rest)
		return err
	}
	w.joined = w.joined[:0]
	for _, b := range w.slices {
		if len(w.joined)+len(b) <= joinBytes {
			w.joined = append(w.joined, b...)
			continue
		}
		if err := w.flushJoined(); err != nil {
			return err
		}
		if len(b) < joinBytes {
			w.joined = append(w.joined, b...)
		} else if _, err := w.nc.Write(b); err != nil {
			return err
		}
	}
	return w.flushJoined()
}

func (w *writer) flushJoined() error {
	if len(w.joined) == 0 {
		return nil
	}
	_, err := w.nc.Write(w.joined)
	w.joined = w.joined[:0]
	return err
}

// enqueue hands a request over to be answered. flush sends it.
func (c *conn) enqueue(r *request) {
	c.finished.Add(1)
	c.mu.Lock()
	r.wait.endLocked()
	drop := c.dead.Load() || r.err == errNotServed
	if !drop {
		c.queue = append(c.queue, r)
		c.queued += r.size
	}
	c.mu.Unlock()
	if drop {
		r.free()
	}
}

// batchFull says that enough replies wait to be sent.
func (c *conn) batchFull() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.queue) >= batchReplies || c.queued >= batchBytes
}

// flush sends the queued replies, unless somebody is at it: then they are sent
// by them.
func (c *conn) flush() {
	c.mu.Lock()
	if c.writing || len(c.queue) == 0 {
		c.mu.Unlock()
		return
	}
	c.writing = true
	var err error
	for len(c.queue) > 0 && err == nil {
		c.out.batch, c.queue = c.queue, c.out.batch[:0]
		c.mu.Unlock()
		err = c.out.write()
		sent := int64(0)
		for _, r := range c.out.batch {
			sent += r.size
			r.free()
		}
		clear(c.out.batch)
		c.mu.Lock()
		c.queued -= sent
		c.roomLocked()
	}
	c.writing = false
	c.mu.Unlock()
	if err != nil {
		c.kill(err)
	}
}

// dropQueue frees the replies that nobody takes.
func (c *conn) dropQueue() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.queue {
		r.free()
	}
	c.queue = nil
}
