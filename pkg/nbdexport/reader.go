package nbdexport

import "io"

// reader reads from a connection much at a time, so that many small requests
// cost one system call. It belongs to one goroutine at a time.
type reader struct {
	src  io.Reader
	buf  []byte
	r, w int // buf[r:w] is read and not used yet
	// ahead is how much is read at once. After a large payload the next one is
	// probably large as well, and what is read ahead of it is copied.
	ahead int
}

func newReader(src io.Reader, size int) *reader {
	return &reader{src: src, buf: make([]byte, size), ahead: size}
}

// grow makes the buffer at least size bytes.
func (d *reader) grow(size int) {
	if len(d.buf) < size {
		b := make([]byte, size)
		d.w = copy(b, d.buf[d.r:d.w])
		d.r, d.buf = 0, b
	}
	d.ahead = size
}

func (d *reader) buffered() int { return d.w - d.r }

// fill reads until n bytes are buffered; n is at most the buffer's size.
func (d *reader) fill(n int) error {
	if d.r == d.w {
		d.r, d.w = 0, 0
	} else if len(d.buf)-d.r < n {
		d.w = copy(d.buf, d.buf[d.r:d.w])
		d.r = 0
	}
	for d.w-d.r < n {
		m, err := d.src.Read(d.buf[d.w:min(len(d.buf), d.r+max(n, d.ahead))])
		d.w += m
		if err != nil && d.w-d.r < n {
			if err == io.EOF && d.w > d.r {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

// next is the next n bytes, valid until the next call.
func (d *reader) next(n int) ([]byte, error) {
	if d.buffered() < n {
		if err := d.fill(n); err != nil {
			return nil, err
		}
	}
	b := d.buf[d.r : d.r+n]
	d.r += n
	return b, nil
}

// read fills p, with a part of a payload, or all of one if it is small.
func (d *reader) read(p []byte, small bool) error {
	n := copy(p, d.buf[d.r:d.w])
	d.r += n
	for n < len(p) {
		if small { // together with what follows it
			if err := d.fill(len(p) - n); err != nil {
				return noEOF(err)
			}
			d.r += copy(p[n:], d.buf[d.r:d.w])
			return nil
		}
		m, err := d.src.Read(p[n:])
		n += m
		if err != nil && n < len(p) {
			return noEOF(err)
		}
	}
	return nil
}

// skip drops n bytes.
func (d *reader) skip(n int64) error {
	for {
		m := min(n, int64(d.buffered()))
		d.r += int(m)
		if n -= m; n == 0 {
			return nil
		}
		if err := d.fill(1); err != nil {
			return noEOF(err)
		}
	}
}

// noEOF is for an end in the middle of a message.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
