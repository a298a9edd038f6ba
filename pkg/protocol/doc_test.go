package protocol

import (
	"encoding/hex"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

func protocolDoc(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("../../docs/PROTOCOL.md")
	require.NoError(t, err)
	return string(b)
}

// The bytes in docs/PROTOCOL.md are those that the code writes and reads.
func TestTheBytesInTheDocumentationAreReal(t *testing.T) {
	doc := protocolDoc(t)
	example := func(name string) []byte {
		_, rest, ok := strings.Cut(doc, "```hex "+name+"\n")
		require.True(t, ok, name)
		text, _, ok := strings.Cut(rest, "```")
		require.True(t, ok, name)
		b, err := hex.DecodeString(strings.Join(strings.Fields(text), ""))
		require.NoError(t, err, name)
		return b
	}
	di := wire.DevInfo{Size: 1 << 20, BlockSize: 64 << 10, Name: "a", Extension: &wire.Extension{Revision: wire.Revision, Live: true}}
	b, err := di.AppendBinary(nil)
	require.NoError(t, err)
	require.Equal(t, example("devinfo"), b)
	var decoded wire.DevInfo
	require.NoError(t, decoded.UnmarshalBinary(b))
	require.Equal(t, di, decoded)

	answer := wire.DevInfoResponse{Extension: wire.Extension{Revision: wire.Revision, MaxData: 1 << 20, Window: 24 << 20}}
	b, err = answer.AppendBinary(nil)
	require.NoError(t, err)
	require.Equal(t, example("devinforesponse"), b)

	require.Equal(t, example("checked"), wire.AppendChecked(nil, wire.Header{Dev: 1, ID: 9, Length: 2}, []byte{7, 4}))

	require.Equal(t, example("zerorun"), wire.AppendZeroRun(nil, 64<<10, 1<<30))
}

// The limits in docs/PROTOCOL.md are those of the code.
func TestTheLimitsInTheDocumentationAreReal(t *testing.T) {
	doc := protocolDoc(t)
	size := func(n int64) string {
		for _, unit := range []struct {
			shift int
			name  string
		}{{30, "GiB"}, {20, "MiB"}, {10, "KiB"}} {
			if n >= 1<<unit.shift {
				return fmt.Sprintf("%d %s", n>>unit.shift, unit.name)
			}
		}
		return fmt.Sprint(n)
	}
	for what, limit := range map[string]string{
		"received data not yet in storage":       size(defaultMemory),
		"of it, for one device alone":            "up to " + size(defaultMemory/2),
		"a packet":                               size(defaultMaxPacket),
		"data of one WriteAt or ReadAt":          size(maxData),
		"what one run-length packet stands for":  size(wire.MaxRunLength),
		"DevInfo schema":                         size(wire.MaxSchema),
		"extension":                              size(wire.MaxExtension),
		"event":                                  size(maxEvent),
		"devices":                                fmt.Sprint(defaultMaxDevices),
		"requests of a device without an answer": fmt.Sprint(maxUnanswered),
		"of them events, lists, hashes":          fmt.Sprint(maxControl),
		"answers that wait for the socket":       size(maxOutbox),
	} {
		require.Contains(t, doc, fmt.Sprintf("| %s | %s | ", what, limit))
	}
}

// Every command that has a name in the code has a row in the documentation.
func TestEveryCommandIsDocumented(t *testing.T) {
	doc := protocolDoc(t)
	for c := range 256 {
		name := wire.Command(c).String()
		if strings.HasPrefix(name, "command ") {
			continue
		}
		row := regexp.MustCompile(fmt.Sprintf(`(?m)^\| [^|]*\b%02x\b[^|]*\| [^|]*\b%s\b`, c, name))
		require.Regexp(t, row, doc, name)
	}
}
