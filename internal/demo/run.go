package demo

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/silo-nbd/silo-nbd/internal/addr"
	"github.com/silo-nbd/silo-nbd/internal/link"
	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
	"github.com/silo-nbd/silo-nbd/internal/units"
	"github.com/silo-nbd/silo-nbd/internal/verify"
	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/nbdexport"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

const (
	firstReads   = 10 // reads that are shown one by one
	silentWrites = 100
	silence      = time.Second
	readEvery    = 25 * time.Millisecond
	writeEvery   = 40 * time.Millisecond
	tellEvery    = 3 * time.Second
)

// run moves the disk and uses it, from the start of the destination to the
// comparison at the end.
func (s *stage) run(ctx context.Context) error {
	defer s.source.Close() // only read from
	p, err := s.start(ctx)
	if err != nil {
		return err
	}
	err = s.use(ctx, p)
	return errors.Join(err, p.stop())
}

// parts is the running migration: both ends, and the link between them.
type parts struct {
	link   *link.Link
	source *migrate.Source
	dest   *migrate.Destination
	server *nbdexport.Server
	device *lazy.Device
	uri    string

	moves  errgroup.Group // both ends
	serves errgroup.Group
	end    context.CancelFunc // ends them
	moved  chan struct{}      // closed when both ends are through
	err    error              // why they ended, if not well; read only after moved
}

// start starts source, link and destination, and returns when the export can
// be attached.
func (s *stage) start(ctx context.Context) (_ *parts, err error) {
	listen, err := addr.Parse("127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	ln, err := listen.Listen(ctx)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	p := &parts{end: cancel, moved: make(chan struct{})}
	context.AfterFunc(ctx, func() { ln.Close() }) // wakes Accept; its error says that
	defer func() {
		if err != nil {
			cancel()
		}
	}()
	p.link, err = link.Listen(ctx, link.Options{Listen: listen, Target: addr.Of(ln.Addr()), Rate: s.Rate, Delay: delay})
	if err != nil {
		return nil, err
	}
	p.source, err = migrate.NewSource([]migrate.SourceDisk{{Name: diskName, Store: s.source}},
		migrate.SourceOptions{BlockSize: blockSize, Listening: true, Log: s.Log})
	if err != nil {
		return nil, errors.Join(err, p.link.Close())
	}
	ready, err := s.newDestination(p)
	if err != nil {
		return nil, errors.Join(err, p.link.Close())
	}
	nbd, err := addr.Parse("unix://" + filepath.Join(s.dir, "nbd.sock"))
	if err != nil {
		return nil, errors.Join(err, p.link.Close())
	}
	nbdLn, err := nbd.Listen(ctx)
	if err != nil {
		return nil, errors.Join(err, p.link.Close())
	}
	p.uri = addr.NBDURI(nbd, diskName)
	p.serves.Go(func() error { return p.server.Serve(nbdLn) })

	s.started = time.Now()
	p.moves.Go(func() error {
		return p.source.Run(ctx, func(context.Context) (io.ReadWriteCloser, error) { return ln.Accept() })
	})
	p.moves.Go(func() error {
		return p.dest.Run(ctx, func(ctx context.Context) (io.ReadWriteCloser, error) { return p.link.Addr().Dial(ctx) })
	})
	p.serves.Go(func() error {
		p.err = p.moves.Wait()
		close(p.moved)
		return nil
	})
	select {
	case p.device = <-ready:
		return p, nil
	case <-p.moved:
		return nil, errors.Join(p.err, p.stop())
	}
}

// newDestination makes the receiving end and its NBD server. The device comes
// through the channel as soon as it can be attached.
func (s *stage) newDestination(p *parts) (<-chan *lazy.Device, error) {
	ready := make(chan *lazy.Device, 1)
	p.server = nbdexport.NewServer(nbdexport.Options{Log: s.Log})
	var err error
	p.dest, err = migrate.NewDestination(migrate.DestinationOptions{
		Waiting: nbdexport.Waiting,
		Disks:   1,
		Log:     s.Log,
		Open: func(a migrate.Announcement) (migrate.DestinationDisk, error) {
			f, err := sources.OpenFile(filepath.Join(s.dir, destFile), sources.FileOptions{Create: true, Size: int64(a.Size)})
			if err != nil {
				return migrate.DestinationDisk{}, err
			}
			return migrate.DestinationDisk{Store: f, KnownZero: f.Created()}, nil
		},
		Ready: func(name string, dev *lazy.Device) error {
			if err := p.server.AddExport(nbdexport.Export{Name: name, Backend: dev}); err != nil {
				return err
			}
			ready <- dev
			return nil
		},
	})
	return ready, err
}

// stop ends everything and removes the sockets.
func (p *parts) stop() error {
	p.end()
	<-p.moved
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	errs := []error{p.server.Shutdown(ctx)}
	if err := p.serves.Wait(); !errors.Is(err, nbdexport.ErrServerClosed) {
		errs = append(errs, err)
	}
	return errors.Join(append(errs, p.link.Close(), p.dest.Close())...)
}

// local is the fraction of the disk that is at the destination.
func (p *parts) local() float64 {
	st := p.dest.Status()
	if len(st) == 0 || st[0].Size == 0 {
		return 0
	}
	return float64(st[0].BytesDone) / float64(st[0].Size)
}

// use is a client of the export, from attaching to the end.
func (s *stage) use(ctx context.Context, p *parts) error {
	client, err := nbdclient.Dial(ctx, p.uri)
	if err != nil {
		return fmt.Errorf("attaching: %w", err)
	}
	defer client.Close() // everything was answered by then
	defer context.AfterFunc(ctx, func() { client.Close() })()
	s.result.attached = time.Since(s.started)
	s.result.localAtAttach = p.local()
	s.event("attached to %s: %.1f %% of the disk is here", p.uri, 100*s.result.localAtAttach)

	w := &workload{disk: client, missing: p.device, want: s.want, holes: s.holes, rnd: rand.New(rand.NewPCG(1, uint64(s.Size)))}
	for _, step := range []func() error{
		func() error { return s.readFirst(p, w) },
		func() error { return s.writeInSilence(ctx, p, w) },
		func() error { return s.carryOn(ctx, p, w) },
		func() error { return s.compare(ctx, p, client) },
	} {
		if err := step(); err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return err
		}
	}
	return nil
}

