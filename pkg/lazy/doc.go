// Package lazy is the destination of a migration: a device that is usable
// before its contents have arrived.
//
// A block of the device is missing or local. It becomes local because it came
// from the source (fetched) or because all of it was written here (written). A
// read of a missing block waits, and asks the source for it. A write does not
// wait: of a missing block it is remembered which 512-byte sectors were written
// here, and when the block arrives only the other sectors are laid down.
//
// The rule everything rests on is claim, do, publish. Whoever changes the disk
// under a block that is not settled yet first claims the block, then looks at
// its state, then does the disk I/O, then publishes the new state, and gives the
// claim back. So what arrives and what is written here never overlap, and no
// state is ever ahead of the disk. A claim is held over the disk I/O of its
// blocks and over nothing else: not over the network, a callback or a wait.
//
// With a Map the state survives the process and the power. A bit is in the map
// only after a sync of the disk that began when the data was written; a flush
// takes the bits that have changed, syncs the disk, writes just these bits and
// syncs the map. A small flush of a client goes to a log in the map instead, by one
// sync, and to the disk again if the process ends before it is there durably. A
// failure of either file is final: nothing is acknowledged after it.
// The format is in docs/MAP.md.
//
// The package knows neither NBD nor the protocol. The client's hand is the
// methods of Device, the source's hand is Stream, and what the device needs of a
// source is the interface Source.
package lazy
