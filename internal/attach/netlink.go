package attach

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The numbers of linux/nbd-netlink.h that are used here, under their names.
const (
	nbdFamily  = "nbd" // NBD_GENL_FAMILY_NAME
	nbdVersion = 1     // NBD_GENL_VERSION

	cmdConnect     = 1 // NBD_CMD_CONNECT
	cmdDisconnect  = 2 // NBD_CMD_DISCONNECT
	cmdReconfigure = 3 // NBD_CMD_RECONFIGURE

	attrIndex       = 1  // NBD_ATTR_INDEX
	attrSize        = 2  // NBD_ATTR_SIZE_BYTES
	attrBlockSize   = 3  // NBD_ATTR_BLOCK_SIZE_BYTES
	attrTimeout     = 4  // NBD_ATTR_TIMEOUT, in seconds
	attrServerFlags = 5  // NBD_ATTR_SERVER_FLAGS
	attrSockets     = 7  // NBD_ATTR_SOCKETS
	attrDeadTimeout = 8  // NBD_ATTR_DEAD_CONN_TIMEOUT, in seconds
	attrBackend     = 10 // NBD_ATTR_BACKEND_IDENTIFIER

	sockItem = 1 // NBD_SOCK_ITEM
	sockFD   = 1 // NBD_SOCK_FD
)

const (
	genlHeader  = 4                // sizeof(struct genlmsghdr)
	attrHeader  = 4                // sizeof(struct nlattr)
	answerTime  = 30 * time.Second // the kernel answers before the request has been sent, so to say
	maxMessage  = 64 << 10
	attrTypes   = 0x3fff // NLA_TYPE_MASK
	netlinkPath = "the kernel's netlink interface"
)

// errNoModule says that the kernel has no NBD client, or not here.
var errNoModule = errors.New("the kernel's NBD client is not there: run modprobe nbd (and in a container, this command in the host's network namespace)")

// attrs is a list of netlink attributes under construction.
type attrs []byte

func (a attrs) bytes(typ uint16, v []byte) attrs {
	a = binary.NativeEndian.AppendUint16(a, uint16(attrHeader+len(v)))
	a = binary.NativeEndian.AppendUint16(a, typ)
	a = append(a, v...)
	for len(a)%unix.NLMSG_ALIGNTO != 0 {
		a = append(a, 0)
	}
	return a
}

func (a attrs) u32(typ uint16, v uint32) attrs {
	return a.bytes(typ, binary.NativeEndian.AppendUint32(nil, v))
}

func (a attrs) u64(typ uint16, v uint64) attrs {
	return a.bytes(typ, binary.NativeEndian.AppendUint64(nil, v))
}

func (a attrs) text(typ uint16, s string) attrs { return a.bytes(typ, append([]byte(s), 0)) }

func (a attrs) nested(typ uint16, in attrs) attrs { return a.bytes(typ|unix.NLA_F_NESTED, in) }

// sockets are the connections that the kernel is given.
func (a attrs) sockets(fds []int) attrs {
	var items attrs
	for _, fd := range fds {
		items = items.nested(sockItem, attrs(nil).u32(sockFD, uint32(fd)))
	}
	return a.nested(attrSockets, items)
}

// attr finds the first attribute of a type. What is cut short is not there.
func attr(b []byte, typ uint16) (value []byte, ok bool) {
	for len(b) >= attrHeader {
		n := int(binary.NativeEndian.Uint16(b))
		if n < attrHeader || n > len(b) {
			return nil, false
		}
		if binary.NativeEndian.Uint16(b[2:])&attrTypes == typ {
			return b[attrHeader:n], true
		}
		b = b[min(align(n), len(b)):]
	}
	return nil, false
}

func align(n int) int { return (n + unix.NLMSG_ALIGNTO - 1) &^ (unix.NLMSG_ALIGNTO - 1) }

