package nbdexport

import (
	"context"
	"fmt"

	"github.com/pojntfx/go-nbd/pkg/backend"
)

// A backend may implement the interfaces below; each is found by itself.
//
// The contexts end when the client has gone, and while a wait of Waiting lasts also
// when the server shuts down or when the stall rule says so. A backend that is about
// to wait for something slow (the network, not the disk) calls Waiting: that is what
// tells the server that the request waits, so that others are served meanwhile and
// the wait shows in the log.
type (
	// ReaderAtContext is a backend whose reads can be given up.
	ReaderAtContext interface {
		ReadAtContext(ctx context.Context, p []byte, off int64) (int, error)
	}

	// WriterAtContext is a backend whose writes can be given up. An error says
	// nothing about which of the bytes were written.
	WriterAtContext interface {
		WriteAtContext(ctx context.Context, p []byte, off int64) (int, error)
	}

	// SyncerContext is a backend whose Sync can be given up.
	SyncerContext interface {
		SyncContext(ctx context.Context) error
	}

	// ZeroerContext is a backend that zeroes a range without being sent the
	// zeroes: NBD_CMD_WRITE_ZEROES. With punch the space may be given back.
	ZeroerContext interface {
		ZeroAtContext(ctx context.Context, off, length int64, punch bool) error
	}

	// FastZeroer is a ZeroerContext that may have a way to zero which takes
	// less time than a write: NBD_CMD_FLAG_FAST_ZERO, advertised if CanFastZero.
	// Where a range has no such way FastZeroAtContext changes nothing and
	// returns, at once, an error that is errors.ErrUnsupported.
	FastZeroer interface {
		CanFastZero() bool
		FastZeroAtContext(ctx context.Context, off, length int64, punch bool) error
	}

	// Splicer is a backend that can take what a client wrote out of a pipe, of
	// which pipe is the descriptor: it need not be copied to memory of ours then.
	// CanSplice is asked each time. SpliceAt writes the length bytes that are in
	// the pipe to off, and does not wait for anything slow (see above); after an
	// error nobody knows which of them were written.
	Splicer interface {
		CanSplice() bool
		SpliceAt(pipe int, off, length int64) error
	}

	// TrimmerContext is a backend that can be told that a range is not needed:
	// NBD_CMD_TRIM.
	TrimmerContext interface {
		TrimAtContext(ctx context.Context, off, length int64) error
	}

	// Prefetcher is a backend that can be told that a range will be read soon:
	// NBD_CMD_CACHE. It asks and does not wait.
	Prefetcher interface {
		Prefetch(off, length int64) error
	}

	// BlockStatuser is a backend that knows something about its ranges:
	// NBD_CMD_BLOCK_STATUS. MetaContexts are the names of what it knows, such
	// as base:allocation. BlockStatus yields the runs from off on, in order
	// and without gaps, until they cover length or yield returns false.
	BlockStatuser interface {
		MetaContexts() []string
		BlockStatus(ctx context.Context, name string, off, length int64, yield func(length int64, flags uint32) bool) error
	}

	// MultiConner says whether a Sync on one connection covers the writes of
	// all others. Without it that is taken for granted, since all connections
	// share one backend.
	MultiConner interface {
		CanMultiConn() bool
	}
)

// store is a backend with all that it can do; a nil field is what it cannot.
type store struct {
	backend.Backend

	read     ReaderAtContext
	write    WriterAtContext
	sync     SyncerContext
	zero     ZeroerContext
	trim     TrimmerContext
	prefetch Prefetcher
	status   BlockStatuser
	splicer  Splicer

	fastZero FastZeroer // nil as well when it cannot

	size      int64
	multiConn bool
	contexts  []string
}

func newStore(b backend.Backend) (*store, error) {
	s := &store{Backend: b, multiConn: true}
	var err error
	if s.size, err = b.Size(); err != nil {
		return nil, fmt.Errorf("size: %w", err)
	}
	if s.size < 0 {
		return nil, fmt.Errorf("size: %d bytes is no size", s.size)
	}
	s.read, _ = b.(ReaderAtContext)
	s.write, _ = b.(WriterAtContext)
	s.sync, _ = b.(SyncerContext)
	s.zero, _ = b.(ZeroerContext)
	s.trim, _ = b.(TrimmerContext)
	s.prefetch, _ = b.(Prefetcher)
	s.splicer, _ = b.(Splicer)
	if f, is := b.(FastZeroer); is && s.zero != nil && f.CanFastZero() {
		s.fastZero = f
	}
	if m, is := b.(MultiConner); is {
		s.multiConn = m.CanMultiConn()
	}
	if s.status, _ = b.(BlockStatuser); s.status != nil {
		s.contexts = s.status.MetaContexts()
	}
	return s, nil
}

// flags are the transmission flags for one client.
func (s *store) flags(readOnly bool, mode replyMode, contexts bool) uint16 {
	f := flagHasFlags | flagSendFlush | flagSendFUA
	if readOnly {
		f |= flagReadOnly
	}
	if s.multiConn {
		f |= flagCanMultiConn
	}
	if s.trim != nil && !readOnly {
		f |= flagSendTrim
	}
	if s.zero != nil && !readOnly {
		f |= flagSendWriteZeroes
	}
	if s.fastZero != nil && !readOnly {
		f |= flagSendFastZero
	}
	if s.prefetch != nil {
		f |= flagSendCache
	}
	if mode >= modeStructured {
		f |= flagSendDF
	}
	if mode >= modeExtended && contexts {
		f |= flagBlockStatusPayload
	}
	return f
}

func (s *store) readAt(ctx context.Context, p []byte, off int64) (int, error) {
	if s.read != nil {
		return s.read.ReadAtContext(ctx, p, off)
	}
	return s.ReadAt(p, off)
}

func (s *store) writeAt(ctx context.Context, p []byte, off int64) (int, error) {
	if s.write != nil {
		return s.write.WriteAtContext(ctx, p, off)
	}
	return s.WriteAt(p, off)
}

func (s *store) flush(ctx context.Context) error {
	if s.sync != nil {
		return s.sync.SyncContext(ctx)
	}
	return s.Sync()
}
