package lazy

import (
	"crypto/rand"
	"encoding/binary"
	"slices"
	"sync"
)

// Epoch tells the states of one device apart: a copy of it, or one that was rolled
// back with its host, has another one than its source has confirmed.
type Epoch struct {
	Now    uint64 // drawn anew for each connection; never 0
	Before uint64 // the one that the source has confirmed before; 0: none
	Steps  uint32 // changes of state since Before was confirmed: a dirty list that took blocks back, or going live
}

// epochs is what a header holds of it.
type epochs struct {
	now, before  uint64
	steps        uint32 // since now was drawn
	beforesSteps uint32 // between before and now
	// drawn are epochs between before and now, the oldest first. The source may have
	// confirmed one of them after it had said on another connection which it knew.
	drawn [maxDrawn]drawnEpoch
}

// drawnEpoch is an epoch, and the steps between it and now; zero is none.
type drawnEpoch struct {
	epoch uint64
	steps uint32
}

// maxDrawn is how many connections in a row may know an epoch that is out of date.
const maxDrawn = 4

func newEpochs() epochs { return epochs{now: newEpoch()} }

// newEpoch is 64 random bits that are not all zero.
func newEpoch() uint64 {
	var b [8]byte
	for {
		rand.Read(b[:]) // never fails
		if n := binary.LittleEndian.Uint64(b[:]); n != 0 {
			return n
		}
	}
}

// begin draws a new epoch, for a source that has seen confirmed last. What the
// source has not confirmed goes on as one epoch with the one before it: the answer
// that told of it was lost, and nothing was believed.
func (e *epochs) begin(confirmed uint64) {
	between := append(e.between(), drawnEpoch{epoch: e.now})
	e.beforesSteps += e.steps
	for i := range between {
		between[i].steps += e.steps
	}
	i := slices.IndexFunc(between, func(d drawnEpoch) bool { return d.epoch == confirmed })
	if i >= 0 {
		e.before, e.beforesSteps = confirmed, between[i].steps
		between = between[i+1:]
	}
	e.drawn = [maxDrawn]drawnEpoch{}
	copy(e.drawn[:], between[max(0, len(between)-maxDrawn):])
	e.now, e.steps = newEpoch(), 0
}

// between are the epochs in drawn.
func (e *epochs) between() []drawnEpoch {
	n := slices.Index(e.drawn[:], drawnEpoch{})
	if n < 0 {
		n = maxDrawn
	}
	return slices.Clone(e.drawn[:n])
}

// step notes a change of state.
func (e *epochs) step() { e.steps++ }

// told is what a peer is told right after begin.
func (e epochs) told() Epoch {
	return Epoch{Now: e.now, Before: e.before, Steps: e.beforesSteps + e.steps}
}

// append adds the bytes that docs/MAP.md describes.
func (e epochs) append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint64(b, e.now)
	b = binary.LittleEndian.AppendUint64(b, e.before)
	b = binary.LittleEndian.AppendUint32(b, e.steps)
	return binary.LittleEndian.AppendUint32(b, e.beforesSteps)
}

// appendDrawn adds the bytes of those between, which lie elsewhere.
func (e epochs) appendDrawn(b []byte) []byte {
	for _, d := range e.drawn {
		b = binary.LittleEndian.AppendUint64(b, d.epoch)
		b = binary.LittleEndian.AppendUint32(b, d.steps)
	}
	return b
}

func decodeEpochs(b, drawn []byte) epochs {
	le := binary.LittleEndian
	e := epochs{now: le.Uint64(b), before: le.Uint64(b[8:]), steps: le.Uint32(b[16:]), beforesSteps: le.Uint32(b[20:])}
	for i := range e.drawn {
		e.drawn[i] = drawnEpoch{le.Uint64(drawn[12*i:]), le.Uint32(drawn[12*i+8:])}
	}
	return e
}

// deviceEpochs is where the epoch of a device is kept: in its map, which stays also
// when the device is complete, or in memory.
type deviceEpochs struct {
	m *Map // nil: none

	mu sync.Mutex
	e  epochs // guarded by mu; not used with a map
}

func (s *deviceEpochs) init(m *Map) { s.m, s.e = m, newEpochs() }

// step notes a change of state of a device without a map.
func (s *deviceEpochs) step() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.e.step()
}

// Epoch is the present epoch of the device. Steps counts from the Epoch that the
// last BeginEpoch returned; those that it told of are not in it.
func (d *Device) Epoch() Epoch {
	s := &d.epoch
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.e
	if s.m != nil {
		e = s.m.header().epoch
	}
	return Epoch{Now: e.now, Before: e.before, Steps: e.steps}
}

// BeginEpoch draws a new epoch and makes it durable. confirmed is the last one
// that the source says it has seen (0: none). If that is the present one, it
// becomes Before, and Steps is how many changes of state there were in it; the new
// epoch begins with none. The same holds of one of the last few epochs that no source
// has confirmed so far. Otherwise Before stays what it is, and Steps counts on
// from there: the source finds out by comparing Before with what it has confirmed.
// NoRoom errors may be tried again: the epoch is what it was.
func (d *Device) BeginEpoch(confirmed uint64) (Epoch, error) {
	if !d.ops.enter() {
		return Epoch{}, ErrClosed
	}
	defer d.ops.leave()
	s := &d.epoch
	if s.m == nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.e.begin(confirmed)
		return s.e.told(), nil
	}
	var told Epoch
	err := d.flush.alone(d, func() error {
		return mayRetry(s.m.update(func(h *header) {
			h.epoch.begin(confirmed)
			told = h.epoch.told()
		}))
	})
	if err != nil {
		return Epoch{}, err
	}
	return told, nil
}
