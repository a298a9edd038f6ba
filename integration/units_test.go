//go:build integration

package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestUnitsOfTheManualAreValid holds the systemd units of docs/OPERATIONS.md against systemd itself.
func TestUnitsOfTheManualAreValid(t *testing.T) {
	need(t, "systemd-analyze")
	manual, err := os.ReadFile(filepath.Join(top(), "docs", "OPERATIONS.md"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	program := filepath.Join(dir, "silo-nbd") // the units name where it is installed
	if err := os.Symlink(siloNBD(t), program); err != nil {
		t.Fatal(err)
	}
	paths := []string{filepath.Join(dir, "vm-disk.service"), filepath.Join(dir, "vm-disk.socket"), filepath.Join(dir, "vm-disk-source.service")}
	units := unitsOf(string(manual))
	if len(units) != len(paths) {
		t.Fatalf("%d units in the manual, want %d:\n%s", len(units), len(paths), strings.Join(units, "\n--\n"))
	}
	for i, unit := range units {
		writeFile(t, paths[i], strings.ReplaceAll(unit, "/usr/local/bin/silo-nbd", program))
	}
	r := command(t, time.Minute, "systemd-analyze", append([]string{"verify"}, paths...)...)
	if r.code != 0 || strings.Contains(r.stderr, dir) {
		t.Errorf("systemd-analyze ended with %d:\n%s%s", r.code, r.stdout, r.stderr)
	}

	writeFile(t, paths[0], "[Service]\nType=notify\nExecStart="+program+" dest\nRestartSecs=5\n")
	if r := command(t, time.Minute, "systemd-analyze", "verify", paths[0]); !strings.Contains(r.stderr, "RestartSecs") {
		t.Errorf("systemd-analyze says nothing of a setting that there is not: %s", r.stderr)
	}
}

// unitsOf are the indented blocks of a text that are units of systemd.
func unitsOf(text string) (units []string) {
	var block strings.Builder
	for line := range strings.Lines(text + "\nend\n") {
		indented, ok := strings.CutPrefix(line, "    ")
		switch {
		case ok:
			block.WriteString(indented)
		case strings.TrimSpace(line) == "" && block.Len() > 0:
			block.WriteString("\n") // within a block, or after it
		default:
			if strings.Contains(block.String(), "[Service]\n") || strings.Contains(block.String(), "[Socket]\n") {
				units = append(units, block.String())
			}
			block.Reset()
		}
	}
	return units
}
