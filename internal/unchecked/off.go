//go:build !unchecked

// Package unchecked says whether this program was built to measure what
// checksums on the wire and the map on disk cost, with the build tag unchecked.
// Such a program has neither: it is for scripts/bench, and for no disk that
// anybody needs.
package unchecked

// Build says that this program checks nothing and remembers nothing.
const Build = false
