package firstblocks

import "context"

const (
	sector     = 512
	maxEntries = 128 // partitions that are looked at
)

// partitions returns the partitions of a disk: those of its GPT, or the primary ones of its MBR.
func (s *scan) partitions(ctx context.Context) []extent {
	mbr := make([]byte, sector)
	// A disk that cannot be read says so when the file system is looked for.
	if ok, err := s.read(ctx, mbr, 0); !ok || err != nil || mbr[510] != 0x55 || mbr[511] != 0xAA {
		return nil
	}
	var found []extent
	for i := range 4 {
		entry := mbr[446+16*i:][:16]
		switch entry[4] {
		case 0:
		case 0xEE: // stands for a GPT
			return s.gpt(ctx)
		default:
			found = s.partition(found, uint64(little.Uint32(entry[8:])), uint64(little.Uint32(entry[12:])), sector)
		}
	}
	return found
}

// gpt returns the partitions of a GPT, on a disk with sectors of 512 or 4096 bytes.
func (s *scan) gpt(ctx context.Context) []extent {
	for _, unit := range []int64{sector, 4096} {
		header := make([]byte, sector)
		if ok, err := s.read(ctx, header, unit); !ok || err != nil || string(header[:8]) != "EFI PART" {
			continue
		}
		table, count, size := little.Uint64(header[72:]), little.Uint32(header[80:]), little.Uint32(header[84:])
		if size < 128 || size > 4096 || table > uint64(s.size/unit) {
			continue
		}
		entries := make([]byte, min(count, maxEntries)*size)
		if ok, err := s.read(ctx, entries, int64(table)*unit); !ok || err != nil {
			continue
		}
		var found []extent
		for ; len(entries) > 0; entries = entries[size:] {
			from, last := little.Uint64(entries[32:]), little.Uint64(entries[40:])
			if from > 0 && last >= from {
				found = s.partition(found, from, last-from+1, unit)
			}
		}
		return found
	}
	return nil
}

// partition adds one of count sectors of unit bytes that begins at sector from, as far as it is on the disk.
func (s *scan) partition(found []extent, from, count uint64, unit int64) []extent {
	sectors := uint64(s.size / unit)
	if from == 0 || from >= sectors || count == 0 {
		return found
	}
	return append(found, extent{int64(from) * unit, int64(min(count, sectors-from)) * unit})
}
