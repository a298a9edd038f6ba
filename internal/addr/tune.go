package addr

import (
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// A peer that vanished without a word is noticed within keepaliveIdle +
// keepaliveCount * keepaliveInterval when nothing is being sent, and within
// userTimeout when something is.
const (
	keepaliveIdle     = 5 * time.Second
	keepaliveInterval = 3 * time.Second
	keepaliveCount    = 3
	userTimeout       = 15 * time.Second

	// notSentLowat bounds the bytes that lie unsent in the socket, in front of
	// which nothing urgent can go: one packet of the background, so that it is
	// copied while it is in the cache. On a slow path the window allows less.
	notSentLowat = 1 << 20

	// unixSendBuffer is what a unix socket holds, in bytes, of which the kernel
	// makes twice as much: a large answer is on its way while the next is read from
	// the disk.
	unixSendBuffer = 512 << 10
)

// Tune sets on a connection what every connection of ours wants: over TCP no
// delay of small packets, a silent peer noticed, few unsent bytes in the socket;
// on a unix socket room for a large answer. It looks through wrappers with a
// NetConn method, such as *tls.Conn, and leaves connections of other kinds as
// they are.
func Tune(c net.Conn) error {
	for {
		wrapper, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		c = wrapper.NetConn()
	}
	if local, ok := c.(*net.UnixConn); ok {
		if err := local.SetWriteBuffer(unixSendBuffer); err != nil {
			return fmt.Errorf("tune connection: %w", err)
		}
		return nil
	}
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return nil
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return fmt.Errorf("tune connection: %w", err)
	}
	var sockErr error
	err = raw.Control(func(fd uintptr) {
		sockErr = errors.Join(
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout.Milliseconds())),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, notSentLowat))
	})
	err = errors.Join(err, sockErr, tcp.SetNoDelay(true), tcp.SetKeepAliveConfig(net.KeepAliveConfig{
		Enable: true, Idle: keepaliveIdle, Interval: keepaliveInterval, Count: keepaliveCount,
	}))
	if err != nil {
		return fmt.Errorf("tune connection: %w", err)
	}
	return nil
}
