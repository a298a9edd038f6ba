// Package integration holds the tests from end to end: the built command between real disks, real NBD clients
// (libnbd, QEMU, fio) and real kernels. They need the build tag integration:
//
//	go test -tags integration ./integration/
//
// A tool that is missing skips a test with the reason; with CI=true in the environment it fails it.
package integration
