package main

import (
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/nbdexport"
)

// gatherGivenUp is how long reads that are given up are counted before a line
// tells of them: many that began together end together.
const gatherGivenUp = time.Second

// givenUp is the reads of an export that ended with EIO because of --stall.
type givenUp struct {
	first nbdexport.Wait
	count int
}

// waited is told of the requests that wait for the source. That they wait is
// the device's to say, which knows for what and tells it once for all of them;
// that some were given up is said here, in one line for all that end together.
func (r *receiver) waited(w nbdexport.Wait) {
	if !w.GivenUp {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if g := r.givenUp[w.Export]; g != nil {
		g.count++
		return
	}
	if r.givenUp == nil {
		r.givenUp = make(map[string]*givenUp)
	}
	r.givenUp[w.Export] = &givenUp{first: w, count: 1}
	time.AfterFunc(gatherGivenUp, func() { r.tellGivenUp(w.Export) })
}

// tellGivenUp says what was given up since the first of them.
func (r *receiver) tellGivenUp(export string) {
	r.mu.Lock()
	g := r.givenUp[export]
	delete(r.givenUp, export)
	r.mu.Unlock()
	connected := false
	for _, d := range r.dest.Status() {
		connected = connected || d.Name == export && d.Connected
	}
	r.console.log.Error("clients got EIO for what they waited for, as --stall says",
		"disk", export, "requests", g.count, "first_offset", g.first.Off, "waited", g.first.Waited.Round(time.Millisecond),
		"source_attached", connected)
}
