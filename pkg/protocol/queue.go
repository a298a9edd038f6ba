package protocol

import "github.com/silo-nbd/silo-nbd/pkg/protocol/wire"

// Jobs that stand for a request that is refused bear the command of the answer.
const (
	commandRefused     = wire.CommandWriteAtResponseErr
	commandReadRefused = wire.CommandReadAtResponseErr
)

// job is a request on its way to a device's store.
type job struct {
	command     wire.Command
	id          uint32
	rle         bool // a WriteAt of tokens, which stand for length bytes
	off, length int64
	buf         *buffer // received data, or room for it
	tokens      []byte  // part of buf
	charge      int64   // bytes of the budget that it holds
	message     any     // a decoded event or list
	checksum    checksum
	reason      wire.Reason // of a refusal
}

// barrier says that a job waits for all before it and runs alone.
func (j *job) barrier() bool {
	switch j.command {
	case wire.CommandEvent, wire.CommandDirtyList, wire.CommandHashes, wire.CommandRemoveDev:
		return true
	}
	return false
}

// maxKeptJobs is the largest ring, in jobs, that an empty queue keeps.
const maxKeptJobs = 4096

// queue is a ring of jobs that grows; in steady state it costs no allocation.
type queue struct {
	ring []job
	head int
	n    int
}

func (q *queue) push(j job) {
	if q.n == len(q.ring) {
		grown := make([]job, max(16, 2*len(q.ring)))
		for i := range q.n {
			grown[i] = q.ring[(q.head+i)%len(q.ring)]
		}
		q.ring, q.head = grown, 0
	}
	q.ring[(q.head+q.n)%len(q.ring)] = j
	q.n++
}

// front is the oldest job; there is one.
func (q *queue) front() *job {
	return &q.ring[q.head]
}

func (q *queue) pop() job {
	j := q.ring[q.head]
	q.ring[q.head] = job{}
	q.head = (q.head + 1) % len(q.ring)
	q.n--
	if q.n == 0 && len(q.ring) > maxKeptJobs { // a device after the other could fill one
		q.ring, q.head = nil, 0
	}
	return j
}
