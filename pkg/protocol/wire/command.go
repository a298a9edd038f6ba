// Package wire turns the packets of the Silo protocol into structs and back:
// bytes in, bytes out, no goroutine, lock, context or I/O.
//
// Each message has a file, a struct with UnmarshalBinary and AppendBinary, and
// a fuzz target. Decoding takes a whole packet, from its command byte on, and
// refuses what is short, has bytes left over, or claims more than there is.
// Byte slices in a decoded struct alias the packet; integers are little-endian.
package wire

import "fmt"

// Command is the first byte of a packet. Bit 7 makes it a response.
type Command byte

// The commands, in the order of their numbers.
const (
	CommandReadAt           Command = 0x01
	CommandWriteAt          Command = 0x02
	CommandNeedAt           Command = 0x03
	CommandDontNeedAt       Command = 0x04
	CommandDirtyList        Command = 0x05
	CommandDevInfo          Command = 0x06
	CommandEvent            Command = 0x07
	CommandHashes           Command = 0x08
	CommandWriteAtWithMap   Command = 0x09
	CommandRemoveDev        Command = 0x0a
	CommandRemoveFromMap    Command = 0x0b
	CommandAlternateSources Command = 0x0c
	CommandDeviceGroupInfo  Command = 0x0d // later than 0.1.5: named, not taken
	CommandReadByHash       Command = 0x0e // later than 0.1.5: named, not taken

	CommandChecked Command = 0x7b // ours: another packet with checksums around it
	CommandAlive   Command = 0x7c // ours: I am there

	CommandReadAtResponse     Command = 0x81
	CommandReadAtResponseErr  Command = 0x82
	CommandWriteAtResponse    Command = 0x83
	CommandWriteAtResponseErr Command = 0x84
	CommandEventResponse      Command = 0x85
	CommandHashesResponse     Command = 0x86
	CommandDirtyListResponse  Command = 0x87
	CommandDevInfoResponse    Command = 0xfd // ours: the answer to an extended DevInfo
)

var commandNames = map[Command]string{
	CommandReadAt:             "ReadAt",
	CommandWriteAt:            "WriteAt",
	CommandNeedAt:             "NeedAt",
	CommandDontNeedAt:         "DontNeedAt",
	CommandDirtyList:          "DirtyList",
	CommandDevInfo:            "DevInfo",
	CommandEvent:              "Event",
	CommandHashes:             "Hashes",
	CommandWriteAtWithMap:     "WriteAtWithMap",
	CommandRemoveDev:          "RemoveDev",
	CommandRemoveFromMap:      "RemoveFromMap",
	CommandAlternateSources:   "AlternateSources",
	CommandDeviceGroupInfo:    "DeviceGroupInfo",
	CommandReadByHash:         "ReadByHash",
	CommandChecked:            "Checked",
	CommandAlive:              "Alive",
	CommandReadAtResponse:     "ReadAtResponse",
	CommandReadAtResponseErr:  "ReadAtResponseErr",
	CommandWriteAtResponse:    "WriteAtResponse",
	CommandWriteAtResponseErr: "WriteAtResponseErr",
	CommandEventResponse:      "EventResponse",
	CommandHashesResponse:     "HashesResponse",
	CommandDirtyListResponse:  "DirtyListResponse",
	CommandDevInfoResponse:    "DevInfoResponse",
}

// String is the command's name, or its number if it has none.
func (c Command) String() string {
	if name, ok := commandNames[c]; ok {
		return name
	}
	return fmt.Sprintf("command 0x%02x", byte(c))
}

// IsResponse says that the packet answers a request of the other side.
func (c Command) IsResponse() bool {
	return c&0x80 != 0
}

// DecodeBare checks a packet that is its command byte and nothing else: want.
func DecodeBare(b []byte, want Command) error {
	c := newCursor(b, want)
	return c.done()
}
