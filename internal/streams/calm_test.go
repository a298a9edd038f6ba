package streams

import (
	"bytes"
	"errors"
	"log/slog"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func calm(out *bytes.Buffer) *slog.Logger {
	return slog.New(NewCalm(slog.NewTextHandler(out, &slog.HandlerOptions{ReplaceAttr: CutAttr})))
}

// What strangers do fills no log: the lines are bounded in number and length, and
// what is left out is counted (fault C4, trap R3).
func TestStrangersDoNotFillTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		log := calm(&out).With("role", "dest")
		for range 600 { // ten a second
			log.Warn("a connection came to nothing", "cause", errors.New(strings.Repeat("x", 60_000)), "name", strings.Repeat("y", 60_000))
			<-time.After(calmTime / 100)
		}
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		require.Len(t, lines, 6*calmLines)
		require.Equal(t, 5, strings.Count(out.String(), "left_out=80"))
		for _, l := range lines {
			require.Less(t, len(l), 2*maxText+300)
			require.Contains(t, l, "(60000 bytes)")
		}
	})
}

// One disk's lines leave another's alone, and so do other messages.
func TestLinesOfOtherKindsAreLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		log := calm(&out)
		for i := range 200 {
			log.Info("progress", "disk", strconv.Itoa(i), "bytes", i)
			log.Info("noise")
		}
		log.Info("another")
		require.Equal(t, 200, strings.Count(out.String(), "msg=progress"))
		require.Equal(t, calmLines, strings.Count(out.String(), "msg=noise"))
		require.Contains(t, out.String(), "msg=another")
		require.Contains(t, out.String(), "disk=7 bytes=7")
	})
}

// A peer that makes up kinds costs no memory (fault C4).
func TestKindsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		log := calm(&out)
		for i := range 100_000 {
			log.Info("refused", "disk", strconv.Itoa(i))
		}
		require.Equal(t, calmKinds+calmLines, strings.Count(out.String(), "msg=refused"))
	})
}
