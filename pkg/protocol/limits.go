package protocol

import (
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// What a peer may cost us. docs/PROTOCOL.md explains each to its users.
const (
	// defaultMemory is Options.Memory by default, in bytes.
	defaultMemory = 64 << 20
	// minMemory is the least Options.Memory that still moves 1 MiB blocks.
	minMemory = 4 << 20
	// defaultMaxPacket is Options.MaxPacket by default, in bytes.
	defaultMaxPacket = 64 << 20
	// defaultMaxData is Options.MaxData by default, in bytes.
	defaultMaxData = 1 << 20
	// maxData is the largest data of one WriteAt or ReadAt, in bytes, that is
	// ever taken, also from a peer that has not been told what we take.
	maxData = 16 << 20
	// defaultMaxDevices is Options.MaxDevices by default.
	defaultMaxDevices = 1024
	// defaultWorkers is Options.Workers by default.
	defaultWorkers = 4

	// memoryPerDevice is how much of Options.Memory there is for each device that a
	// connection may have, at least, in bytes. minShare is what is kept of it for
	// each device alone, however many there are: for one page of data and one short
	// event or list.
	memoryPerDevice = 64 << 10
	minShare        = memoryPerDevice / 8
	// minCharge is what a request counts at least against the memory, in bytes:
	// it stands for the queue's own cost, so that empty requests are bounded too.
	minCharge = 4 << 10
	// maxUnanswered is how many requests of one device may be without an answer;
	// one more is a protocol error. Requests with data meet the memory first.
	maxUnanswered = 1 << 15
	// maxControl is how many events, lists and the like of one device may be
	// without an answer; one more is a protocol error.
	maxControl = 256

	// readBuffer is the reader's buffer in bytes. Payloads larger than it are
	// read past it, straight to where they are needed.
	readBuffer = 32 << 10
	// firstRead is how many bytes of a long list are taken on its word alone;
	// more memory is taken only as the bytes come.
	firstRead = 1 << 20
	// maxAside is how long the goroutine that reads may be at a store before
	// another one reads on: several times what 1 MiB takes to the page cache.
	maxAside = 5 * time.Millisecond
	// maxOutbox is how many bytes of answers wait for the socket before those
	// who answer have to wait too.
	maxOutbox = 64 << 10
	// maxUrgentRun is how many urgent packets in a row go before a bulk packet that
	// waits.
	maxUrgentRun = 32
	// maxCoalesced is the longest payload that is copied behind its head rather
	// than written beside it, in bytes: below it the copy is the cheaper one.
	maxCoalesced = 4 << 10
	// chunk is how many bytes of run-length data are expanded at a time.
	chunk = 1 << 20
	// maxDirtyBlocks and maxHashes are how many we send in one packet; longer
	// lists go as several.
	maxDirtyBlocks = 1 << 20
	maxHashes      = 1 << 15
	// maxRange is the longest range of a NeedAt or DontNeedAt, in bytes, and
	// maxZeroRun that of a run of zeroes.
	maxRange   = 1<<31 - 1
	maxZeroRun = wire.MaxRunLength
	// maxSmall is the longest packet of a fixed shape, in bytes.
	maxSmall = 64
	// maxEvent is the longest Event packet, in bytes.
	maxEvent = 64 << 10
	// maxDevInfo is the longest DevInfo packet, in bytes.
	maxDevInfo = 1 + 8 + 4 + 2 + 1<<16 + 4 + wire.MaxSchema + wire.MaxExtension
)

// maxLength is the longest packet of a command, in bytes, before any of it is
// read; 0 for a command that is not known.
func (o *Options) maxLength(c wire.Command) int64 {
	var n int64
	switch c {
	case wire.CommandReadAt, wire.CommandNeedAt, wire.CommandDontNeedAt, wire.CommandRemoveDev, wire.CommandAlive,
		wire.CommandReadAtResponseErr, wire.CommandWriteAtResponse, wire.CommandWriteAtResponseErr,
		wire.CommandEventResponse, wire.CommandHashesResponse, wire.CommandDirtyListResponse:
		n = maxSmall
	case wire.CommandWriteAt, wire.CommandWriteAtWithMap, wire.CommandReadAtResponse:
		n = maxData + maxSmall
	case wire.CommandDirtyList, wire.CommandHashes, wire.CommandRemoveFromMap, wire.CommandAlternateSources:
		n = int64(o.MaxPacket)
	case wire.CommandEvent:
		n = maxEvent
	case wire.CommandDevInfo:
		n = maxDevInfo
	case wire.CommandDevInfoResponse:
		n = 1 + wire.MaxExtension
	}
	return min(n, int64(o.MaxPacket))
}
