// Package cgroup reads how much memory this process may use.
package cgroup

import (
	"bytes"
	"io/fs"
	"path"
	"strconv"
	"strings"
)

// MemoryLimit returns the bytes of memory that the control groups of this process
// allow, by memory.max and memory.high of cgroup v2 or by version 1; 0 means no limit,
// or none that can be read. root is the root of the file system, os.DirFS("/").
func MemoryLimit(root fs.FS) int64 {
	text, err := fs.ReadFile(root, "proc/self/cgroup")
	if err != nil {
		return 0
	}
	limit := int64(0)
	for line := range strings.Lines(string(text)) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) != 3 {
			continue
		}
		switch {
		case fields[0] == "0":
			limit = lowest(limit, along(root, "sys/fs/cgroup", fields[2], "memory.max", "memory.high"))
		case fields[1] == "memory":
			limit = lowest(limit, along(root, "sys/fs/cgroup/memory", fields[2], "memory.limit_in_bytes"))
		}
	}
	return limit
}

// along returns the lowest limit of a group and of all that it lies in.
func along(root fs.FS, mount, group string, files ...string) (limit int64) {
	for group = path.Clean("/" + group); ; group = path.Dir(group) {
		for _, file := range files {
			limit = lowest(limit, read(root, path.Join(mount, group, file)))
		}
		if group == "/" {
			return limit
		}
	}
}

// read returns a limit, 0 for none.
func read(root fs.FS, name string) int64 {
	text, err := fs.ReadFile(root, name)
	if err != nil {
		return 0 // the root group has none, and a container may not see what it lies in
	}
	n, err := strconv.ParseInt(string(bytes.TrimSpace(text)), 10, 64)
	if err != nil || n < 0 || n >= 1<<60 {
		return 0 // "max", and what version 1 says for it
	}
	return n
}

// lowest of two limits, of which 0 is none.
func lowest(a, b int64) int64 {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}
