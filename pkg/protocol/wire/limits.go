package wire

// Limits on what a decoder takes, whatever the packet claims. The length of the
// packet itself is limited by whoever reads it.
const (
	// MaxDirtyBlocks is the most blocks of one DirtyList: 64 MiB of packet.
	MaxDirtyBlocks = 1 << 24
	// MaxHashes is the most hashes of one Hashes packet: about 36 MiB.
	MaxHashes = 1 << 20
	// MaxSchema is the longest schema of a DevInfo, in bytes.
	MaxSchema = 64 << 10
	// MaxExtension is the longest extension of a DevInfo, in bytes.
	MaxExtension = 64 << 10
	// MaxRefused is the longest reason of a refusal in it, in bytes.
	MaxRefused = 1 << 10
	// MaxAlternateSources is the most entries of one AlternateSources packet.
	MaxAlternateSources = 1 << 20
	// MaxLocation is the longest location in it, in bytes.
	MaxLocation = 64 << 10
	// MaxMapEntries is the most entries of a WriteAtWithMap or RemoveFromMap.
	MaxMapEntries = 1 << 20
	// MaxRunLength is the most bytes that one run-length packet may stand for.
	MaxRunLength = 1 << 30
)
