package sources

import (
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxQuick is the most that one quick call moves, in bytes: the scheduler
// cannot interrupt it.
const maxQuick = 1 << 20

// quick moves what can be moved without waiting for a device, by calls that the
// Go scheduler is not told of: to tell it, and to have it watch the call, costs
// more than to copy a block. What lies in memory anyway, as on tmpfs, is moved so
// both ways: if it was swapped out it is waited for as memory of our own would be.
// Of other files what is in the page cache is read (RWF_NOWAIT, see preadv2(2)).
// What it leaves, and every error, is for the ordinary call.
type quick struct {
	raw    syscall.RawConn
	memory bool        // the file system has no device
	never  atomic.Bool // the file system has said that it does not know RWF_NOWAIT

	noSplice atomic.Bool // it has said that it takes nothing out of a pipe
}

func (q *quick) init(raw syscall.RawConn, regular bool) {
	q.raw = raw
	if !regular {
		return
	}
	var st unix.Statfs_t
	err := control(raw, func(fd int) error { return unix.Fstatfs(fd, &st) })
	q.memory = err == nil && (st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC)
}

// read reads what it can of p, and says how many bytes that was.
func (q *quick) read(p []byte, off int64) int {
	if len(p) == 0 || !q.memory && q.never.Load() {
		return 0
	}
	op := newQuickOp(q, p, off)
	defer op.free()
	_ = q.raw.Control(op.read) // it is closed, which the ordinary call says
	return op.n
}

// write writes what it can of p, and says how many bytes that was.
func (q *quick) write(p []byte, off int64) int {
	if len(p) == 0 || !q.memory {
		return 0
	}
	op := newQuickOp(q, p, off)
	defer op.free()
	_ = q.raw.Control(op.write) // it is closed, which the ordinary call says
	return op.n
}

// quickOp is one operation. Its methods are made into function values once,
// since that costs an allocation.
type quickOp struct {
	q   *quick
	p   []byte
	off int64
	n   int // bytes done
	iov unix.Iovec

	pipe, length int // of splice
	errno        syscall.Errno

	read, write, splice func(fd uintptr)
}

var quickOps = sync.Pool{New: func() any {
	op := new(quickOp)
	op.read, op.write, op.splice = op.doRead, op.doWrite, op.doSplice
	return op
}}

func newQuickOp(q *quick, p []byte, off int64) *quickOp {
	op := quickOps.Get().(*quickOp)
	op.q, op.p, op.off, op.n = q, p, off, 0
	return op
}

func (op *quickOp) free() {
	op.q, op.p, op.iov, op.errno = nil, nil, unix.Iovec{}, 0
	quickOps.Put(op)
}

func (op *quickOp) doRead(fd uintptr) {
	trap, flags := uintptr(unix.SYS_PREADV2), uintptr(unix.RWF_NOWAIT)
	if op.q.memory {
		flags = 0
	}
	if errno := op.move(trap, fd, flags); errno == unix.EOPNOTSUPP || errno == unix.ENOSYS || errno == unix.EINVAL {
		op.q.never.Store(true)
	}
}

func (op *quickOp) doWrite(fd uintptr) { op.move(unix.SYS_PWRITEV2, fd, 0) }

// move makes calls until all is done, or one does less than it was asked for.
func (op *quickOp) move(trap, fd, flags uintptr) syscall.Errno {
	for op.n < len(op.p) {
		want := min(len(op.p)-op.n, maxQuick)
		op.iov.Base = &op.p[op.n]
		op.iov.SetLen(want)
		off := op.off + int64(op.n) // in two halves, of which a 64-bit kernel takes the first for all
		n, _, errno := syscall.RawSyscall6(trap, fd, uintptr(unsafe.Pointer(&op.iov)), 1, uintptr(off), uintptr(off>>32), flags)
		if errno != 0 {
			return errno // EINTR too: the ordinary call goes on
		}
		op.n += int(n)
		if int(n) < want {
			return 0
		}
	}
	return 0
}
