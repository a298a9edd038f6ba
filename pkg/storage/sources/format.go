package sources

import (
	"bytes"
	"encoding/binary"
)

// signatures are how images of other formats begin, or are marked elsewhere.
var signatures = []struct {
	format string
	at     int64 // a byte; a negative one counts from the end
	bytes  string
}{
	{"qcow2", 0, "QFI\xfb"},
	{"QED", 0, "QED\x00"},
	{"VMDK", 0, "KDMV"},
	{"VMDK", 0, "COWD"},
	{"VMDK", 0, "# Disk DescriptorFile"},
	{"VHDX", 0, "vhdxfile"},
	{"VHD", 0, "conectix"},
	{"VHD", -512, "conectix"},
	{"VDI", 64, "\x7f\x10\xda\xbe"},
	{"Parallels", 0, "WithoutFreeSpace"},
	{"Parallels", 0, "WithouFreSpacExt"},
	{"gzip", 0, "\x1f\x8b\x08"},
	{"xz", 0, "\xfd7zXZ\x00"},
	{"zstd", 0, "\x28\xb5\x2f\xfd"},
	{"bzip2", 0, "BZh91AY&SY"},
}

// Format returns the name of the format of which the file seems to be an image,
// which as a disk is of use to nobody; empty if its bytes seem to be a disk's.
// Who writes the disk can make it seem so: it is for a warning and nothing else.
func (f *File) Format() (string, error) {
	head, tail := make([]byte, min(f.size, 4096)), make([]byte, min(f.size, 512))
	if _, err := f.ReadAt(head, 0); err != nil {
		return "", err
	}
	if _, err := f.ReadAt(tail, f.size-int64(len(tail))); err != nil {
		return "", err
	}
	for _, s := range signatures {
		b, at := head, s.at
		if at < 0 {
			b, at = tail, at+int64(len(tail))
		}
		if at < 0 || at > int64(len(b)) || !bytes.HasPrefix(b[at:], []byte(s.bytes)) {
			continue
		}
		if s.format == "qcow2" && len(head) >= 8 && binary.BigEndian.Uint32(head[4:]) == 1 {
			return "qcow", nil
		}
		return s.format, nil
	}
	return "", nil
}
