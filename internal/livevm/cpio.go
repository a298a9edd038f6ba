package livevm

import (
	"bytes"
	"fmt"
	"os"
	"slices"
)

// archive is a cpio archive in the form that the kernel unpacks.
type archive struct {
	buf  bytes.Buffer
	node int
}

func (a *archive) add(name string, mode int, content []byte) {
	a.node++
	fmt.Fprintf(&a.buf, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", a.node, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0)
	a.buf.WriteString(name)
	a.pad(1)
	a.buf.Write(content)
	a.pad(0)
}

// pad writes at least so many zero bytes, up to a multiple of four.
func (a *archive) pad(atLeast int) {
	n := atLeast + (4-(a.buf.Len()+atLeast)%4)%4
	a.buf.Write(make([]byte, n))
}

func (a *archive) bytes() []byte {
	a.add("TRAILER!!!", 0, nil)
	return a.buf.Bytes()
}

// makeInitrd makes the initramfs: that of scripts/guest, whose init runs /workload, and the workload behind it.
func makeInitrd(path, base, guest string, args string) error {
	first, err := os.ReadFile(base)
	if err != nil {
		return err
	}
	program, err := os.ReadFile(guest)
	if err != nil {
		return err
	}
	var a archive
	a.add("guest", 0o100755, program)
	a.add("workload", 0o100644, []byte("exec /guest "+args+" </dev/ttyS0\n"))
	a.add("workload.args", 0o100644, []byte("set --\n"))
	return os.WriteFile(path, slices.Concat(first, a.bytes()), 0o600)
}
