package addr

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Listening says whether somebody on this host listens on a. It looks into the
// kernel's tables and does not connect: who connects is taken for a peer.
func Listening(a Addr) (bool, error) {
	if a.network == "unix" {
		return inTable("/proc/net/unix", 8, 7, a.path, 3, "00010000") // __SO_ACCEPTCON
	}
	port, err := strconv.ParseUint(a.port, 10, 16)
	if err != nil {
		return false, fmt.Errorf("%v: its port is no number", a)
	}
	name := fmt.Sprintf(":%04X", port)
	v4, err := inTable("/proc/net/tcp", 10, 1, name, 3, "0A") // TCP_LISTEN
	v6, _ := inTable("/proc/net/tcp6", 10, 1, name, 3, "0A")  // a kernel without IPv6 has none
	return v4 || v6, err
}

// inTable looks for a line of at least so many fields, one of which ends in name and another of which is state.
func inTable(table string, fields, nameField int, name string, stateField int, state string) (bool, error) {
	content, err := os.ReadFile(table)
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(string(content)) {
		f := strings.Fields(line)
		if len(f) >= fields && strings.HasSuffix(f[nameField], name) && f[stateField] == state {
			return true, nil
		}
	}
	return false, nil
}
