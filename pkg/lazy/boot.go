package lazy

import (
	"encoding/hex"
	"os"
	"strings"
	"sync"
)

// bootID says since when the system runs, and with it what was written to files
// and is not yet durable; zero if that is not known.
var bootID = sync.OnceValue(func() (u UUID) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return u
	}
	raw, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(string(b)), "-", ""))
	if err != nil || len(raw) != len(u) {
		return u
	}
	return UUID(raw)
})
