//go:build !linux

package nbdexport

import (
	"errors"
	"net"
)

// pipe is not to be had here.
type pipe struct{ r int }

func newPipe(net.Conn) *pipe { return nil }

func (*pipe) close()                      {}
func (*pipe) put([]byte) error            { return errors.ErrUnsupported }
func (*pipe) take(int, bool) (int, error) { return 0, errors.ErrUnsupported }
func (*pipe) pack(int) error              { return errors.ErrUnsupported }
func (*pipe) get([]byte) error            { return errors.ErrUnsupported }
