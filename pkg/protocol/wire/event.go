package wire

import "fmt"

// EventType is what has happened at the source.
type EventType byte

// The events, by their numbers on the wire.
const (
	EventPreLock EventType = iota
	EventPostLock
	EventPreUnlock
	EventPostUnlock
	EventCompleted
	EventCustom // carries a type and a payload of its own
)

var eventNames = [...]string{"PreLock", "PostLock", "PreUnlock", "PostUnlock", "Completed", "Custom"}

// String is the event's name, or its number if it has none.
func (t EventType) String() string {
	if int(t) < len(eventNames) {
		return eventNames[t]
	}
	return fmt.Sprintf("event %d", byte(t))
}

// Event tells the destination what has happened. It is answered when it has
// been acted on.
type Event struct {
	Type       EventType
	CustomType byte   // of EventCustom only
	Payload    []byte // of EventCustom only; a decoded one aliases the packet
}

// AppendBinary appends the packet.
func (m *Event) AppendBinary(b []byte) ([]byte, error) {
	if m.Type > EventCustom {
		return b, fmt.Errorf("wire: %s: %w", m.Type, ErrInvalid)
	}
	b = append(b, byte(CommandEvent), byte(m.Type))
	if m.Type == EventCustom {
		b = append(b, m.CustomType)
		b = append(b, m.Payload...)
	}
	return b, nil
}

// UnmarshalBinary decodes a whole packet.
func (m *Event) UnmarshalBinary(b []byte) error {
	c := newCursor(b, CommandEvent)
	*m = Event{Type: EventType(c.u8())}
	switch {
	case c.err != nil:
	case m.Type == EventCustom:
		m.CustomType = c.u8()
		m.Payload = c.rest()
	case m.Type > EventCustom:
		c.fail(fmt.Errorf("%w: %s", ErrInvalid, m.Type))
	}
	return c.done()
}
