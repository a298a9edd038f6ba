// Package systemd speaks with the service manager that may have started us: it
// takes the sockets that it has opened, and tells it how far we are. Without one
// nothing is said.
package systemd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
)

// Listener takes the listening socket that the service manager has opened
// (LISTEN_FDS): the one of this name (FileDescriptorName= in its unit), or with
// an empty name the only one. It is called once; what it does not take is closed,
// and a child process finds nothing of it.
func Listener(name string) (net.Listener, error) {
	files := activation.Files(true)
	var chosen []*os.File
	for _, f := range files {
		if name == "" || f.Name() == name {
			chosen = append(chosen, f)
		}
	}
	defer func() {
		for _, f := range files {
			f.Close() // the listener has its own
		}
	}()
	switch {
	case len(files) == 0:
		return nil, errors.New("no socket was passed: start this by a systemd .socket unit, or give an address")
	case len(chosen) == 0:
		return nil, fmt.Errorf("no socket called %q was passed: want it as FileDescriptorName= in the .socket unit", name)
	case len(chosen) > 1 && name == "":
		return nil, fmt.Errorf("%d sockets were passed: say which, as systemd:NAME with the FileDescriptorName= of one", len(chosen))
	case len(chosen) > 1:
		return nil, fmt.Errorf("%d sockets called %q were passed: want one", len(chosen), name)
	}
	ln, err := net.FileListener(chosen[0])
	if err != nil {
		return nil, fmt.Errorf("the socket that was passed cannot be used, it has to be a listening stream socket: %w", err)
	}
	return ln, nil
}

// Ready tells that what this unit is for can be used.
func Ready() error { return notify(daemon.SdNotifyReady) }

// Stopping tells that the end has begun.
func Stopping() error { return notify(daemon.SdNotifyStopping) }

// Status tells people how far we are, in one line.
func Status(line string) error {
	return notify("STATUS=" + strings.Map(func(c rune) rune {
		if c < ' ' {
			return '?' // a line break would begin another message
		}
		return c
	}, line))
}

// Notified says whether somebody listens.
func Notified() bool { return os.Getenv("NOTIFY_SOCKET") != "" }

func notify(state string) error {
	if _, err := daemon.SdNotify(false, state); err != nil {
		return fmt.Errorf("the service manager cannot be told: %w", err)
	}
	return nil
}
