package migrate

import (
	"errors"
	"fmt"
	"io/fs"
	"sync"

	"github.com/silo-nbd/silo-nbd/pkg/protocol"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
)

// destSession is one connection of a Destination.
type destSession struct {
	dest  *Destination
	proto *protocol.ProtocolRW
	hello *greeting

	mu sync.Mutex
	// Guarded by mu:
	arrivals []*arrivals
	refused  error // why a disk was refused, which ended the connection
}

// newDevice is told of a device that the source has begun to speak of.
func (s *destSession) newDevice(p protocol.Protocol, dev uint32) {
	s.hello.say() // a DevInfo has come
	// The factory runs when DevInfo has come, which may be before
	// NewFromProtocol has returned.
	made := make(chan struct{})
	var from *protocol.FromProtocol
	from = protocol.NewFromProtocol(dev, func(di *protocol.DevInfo) storage.StorageProvider {
		<-made
		a, err := s.accept(di, from)
		if err != nil {
			s.refuse(err)
			from.RefuseWith(reason(di.Name, err), s.dest.ownership(di))
			return nil
		}
		return a
	}, p)
	close(made)
}

// reason is what the source is told of why its disk is refused. What went wrong
// on our own file systems is not its business.
func reason(disk string, err error) string {
	var local *localError
	var file *fs.PathError
	switch {
	case errors.Is(err, ErrClosed):
		return ""
	case errors.As(err, &local), errors.As(err, &file):
		return fmt.Sprintf("it cannot take disk %q: its log says why", disk)
	}
	return err.Error()
}

// accept begins to take the disk that di announces: what is here already is
// claimed, so that only the rest travels.
func (s *destSession) accept(di *protocol.DevInfo, from *protocol.FromProtocol) (*arrivals, error) {
	disk, fresh, err := s.dest.disk(di)
	if err != nil {
		return nil, err
	}
	a, err := s.attach(disk, from)
	if err != nil {
		return nil, err
	}
	a.written = stillWritten(di)
	if err := a.beginEpoch(di); err != nil {
		return nil, err
	}
	if !awaitsPostLock(di) {
		if err := disk.goLive("nobody writes the source's disk any more"); err != nil {
			return nil, &localError{err}
		}
	}
	if !fresh && disk.mustCompare(di) {
		return a, a.beginComparison(di.Extension.Identity)
	}
	if !fresh {
		return a, a.resume(di)
	}
	s.dest.log.Info("receiving", "disk", disk.name, "bytes", disk.geo.size, "block", disk.geo.blockSize)
	if err := s.dest.opts.Ready(disk.name, disk.dev); err != nil {
		return nil, &localError{fmt.Errorf("disk %q: %w", disk.name, err)}
	}
	return a, nil
}

// attach makes this connection the one that disk asks and is fed by.
func (s *destSession) attach(disk *destDisk, from *protocol.FromProtocol) (*arrivals, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.arrivals {
		if a.disk == disk {
			return nil, fmt.Errorf("the source brings disk %q twice", disk.name)
		}
	}
	a := &arrivals{disk: disk, from: from, gone: s.proto.Done(), refused: s.refuse, Stream: disk.attach(from)}
	s.arrivals = append(s.arrivals, a)
	return a, nil
}

// detach ends what this connection fed. Reads of missing blocks wait on.
func (s *destSession) detach() {
	s.mu.Lock()
	all := s.arrivals
	s.arrivals = nil
	s.mu.Unlock()
	for _, a := range all {
		a.disk.damage.noteEnd(a.disk.log, a.disk.name, s.proto.Err())
		a.disk.comparing.end()
		a.disk.detach(a.Stream)
	}
}

func (s *destSession) refuse(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refused == nil {
		s.refused = err
	}
}

func (s *destSession) refusal() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.refused
}
