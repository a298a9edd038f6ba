package protocol

import (
	"fmt"
	"math"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// refusalTime is how long a peer has to hang up once it was told that its device
// is refused. To hang up ourselves at once could cost it the reason.
const refusalTime = 5 * time.Second

// RefusedError is the reason of a connection that ended because the destination
// does not take a device of ours.
type RefusedError struct {
	Dev    uint32
	Reason string // the destination's words, on one line
	// Peer is what the destination said beside that: see FromProtocol.RefuseWith.
	Peer wire.Extension
}

// Error says what the destination said.
func (e *RefusedError) Error() string {
	return "the destination refuses the disk: " + e.Reason
}

// Refuse says why the factory is about to return no store. The source is told,
// if it is one that listens. It is called by the factory.
func (f *FromProtocol) Refuse(reason string) {
	f.RefuseWith(reason, wire.Extension{})
}

// RefuseWith is Refuse that tells the source more of the device here that its disk
// would have come to: ext holds Live, Device, Epoch and Identity as far as the
// source should know them.
func (f *FromProtocol) RefuseWith(reason string, ext wire.Extension) {
	ext.Revision, ext.Refused = wire.Revision, OneLine(reason)
	f.in.refusal = ext
}

// OneLine makes text that may have come from anywhere fit for a line of a log
// and for the wire.
func OneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, strings.ToValidUTF8(s, "?"))
	for len(s) > wire.MaxRefused {
		_, n := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-n]
	}
	return s
}

// turnAway ends the connection because the factory gave no store, and tells the
// peer why if it can hear it.
func (in *incoming) turnAway() {
	if in.refusal.Refused != "" && in.info.Extension != nil {
		in.tellRefusal()
	}
	in.p.end(fmt.Errorf("device %d (%.64q): %w", in.dev, in.info.Name, ErrRefused))
}

func (in *incoming) tellRefusal() {
	in.mu.Lock()
	in.turnedAway = true
	for in.jobs.n > 0 {
		j := in.jobs.pop()
		in.drop(&j)
	}
	in.mu.Unlock()
	in.p.stir()
	if in.answerInfo(in.refusal) != nil {
		return // the connection has ended and has its reason
	}
	late := time.NewTimer(refusalTime)
	defer late.Stop()
	select {
	case <-in.p.done:
	case <-late.C:
	}
}

// answerInfo answers an extended DevInfo.
func (in *incoming) answerInfo(ext wire.Extension) error {
	m := wire.DevInfoResponse{Extension: ext}
	packet, err := m.AppendBinary(nil)
	if err != nil {
		return err
	}
	return in.p.outbox.send(in.dev, in.id, packet, true)
}

// terms is what we say about ourselves to an extended peer whose device we take.
func (in *incoming) terms() wire.Extension {
	e := wire.Extension{
		Revision: wire.Revision,
		MaxData:  uint32(min(int64(in.p.opts.MaxData), in.window)),
		Window:   uint32(min(in.window, math.MaxUint32)),
	}
	if d, ok := in.store.(Describer); ok {
		d.Describe(&e)
	}
	return e
}
