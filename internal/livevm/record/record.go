// Package record is what the workload in the guest writes: numbered records, each in its place of two rings of a file.
package record

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
)

// Size is that of a record, in bytes.
const Size = 4096

// Rings are how many records the rings of the file have room for; they lie one behind the other. The first is a few
// blocks that are written all the time, as a file system's journal is. In the second each record goes far away from the
// one before, so that what is lost of one is not made good by the next.
var Rings = []int64{64, 16384}

// stride is how many places further a record lies in its ring. It is odd, so that all places are used in turn.
const stride = 6037

// FileSize is that of the file, in bytes.
func FileSize() (n int64) {
	for _, ring := range Rings {
		n += ring * Size
	}
	return n
}

var table = crc32.MakeTable(crc32.Castagnoli)

// Fill makes p, of Size bytes, the record of that number. Its last four bytes are the CRC32C of the rest.
func Fill(p []byte, number int64) {
	x := uint64(number)
	for i := 0; i < Size; i += 8 {
		binary.LittleEndian.PutUint64(p[i:], x)
		x = x*6364136223846793005 + 1442695040888963407
	}
	binary.LittleEndian.PutUint32(p[Size-4:], crc32.Checksum(p[:Size-4], table))
}

// Places are the offsets, in bytes, at which the record of that number lies. Numbers begin with 1.
func Places(number int64) []int64 {
	var places []int64
	begin := int64(0)
	for _, ring := range Rings {
		places = append(places, begin+(number-1)*stride%ring*Size)
		begin += ring * Size
	}
	return places
}

// Verify reads all that must be in a file to which the records up to last were written, and perhaps some of the next
// so many. It returns how many places it has read, and how many of them do not hold the right record; say is called for
// each of these.
func Verify(file io.ReaderAt, last, next int64, say func(string)) (places, bad int64, err error) {
	p := make([]byte, Size)
	for ring := range Rings {
		for n := max(1, last-Rings[ring]+1); n <= last; n++ {
			off := Places(n)[ring]
			if _, err := file.ReadAt(p, off); err != nil {
				return places, bad, fmt.Errorf("record %d, at %d: %w", n, off, err)
			}
			places++
			if got := number(p); got != n && !(got > last && got <= last+next && (got-n)%Rings[ring] == 0) {
				bad++
				say(fmt.Sprintf("record %d is not at %d: %s", n, off, name(got)))
			}
		}
	}
	return places, bad, nil
}

// number is that of the record in p; 0: it is none.
func number(p []byte) int64 {
	n := int64(binary.LittleEndian.Uint64(p))
	want := make([]byte, Size)
	Fill(want, n)
	if string(p) != string(want) {
		return 0
	}
	return n
}

func name(number int64) string {
	if number == 0 {
		return "what is there is no record"
	}
	return fmt.Sprintf("record %d is", number)
}