// message is a request of generic netlink.
func message(family uint16, seq uint32, cmd, version uint8, a attrs) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+genlHeader+len(a)))
	b = binary.NativeEndian.AppendUint16(b, family)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, 0) // from us, whoever that is
	b = append(b, cmd, version, 0, 0)
	return append(b, a...)
}

// answer looks through a datagram for what belongs to request seq: the
// attributes of a reply, and whether the request is over, with its error.
func answer(b []byte, seq uint32) (a []byte, over bool, err error) {
	for len(b) >= unix.NLMSG_HDRLEN {
		n := int(binary.NativeEndian.Uint32(b))
		if n < unix.NLMSG_HDRLEN || n > len(b) {
			break
		}
		body, typ := b[unix.NLMSG_HDRLEN:n], binary.NativeEndian.Uint16(b[4:])
		mine := binary.NativeEndian.Uint32(b[8:]) == seq
		b = b[min(align(n), len(b)):]
		switch {
		case !mine:
		case typ == unix.NLMSG_ERROR && len(body) >= 4:
			if e := int32(binary.NativeEndian.Uint32(body)); e != 0 {
				return nil, true, unix.Errno(-e)
			}
			return a, true, nil
		case typ >= unix.NLMSG_MIN_TYPE && len(body) >= genlHeader:
			a = body[genlHeader:]
		}
	}
	if len(b) > 0 {
		return nil, true, fmt.Errorf("%s gave an answer that makes no sense", netlinkPath)
	}
	return a, false, nil
}

// kernel is what a device is attached with: generic netlink in life, a fake in
// tests.
type kernel interface {
	// do carries out one command of the nbd family and returns the attributes
	// of the reply, if there is one. An errno is the kernel's.
	do(cmd uint8, a attrs) ([]byte, error)
}

// netlink is a socket of generic netlink. Not for several goroutines at once.
type netlink struct {
	fd     int
	family uint16
	seq    uint32
}

// openNetlink finds the kernel's NBD client. Close what it returns.
func openNetlink() (*netlink, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_GENERIC)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", netlinkPath, err)
	}
	n := &netlink{fd: fd}
	tv := unix.NsecToTimeval(int64(answerTime))
	if err := errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv), n.find()); err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// find asks for the number of the nbd family.
func (n *netlink) find() error {
	a, err := n.request(unix.GENL_ID_CTRL, unix.CTRL_CMD_GETFAMILY, 1, attrs(nil).text(unix.CTRL_ATTR_FAMILY_NAME, nbdFamily))
	if errors.Is(err, unix.ENOENT) {
		return errNoModule
	}
	if err != nil {
		return fmt.Errorf("%s: %w", netlinkPath, err)
	}
	id, ok := attr(a, unix.CTRL_ATTR_FAMILY_ID)
	if !ok || len(id) != 2 {
		return fmt.Errorf("%s gave no number for nbd", netlinkPath)
	}
	n.family = binary.NativeEndian.Uint16(id)
	return nil
}

func (n *netlink) do(cmd uint8, a attrs) ([]byte, error) {
	return n.request(n.family, cmd, nbdVersion, a)
}

func (n *netlink) request(family uint16, cmd, version uint8, a attrs) ([]byte, error) {
	n.seq++
	if err := unix.Sendto(n.fd, message(family, n.seq, cmd, version, a), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, os.NewSyscallError("sendto", err)
	}
	var reply []byte
	for {
		b := make([]byte, maxMessage)
		got, from, err := unix.Recvfrom(n.fd, b, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return nil, fmt.Errorf("no answer within %v", answerTime)
		case err != nil:
			return nil, os.NewSyscallError("recvfrom", err)
		}
		if s, ok := from.(*unix.SockaddrNetlink); !ok || s.Pid != 0 {
			continue // not from the kernel
		}
		a, over, err := answer(b[:got], n.seq)
		if len(a) > 0 {
			reply = a
		}
		if over {
			return reply, err
		}
	}
}

func (n *netlink) Close() error { return unix.Close(n.fd) }
