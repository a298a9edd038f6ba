//go:build unchecked

package protocol

// Unchecked says that this program has no checksums on the wire and no map.
const Unchecked = true
