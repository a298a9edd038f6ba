// Package nbdexport is an NBD server for any storage: fixed newstyle
// negotiation, and a transmission phase in which the requests of a connection
// run at once.
//
// What it serves is a go-nbd backend.Backend; what a backend can do beyond
// that it says by implementing the optional interfaces of backend.go. What a
// backend cannot do is not advertised.
//
// The life of a connection: handshake.go speaks the options (a file an option
// family), conn.go serves the requests. There one goroutine at a time is the
// leader, which reads requests. It runs the short ones itself, so that a
// client that sends one request after the other costs no change of goroutine;
// as soon as a request turns out to wait, another goroutine becomes the leader.
//
// All offsets, lengths and sizes are in bytes.
package nbdexport
