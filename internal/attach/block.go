package attach

import (
	"context"
	"errors"
	"path/filepath"
	"strconv"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
)

// tableTime is how long an export may take to show its partition table: a block
// that is not there yet may wait for a source that has not come.
var tableTime = 3 * time.Second

// wantedBlock is the block size that the device is to have, in bytes; 0 if that is
// to be found out. One that is attached already keeps its own.
func (a *attacher) wantedBlock(p plan) uint32 {
	if p.what == renew {
		n, err := strconv.ParseUint(a.line(filepath.Join(a.block, p.device.name(), "queue/logical_block_size")), 10, 32)
		if err != nil {
			return sector
		}
		return uint32(n)
	}
	return uint32(a.opts.BlockSize)
}

// first makes the first connection, and finds out the block size by it: a server
// may take no second one, or end with the first.
func (c *connections) first(ctx context.Context, t nbdclient.Target) error {
	conn, err := nbdclient.DialTransport(ctx, t)
	if err != nil {
		return err
	}
	c.block, err = tableBlock(ctx, conn)
	if err == nil {
		c.all = append(c.all, conn)
		return nil
	}
	conn.Conn.Close() // of no use any more: the answer may come yet
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	c.block, c.unread = max(conn.MinBlock, sector), true
	return nil
}

// tableBlock is the block size for which the partition table of an export was
// made: a GPT has its header in the second block.
func tableBlock(ctx context.Context, t *nbdclient.Transport) (uint32, error) {
	small := max(t.MinBlock, sector)
	if t.Size < 2*maxBlock || small >= maxBlock {
		return small, nil
	}
	ctx, cancel := context.WithTimeout(ctx, tableTime)
	defer cancel()
	b := make([]byte, 2*maxBlock)
	err := t.ReadAt(ctx, b, 0)
	if refused := new(nbdclient.Error); errors.As(err, &refused) {
		return small, nil // the connection is good, and the kernel will see it too
	}
	if err != nil {
		return 0, err
	}
	const signature = "EFI PART"
	for block := small; block <= maxBlock; block *= 2 {
		if string(b[block:][:len(signature)]) == signature {
			return block, nil
		}
	}
	return small, nil
}
