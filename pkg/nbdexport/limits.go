package nbdexport

import "time"

// What a client may cost. Lengths in bytes.
const (
	minBlockSize       = 1        // smallest request
	preferredBlockSize = 4096     // what requests are best aligned to
	maxPayload         = 32 << 20 // largest READ or WRITE

	maxName       = 4096     // a string of the protocol
	maxOptionData = 64 << 10 // what is kept of an option; a larger one is skipped and refused
	maxQueries    = 1024     // metadata queries in one option

	maxSkip = 4<<30 - 1 // payload of a refused request that is skipped; above, the connection ends

	handshakeTime = 10 * time.Second // for the whole handshake

	maxHeld = 256 // clients that wait for exports that are to come

	acceptPause    = 50 * time.Millisecond // before the next try when Accept fails, doubled up to maxAcceptPause
	maxAcceptPause = time.Second
	acceptTold     = time.Minute // how often that is logged

	byeTime = 5 * time.Second // for the last replies to a client when the server ends

	maxActive       = 64        // requests of a connection that run at once, not counting those that wait
	maxWaiting      = 4096      // requests of a connection that wait for data
	maxWaitingBytes = 64 << 20  // memory of a connection's waiting requests that does not count as active
	waitCost        = 12 << 10  // of a request that waits beside its data: its goroutine with its stack, and what it is noted in
	freeWaits       = 8         // requests of a connection that may wait whatever others do
	maxQueued       = 4 << 20   // replies of a connection that wait for a slow client, or one reply
	maxIdleWorkers  = 8         // goroutines of a connection kept for the next request
	maxExtents      = 64 << 10  // extents in one reply to NBD_CMD_BLOCK_STATUS
	freeRequest     = 256 << 10 // a connection with nothing else under way may have this beyond the budget

	readBuffer      = 64 << 10 // read from the socket at once
	smallPayload    = 32 << 10 // below, a payload is read together with what follows
	smallAhead      = 4 << 10  // read at once after a larger payload
	handshakeBuffer = 1 << 10  // the same before the transmission phase

	batchReplies = 16       // replies that the leader gathers before it writes
	batchBytes   = 64 << 10 // the same in bytes

	joinBytes = 16 << 10 // replies put together where one call takes one slice only

	firstSegment = 64 << 10 // memory for the payload of a WRITE at first
	lastSegment  = 1 << 20  // and at most at once

	pipePayload = 128 << 10 // more than readBuffer; from here on a payload goes through a pipe where that is possible
	pipeSize    = 256 << 10 // of the pipe, and the most that is in it: so many firstSegments
	pipePage    = 4 << 10   // no write of a part of a payload ends inside one
	pipeRest    = 64        // payloads that go the ordinary way after such a one

	holeSize      = 4 << 10 // smallest run of zeroes that a READ leaves out
	maxReadChunks = 64      // of one READ

	bigRequest = 4 << 20 // from here on a request always has a worker of its own

	lookForClient = time.Second // how often the leader looks whether the client has gone, while it reads nothing

	stuckAfter = time.Millisecond // a request that the leader runs for longer is left to its goroutine

	slowAfter      = 40 * time.Microsecond // a request that was not just memory
	windowRequests = 256                   // after so many the pacer looks again
	windowTime     = 20 * time.Millisecond // or after this
)

// Defaults of Options.
const (
	defaultMemoryBudget   = 256 << 20
	defaultMaxConnections = 1024
	defaultPipeStuck      = 10 * time.Millisecond // from then on a payload keeps others waiting
)

// stallLog is when a request that waits is worth a line in the log.
var stallLog = []time.Duration{5 * time.Second, 30 * time.Second, 60 * time.Second}
