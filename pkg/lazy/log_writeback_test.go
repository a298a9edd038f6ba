package lazy

import (
	"bytes"
	"syscall"
	"testing"
)

// D4: the log has what was flushed, and the kernel fails to write it to the disk,
// drops it, and tells only the first who syncs: a process that ends of it, or the
// next one at its start. Whoever comes then has nothing but the log.
func TestD4WhatTheLogHasOutlivesAFailedWriteback(t *testing.T) {
	failing := func(what string) error {
		if what == "sync disk" {
			return syscall.EIO
		}
		return nil
	}
	for _, atStart := range []bool{false, true} {
		a := newLogged(t, 8, Options{})
		a.put(testBlock, filled(1, 512))
		if err := a.s.Flush(); err != nil { // an ordinary one: the log is over
			t.Fatal(err)
		}
		a.put(testBlock, filled(2, 512))
		if a.p.hook = failing; !atStart && a.s.Flush() == nil {
			t.Fatal("a flush did not fail with the disk")
		}
		a.p.kill()
		_ = a.d.Close() // it is dead
		a.disk.mu.Lock()
		a.disk.now, a.disk.since = bytes.Clone(a.disk.durable), make(map[int][][]byte)
		a.disk.mu.Unlock()
		if atStart {
			p := newProcess(nil, -1)
			p.hook = failing
			if _, err := a.machine.start(p, a.o); err == nil {
				t.Fatal("a start did not fail with the disk")
			}
		}
		a.start(newProcess(nil, -1))
		mustRead(t, a.d, testBlock, filled(2, 512))
		a.cut(false, false)
		mustRead(t, a.d, testBlock, filled(2, 512))
	}
}
