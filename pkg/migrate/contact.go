package migrate

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
)

// contact is a destination that a source has met: the devices that its disks come to,
// and its address.
type contact struct {
	devices []Device // in the order of the disks; unnamed of a plain Silo
	at      string   // host and port; empty of a connection that has none
}

func newContact(lines []*line, conn any) contact {
	var c contact
	for _, l := range lines {
		c.devices = append(c.devices, l.told.device())
	}
	if a, ok := conn.(interface{ RemoteAddr() net.Addr }); ok {
		if tcp, ok := a.RemoteAddr().(*net.TCPAddr); ok {
			c.at = tcp.String()
		}
	}
	return c
}

// minDevice is how many digits of a device's UUID name it.
const minDevice = 8

// is reports whether name names the destination: by the UUID of one of its devices, or
// the first digits of it; or by its address, with or without the port.
func (c contact) is(name string) bool {
	digits := strings.ToLower(strings.ReplaceAll(name, "-", ""))
	for _, d := range c.devices {
		if d != unnamed && len(digits) >= minDevice && strings.HasPrefix(hex.EncodeToString(d[:]), digits) {
			return true
		}
	}
	host, _, _ := net.SplitHostPort(c.at)
	return c.at != "" && (name == c.at || name == host)
}

// String is how people name the destination.
func (c contact) String() string {
	name := "a plain Silo"
	if c.devices[0] != unnamed {
		name = "device " + hex.EncodeToString(c.devices[0][:])
	}
	if c.at != "" {
		name += " at " + c.at
	}
	return name
}

// ErrOtherDestination means that the disks are not handed off, since the destination
// that is connected may not be the one that is meant.
var ErrOtherDestination = errors.New("nothing has changed")

// contacts are the destinations that a source has met. hand guards it.
type contacts struct {
	all  []contact
	here *contact // that is connected; nil: none
}

// enter notes that c is connected.
func (k *contacts) enter(c contact) {
	i := slices.IndexFunc(k.all, func(o contact) bool { return slices.Equal(o.devices, c.devices) })
	if i < 0 {
		i = len(k.all)
		k.all = append(k.all, c)
	}
	k.all[i].at = c.at
	k.here = &c
}

// several reports whether it is not clear which destination is meant.
func (k *contacts) several() bool { return len(k.all) > 1 }

// check returns why the disks cannot be handed off to the destination that is
// connected, if to, which may be empty, does not name it.
func (k *contacts) check(to string) error {
	switch {
	case k.here == nil:
		return ErrNotConnected
	case to == "" && !k.several(), to != "" && k.here.is(to):
		return nil
	case to == "":
		return fmt.Errorf("several destinations have connected: say with --to which one gets the disks: %s: %w", k, ErrOtherDestination)
	}
	return fmt.Errorf("the destination that is connected is not %s: %s: %w", to, k, ErrOtherDestination)
}

// String names all of them.
func (k *contacts) String() string {
	var names []string
	for _, c := range k.all {
		name := c.String()
		if k.here != nil && slices.Equal(c.devices, k.here.devices) {
			name += " (connected)"
		}
		names = append(names, name)
	}
	return strings.Join(names, ", ")
}
