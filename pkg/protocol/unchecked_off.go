//go:build !unchecked

package protocol

// Unchecked says that this program was built with the tag unchecked, to measure
// what checksums on the wire and the map on disk cost: it has neither. Such a
// program is for scripts/bench, and for no disk that anybody needs.
const Unchecked = false