// readFirst reads a few missing pieces at once, before much has arrived.
func (s *stage) readFirst(p *parts, w *workload) error {
	for range firstReads {
		local := p.local()
		off, took, ok, err := w.read()
		if err != nil {
			return err
		}
		if !ok {
			return errors.New("the disk was here before anything could be shown: use a larger --size or a smaller --rate")
		}
		if len(s.result.first) == 0 {
			s.result.localAtFirst = local
		}
		s.event("read 4 KiB at %s, a block not here yet: %s, the right bytes; %.1f %% local", units.Human(off), short(took), 100*local)
		s.result.first = append(s.result.first, took)
	}
	return nil
}

// writeInSilence writes missing blocks while the link carries nothing at all:
// a write that needed the network could not be answered.
func (s *stage) writeInSilence(ctx context.Context, p *parts, w *workload) error {
	p.link.Stall(true)
	defer p.link.Stall(false)
	carried, err := settled(ctx, p.link)
	if err != nil {
		return err
	}
	began := time.Now()
	err = every(ctx, silence/silentWrites, func() (bool, error) {
		_, took, ok, err := w.write()
		if err != nil || !ok {
			return true, err
		}
		s.result.silent = append(s.result.silent, took)
		return len(s.result.silent) == silentWrites, nil
	})
	if err != nil {
		return err
	}
	s.result.carried = total(p.link) - carried
	s.event("the link was stopped for %s, and %d missing blocks written to: each write answered at once, %s",
		short(time.Since(began)), len(s.result.silent), s.result.silent)
	return nil
}

// settled waits until a link that was stopped has handed on what it had taken,
// and returns how many bytes that makes.
func settled(ctx context.Context, l *link.Link) (int64, error) {
	last := int64(-1)
	err := every(ctx, 50*time.Millisecond, func() (bool, error) {
		now := total(l)
		still := now == last
		last = now
		return still, nil
	})
	return last, err
}

// total is what a link has carried, both ways, in bytes.
func total(l *link.Link) int64 {
	to, from := l.Bytes()
	return to + from
}

// carryOn reads and writes missing blocks until none is left, and waits for
// the end of the migration.
func (s *stage) carryOn(ctx context.Context, p *parts, w *workload) error {
	s.result.resumed = time.Now()
	_, before := p.link.Bytes()
	told := time.Now()
	var written time.Time
	err := every(ctx, readEvery, func() (bool, error) {
		select {
		case <-p.moved:
			return true, nil
		default:
		}
		if time.Since(told) >= tellEvery {
			told = time.Now()
			s.event("%3.0f %% local, %d reads and %d writes of missing blocks so far", 100*p.local(), len(s.result.reads), len(s.result.writes))
		}
		_, took, ok, err := w.read()
		if err != nil || !ok {
			return !ok, err
		}
		s.result.reads = append(s.result.reads, took)
		if time.Since(written) < writeEvery {
			return false, nil
		}
		written = time.Now()
		_, took, ok, err = w.write()
		if ok {
			s.result.writes = append(s.result.writes, took)
		}
		return !ok, err
	})
	if err != nil {
		return err
	}
	_, from := p.link.Bytes()
	s.result.linkUse = min(1, float64(from-before)/time.Since(s.result.resumed).Seconds()/float64(s.Rate))
	select {
	case <-p.moved:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if p.err != nil {
		return p.err
	}
	s.result.complete = time.Since(s.started)
	st := p.source.Status()[0]
	s.event("complete: the source has ended, nothing is missing; %s travelled", units.Human(st.BytesSent))
	return nil
}

// compare holds what the export has against the source's disk, as it is and
// with the writes laid over it.
func (s *stage) compare(ctx context.Context, p *parts, client *nbdclient.Client) error {
	if err := client.Flush(); err != nil {
		return err
	}
	var err error
	if s.result.wantSum, err = sum(ctx, s.want, s.Size); err != nil {
		return fmt.Errorf("reading the source's disk: %w", err)
	}
	if s.result.gotSum, err = sum(ctx, client, client.Size()); err != nil {
		return fmt.Errorf("reading the export: %w", err)
	}
	s.result.wrote = s.want.blocks()
	s.result.plain, err = verify.Compare(ctx, fileSide{s.source, s.Size}, client, verify.Options{})
	return err
}

// fileSide makes of the source's file something to compare with.
type fileSide struct {
	*sources.File
	size int64
}

func (f fileSide) Size() int64 { return f.size }

func sum(ctx context.Context, r io.ReaderAt, size int64) ([]byte, error) {
	h := sha256.New()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(buf)) {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		n, err := r.ReadAt(buf[:min(int64(len(buf)), size-off)], off)
		if err != nil && !(errors.Is(err, io.EOF) && off+int64(n) == size) {
			return nil, err
		}
		h.Write(buf[:n])
	}
	return h.Sum(nil), nil
}
