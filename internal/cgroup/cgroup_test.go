package cgroup

import (
	"testing"
	"testing/fstest"

	"github.com/stretchr/testify/require"
)

// The lowest limit of the group and of those that it lies in counts (fault H11).
func TestLowestLimitOnTheWayUpCounts(t *testing.T) {
	file := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s)} }
	for name, c := range map[string]struct {
		files fstest.MapFS
		want  int64
	}{
		"nothing": {fstest.MapFS{}, 0},
		"v2": {fstest.MapFS{
			"proc/self/cgroup":                                  file("0::/system.slice/vm.service\n"),
			"sys/fs/cgroup/system.slice/memory.max":             file("1073741824\n"),
			"sys/fs/cgroup/system.slice/memory.high":            file("max\n"),
			"sys/fs/cgroup/system.slice/vm.service/memory.max":  file("max\n"),
			"sys/fs/cgroup/system.slice/vm.service/memory.high": file("268435456\n"),
		}, 268435456},
		"v2 in a container": {fstest.MapFS{
			"proc/self/cgroup":         file("0::/\n"),
			"sys/fs/cgroup/memory.max": file("268435456\n"),
		}, 268435456},
		"v1": {fstest.MapFS{
			"proc/self/cgroup": file("12:cpu:/a\n5:memory:/a/b\n0::/a\n"),
			"sys/fs/cgroup/memory/a/memory.limit_in_bytes":   file("536870912\n"),
			"sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": file("9223372036854771712\n"),
		}, 536870912},
		"no limit": {fstest.MapFS{
			"proc/self/cgroup":           file("0::/a\n"),
			"sys/fs/cgroup/a/memory.max": file("max\n"),
		}, 0},
		"a path that leads out": {fstest.MapFS{
			"proc/self/cgroup":         file("0::/../../a\n"),
			"sys/fs/cgroup/memory.max": file("4096\n"),
		}, 4096},
	} {
		t.Run(name, func(t *testing.T) { require.Equal(t, c.want, MemoryLimit(c.files)) })
	}
}
