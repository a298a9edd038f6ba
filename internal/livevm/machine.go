package livevm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"

	"github.com/silo-nbd/silo-nbd/internal/qmp"
)

// machine is a QEMU and our connection to it.
type machine struct {
	*process
	qmp *qmp.Client
}

// machine starts a QEMU with a disk that is told as QEMU's -blockdev wants it.
func (m *move) machine(ctx context.Context, name string, where int, disk string, more ...string) (*machine, error) {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "unix", m.path(name+".qmp")) // QEMU calls us: nobody has to ask when it listens
	if err != nil {
		return nil, err
	}
	defer ln.Close() // there is one caller
	device := "virtio-blk-pci,drive=disk,werror=stop,rerror=stop"
	if where == 1 {
		// Without a geometry QEMU reads a partition table at its start. Here that read is answered only after the
		// handoff, and QEMU is deaf till then.
		device += ",cyls=1024,heads=16,secs=32"
	}
	args := append([]string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-vga", "none", "-nic", "none",
		"-accel", m.o.Accel, "-cpu", m.o.CPU, "-m", strconv.Itoa(m.o.Memory),
		"-kernel", m.o.Kernel, "-initrd", m.path("initrd"), "-append", "console=ttyS1,115200 loglevel=4 panic=-1 no_timer_check",
		"-serial", "stdio", "-serial", "file:" + m.path(name+".console"),
		"-chardev", "socket,id=qmp,path=" + m.path(name+".qmp"), "-mon", "chardev=qmp,mode=control",
		"-blockdev", "node-name=disk," + disk,
		"-device", device,
	}, more...)
	p, err := m.launch(name, func(out io.Reader) { m.console.readLoop(where, out) }, "qemu-system-x86_64", args...)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() }) // wakes Accept, which says so
	defer stop()
	m.running[len(m.running)-1].wg.Go(func() {
		<-p.done
		_ = ln.Close() // likewise; it may be closed
	})
	conn, err := ln.Accept()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s does not call: %w", name, err), context.Cause(ctx), p.soon())
	}
	client, err := qmp.New(ctx, conn)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", name, err), p.soon())
	}
	return &machine{p, client}, nil
}

// soon is why the program has ended, if it has.
func (p *process) soon() error {
	select {
	case <-p.done:
		return p.failed()
	default:
		return nil
	}
}

// event waits for one of that name.
func (v *machine) event(ctx context.Context, name string) (qmp.Event, error) {
	e, err := v.qmp.Await(ctx, func(e qmp.Event) bool { return e.Name == name })
	if err != nil {
		err = fmt.Errorf("%s: waiting for %s: %w", v.name, name, err)
	}
	return e, err
}

// migration waits until the migration of the memory has got so far.
func (v *machine) migration(ctx context.Context, status string) error {
	var data struct{ Status string }
	for data.Status != status {
		e, err := v.event(ctx, "MIGRATION")
		if err != nil {
			return fmt.Errorf("%w (%s)", err, status)
		}
		if err := json.Unmarshal(e.Data, &data); err != nil {
			return fmt.Errorf("%s: %v: %w", v.name, e, err)
		}
		if data.Status != status && (data.Status == "failed" || data.Status == "cancelled") {
			return fmt.Errorf("%s: the migration of the memory is %q, not %q", v.name, data.Status, status)
		}
	}
	return nil
}

// capabilities turns some of the migration's on.
func (v *machine) capabilities(ctx context.Context, names ...string) error {
	type capability struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	var all []capability
	for _, name := range names {
		all = append(all, capability{name, true})
	}
	return v.qmp.Execute(ctx, "migrate-set-capabilities", map[string]any{"capabilities": all}, nil)
}

// memory is what the migration of the memory was like.
type memory struct {
	Status    string `json:"status"`
	TotalTime int64  `json:"total-time"` // ms
	Downtime  int64  `json:"downtime"`   // ms
	RAM       struct {
		Transferred int64 `json:"transferred"` // bytes
		Passes      int64 `json:"dirty-sync-count"`
	} `json:"ram"`
}
