package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// ErrChecksum says that bytes are not those that were sent.
var ErrChecksum = errors.New("the checksum does not match: bytes were changed on the way")

// A checked packet is any other behind two checksums (CRC32C), for a peer of
// revision RevisionChecked or later:
//
//	header      12 bytes, as ever: its length counts all that follows
//	0x7b        CommandChecked
//	u32         checksum of the packet
//	u32         checksum of all in front of it, and of the packet's first byte
//	packet
//
// The second one vouches for device, transaction id, length and command. So when
// only the first one fails it is known what is lost, and the stream is in step.

// CheckedHead is the number of bytes between the header and the packet.
const CheckedHead = 9

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checksum continues sum, which is 0 at the start, over b.
func Checksum(sum uint32, b []byte) uint32 {
	return crc32.Update(sum, castagnoli, b)
}

// shortSum is Checksum for a few bytes. It lets b stay on the stack.
func shortSum(sum uint32, b []byte) uint32 {
	sum = ^sum
	for _, v := range b {
		sum = castagnoli[byte(sum)^v] ^ sum>>8
	}
	return ^sum
}

// SumChecked returns the checksum of a packet of two parts, of which the first is
// short.
func SumChecked(first, rest []byte) uint32 {
	return Checksum(shortSum(0, first), rest)
}

// AppendCheckedHead appends what stands in front of a packet that begins with
// command and has the checksum sum; h is its header when it is not checked.
func AppendCheckedHead(b []byte, h Header, command Command, sum uint32) []byte {
	h.Length += CheckedHead
	start := len(b)
	b = append(h.Append(b), byte(CommandChecked))
	b = binary.LittleEndian.AppendUint32(b, sum)
	front := shortSum(shortSum(0, b[start:]), []byte{byte(command)})
	return binary.LittleEndian.AppendUint32(b, front)
}

// AppendChecked appends a whole packet, which is not empty, with all that stands
// in front of it. h is its header when it is not checked.
func AppendChecked(b []byte, h Header, packet []byte) []byte {
	sum := SumChecked(packet[:1], packet[1:])
	return append(AppendCheckedHead(b, h, Command(packet[0]), sum), packet...)
}

// OpenChecked takes a header as it came and the CheckedHead + 1 bytes behind it.
// It returns the header as it is when the packet is not checked, the packet's
// command and the checksum that it must have.
func OpenChecked(h Header, b []byte) (inner Header, command Command, sum uint32, err error) {
	front := shortSum(shortSum(0, h.Append(make([]byte, 0, HeaderSize))), b[:CheckedHead-4])
	front = shortSum(front, b[CheckedHead:CheckedHead+1])
	if h.Length <= CheckedHead || front != binary.LittleEndian.Uint32(b[CheckedHead-4:]) {
		return h, 0, 0, fmt.Errorf("wire: header or command of a packet: %w", ErrChecksum)
	}
	h.Length -= CheckedHead
	return h, Command(b[CheckedHead]), binary.LittleEndian.Uint32(b[1:]), nil
}
