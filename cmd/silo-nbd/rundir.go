package main

import (
	"os"
	"path/filepath"
	"strconv"
)

// runDir is the directory for what lives as long as the boot: what outlives a kill of
// the process and not a power cut, as the page cache does.
func runDir() string {
	if dir := os.Getenv("SILO_NBD_RUN_DIR"); dir != "" {
		return dir
	}
	if os.Geteuid() == 0 {
		return "/run/silo-nbd"
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "silo-nbd")
	}
	return "/dev/shm/silo-nbd-" + strconv.Itoa(os.Geteuid())
}
