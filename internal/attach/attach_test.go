package attach

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pojntfx/go-nbd/pkg/backend"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
)

// machine is a kernel with its sysfs in a directory.
type machine struct {
	t *testing.T
	host
	sent    []string     // the commands, in words
	busy    map[int]bool // devices that somebody has claimed
	refuse  []error      // what the next commands get
	sockets []int        // how many sockets came with each command
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	dir := t.TempDir()
	m := &machine{t: t, busy: make(map[int]bool)}
	m.host = host{block: filepath.Join(dir, "block"), proc: filepath.Join(dir, "proc"), dev: filepath.Join(dir, "dev")}
	m.host.claim = func(path string) (func(), error) {
		d, err := ParseDevice(filepath.Base(path))
		require.NoError(t, err)
		if m.busy[int(d)] {
			return nil, &fs.PathError{Op: "open", Path: path, Err: unix.EBUSY}
		}
		m.sent = append(m.sent, fmt.Sprint("hold ", int(d)))
		return func() { m.sent = append(m.sent, fmt.Sprint("release ", int(d))) }, nil
	}
	require.NoError(t, os.MkdirAll(m.block, 0o755))
	m.write("proc/self/mountinfo", "")
	m.write("proc/swaps", "Filename Type\n")
	return m
}

func (m *machine) write(path, content string) {
	m.t.Helper()
	path = filepath.Join(filepath.Dir(m.block), path)
	require.NoError(m.t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(m.t, os.WriteFile(path, []byte(content), 0o600))
}

// device makes a device; backend is what it is attached to, empty if it is not.
func (m *machine) device(n int, backend string, size int64) {
	dir := fmt.Sprintf("block/nbd%d/", n)
	m.write(dir+"dev", fmt.Sprintf("43:%d\n", n*32))
	m.write(dir+"size", fmt.Sprintf("%d\n", size/sector))
	m.write(fmt.Sprintf("dev/nbd%d", n), "")
	if backend != "" {
		m.write(dir+"pid", "1\n")
		m.write(dir+"backend", backend+"\n")
	}
}

func (m *machine) do(cmd uint8, a attrs) ([]byte, error) {
	n := -1
	if v, ok := attr(a, attrIndex); ok {
		n = int(binary.NativeEndian.Uint32(v))
	}
	m.sent = append(m.sent, fmt.Sprint([]string{"", "connect ", "disconnect ", "reconfigure "}[cmd], n))
	if v, ok := attr(a, attrSockets); ok {
		m.sockets = append(m.sockets, len(v)/12)
	}
	if len(m.refuse) > 0 {
		err := m.refuse[0]
		m.refuse = m.refuse[1:]
		if err != nil {
			return nil, err
		}
	}
	switch cmd {
	case cmdConnect:
		n = max(n, 0)
		size, _ := attr(a, attrSize)
		to, _ := attr(a, attrBackend)
		m.device(n, strings.TrimRight(string(to), "\x00"), int64(binary.NativeEndian.Uint64(size)))
		return attrs(nil).u32(attrIndex, uint32(n)), nil
	case cmdDisconnect:
		dir := filepath.Join(m.block, fmt.Sprintf("nbd%d", n))
		require.NoError(m.t, errors.Join(os.Remove(filepath.Join(dir, "pid")), os.Remove(filepath.Join(dir, "backend"))))
	}
	return nil, nil
}

// export serves a disk of zeroes over a unix socket.
func export(t *testing.T, size int) nbdclient.Target {
	t.Helper()
	return serve(t, backend.NewMemoryBackend(make([]byte, size)))
}

func (m *machine) attach(t nbdclient.Target, o Options) (Result, error) {
	a := &attacher{host: m.host, kernel: m, opts: o, backend: t.String()}
	return a.attach(m.t.Context(), t)
}

func TestAutoLetsTheKernelChoose(t *testing.T) {
	m, to := newMachine(t), export(t, 1<<20+100)
	m.device(0, "", 0)
	m.device(1, "nbd://elsewhere:1/x", 1<<20)
	r, err := m.attach(to, Options{Device: Auto})
	require.NoError(t, err)
	require.Equal(t, Result{Device: 0, Size: 1 << 20, Cut: 100}, r)
	require.Equal(t, []string{"connect -1"}, m.sent)
	require.Equal(t, []int{1}, m.sockets)
	require.Equal(t, to.String(), m.backend(0))
}

func TestDeviceThatNobodyUsesIsTakenFromItsPredecessor(t *testing.T) {
	m, to := newMachine(t), export(t, 1<<20)
	m.device(2, to.String(), 4096)
	for _, want := range []Device{Auto, 2} {
		m.sent = nil
		r, err := m.attach(to, Options{Device: want})
		require.NoError(t, err)
		require.Equal(t, Result{Device: 2, Size: 1 << 20}, r)
		require.Equal(t, []string{"hold 2", "disconnect 2", "release 2", "connect 2"}, m.sent)
	}
}

func TestDeviceInUseGetsNewConnections(t *testing.T) {
	m, to := newMachine(t), export(t, 1<<20)
	m.device(2, to.String(), 1<<20)
	m.busy[2] = true
	r, err := m.attach(to, Options{Device: 2, Connections: 3, Timeout: time.Hour})
	require.NoError(t, err)
	require.True(t, r.Renewed)
	require.Equal(t, []string{"reconfigure 2"}, m.sent)
	require.Equal(t, []int{3}, m.sockets)

	_, err = m.attach(to, Options{Device: Auto})
	require.ErrorContains(t, err, "/dev/nbd2 is attached to this export already, and in use")
	m.device(2, to.String(), 1<<21)
	_, err = m.attach(to, Options{Device: 2})
	require.ErrorContains(t, err, "it is another disk")
	require.Len(t, m.sent, 1, "a refusal touches nothing")
}

func TestDeviceOfOthersIsRefused(t *testing.T) {
	m, to := newMachine(t), export(t, 1<<20)
	m.device(0, "nbd://elsewhere:1/x", 1<<20)
	m.device(1, "", 0)
	m.busy[1] = true
	_, err := m.attach(to, Options{Device: 0})
	require.ErrorContains(t, err, "/dev/nbd0 is attached to nbd://elsewhere:1/x: take another device, or let go of that first: silo-nbd detach /dev/nbd0")
	_, err = m.attach(to, Options{Device: 1})
	require.ErrorContains(t, err, "/dev/nbd1 is not attached, but in use")
	require.Empty(t, m.sent)
}

func TestDeviceSomebodyLooksIntoIsTriedAgain(t *testing.T) {
	m, to := newMachine(t), export(t, 1<<20)
	m.refuse = []error{unix.EBUSY, unix.EBUSY, nil}
	r, err := m.attach(to, Options{Device: 4})
	require.NoError(t, err)
	require.EqualValues(t, 4, r.Device)
	require.Len(t, m.sent, 3)

	m.refuse = []error{unix.EPERM}
	_, err = m.attach(to, Options{Device: 5})
	require.ErrorContains(t, err, "only root may do that")
	m.refuse = []error{unix.EINVAL}
	_, err = m.attach(to, Options{Device: 5})
	require.ErrorContains(t, err, "dmesg")
}

func TestServersThatCannotBeAttachedAreRefused(t *testing.T) {
	m := newMachine(t)
	_, err := m.attach(export(t, 100), Options{Device: Auto})
	require.ErrorContains(t, err, "an export of 100 bytes is no block device")
	_, err = m.attach(nbdclient.Target{Network: "unix", Address: filepath.Join(t.TempDir(), "n")}, Options{Device: Auto})
	require.Error(t, err)
	require.Empty(t, m.sent)

	c := connections{}
	one := &nbdclient.Transport{Size: 1 << 20, MinBlock: 512}
	require.ErrorContains(t, c.add(0, one, 2), "the server allows no more than one")
	for _, block := range []uint32{513, 8192} {
		require.ErrorContains(t, c.shape(&nbdclient.Transport{Size: 1 << 20, MinBlock: block}), "the kernel takes powers of two")
	}
	require.NoError(t, c.shape(&nbdclient.Transport{Size: 1<<20 + 4095, MinBlock: 4096}))
	require.Equal(t, connections{size: 1 << 20, cut: 4095, block: 4096}, c)
	require.ErrorContains(t, c.add(1, one, 2), "has changed")
}

func TestTLSIsRefusedBeforeAnythingIsDone(t *testing.T) {
	_, err := Attach(t.Context(), "nbds://host/vm", Options{})
	require.ErrorContains(t, err, "the kernel speaks no TLS")
}

func TestOptionsThatMakeNoSense(t *testing.T) {
	for want, o := range map[string]Options{
		"--connections: -1 is no number": {Connections: -1},
		"--connections: 17 is no number": {Connections: 17},
		"cannot wait for ever":           {Connections: 2},
		"--timeout: -1s":                 {Timeout: -time.Second},
		"--timeout: 169h0m0s":            {Timeout: 169 * time.Hour},
		"--dead-timeout: -1ns":           {DeadTimeout: -1},
	} {
		require.ErrorContains(t, o.Check(), want)
	}
	require.NoError(t, Options{Connections: 16, Timeout: time.Second, DeadTimeout: maxTimeout}.Check())
	require.EqualValues(t, 1, seconds(1), "rounded down it would mean for ever")
}

func TestDetachWhatNobodyUses(t *testing.T) {
	m := newMachine(t)
	require.ErrorContains(t, detach(t.Context(), m.host, m, 0, false), "/dev/nbd0 is not attached")
	m.device(0, "x", 512)
	require.NoError(t, detach(t.Context(), m.host, m, 0, false))
	require.Equal(t, []string{"hold 0", "disconnect 0", "release 0"}, m.sent)
}

func TestDetachSaysWhoUsesADevice(t *testing.T) {
	m := newMachine(t)
	m.device(0, "x", 512)
	m.write("block/nbd0/nbd0p1/dev", "43:1\n")
	m.busy[0] = true
	refused := func(why string) {
		t.Helper()
		require.ErrorContains(t, detach(t.Context(), m.host, m, 0, false), "/dev/nbd0 is "+why+": end that first")
		require.Empty(t, m.sent)
	}
	refused("in use")
	m.write("block/nbd0/nbd0p1/holders/dm-3/x", "")
	refused("used by dm-3")
	m.write("proc/swaps", "Filename Type\n/dev/nbd0p1 partition\n")
	refused("swap")
	m.write("proc/self/mountinfo", "30 1 8:1 / / rw - ext4 /dev/sda1 rw\n31 30 43:1 / /mnt rw - ext4 /dev/nbd0p1 rw\n")
	refused("mounted at /mnt")

	require.NoError(t, detach(t.Context(), m.host, m, 0, true))
	require.Equal(t, []string{"disconnect 0"}, m.sent)
}

func TestParseDevice(t *testing.T) {
	for s, want := range map[string]Device{"/dev/nbd0": 0, "nbd12": 12} {
		got, err := ParseDevice(s)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	for _, s := range []string{"", "nbd", "/dev/sda", "nbd01", "nbd0p1", "nbd-1", "/dev/nbd99999"} {
		_, err := ParseDevice(s)
		require.ErrorContains(t, err, "is no NBD device", s)
	}
	require.Equal(t, "/dev/nbd7", Device(7).String())
}
