package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// bootInittab and bootScript are the user space of the root disk: busybox is its init, and runs a workload once that holds
// files against their sums.
const (
	bootInittab = `::sysinit:/etc/rc
::ctrlaltdel:/sbin/reboot
`
	bootScript = `#!/bin/sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
echo "` + bootFirst + `$(awk '$2 == "/" { print $1, $3 }' /proc/mounts)"
mount -o remount,rw / && mount -t tmpfs tmp /tmp || exit 1
cd /trees || exit 1
if sha256sum -c /sums >/tmp/checked && date >/booted && sync; then
	echo "` + bootDone + `$(wc -l </tmp/checked) files are right"
else
	grep -v ': OK$' /tmp/checked
	echo "` + bootBad + `"
fi
echo 'guest-exit: 0' >/dev/ttyS1
poweroff -f
`
	bootFirst = "user space on "
	bootDone  = "workload done: "
	bootBad   = "workload failed"
)

const (
	bootTrees = 2       // copies of the Go distribution on the disk, of some 260 MiB each
	bootSize  = 1 * gib // the size of the disk, in bytes
	bootSmall = 100     // small files, from all over the disk, that the workload reads
)

// What the workload reads besides, of the last tree: the 400 files of a directory and of those in it, and three
// programs of some 30 MiB.
var (
	bootDirs  = []string{"src/net"}
	bootLarge = []string{"bin/go", "pkg/tool/linux_amd64/vet", "pkg/tool/linux_amd64/link"}
)

// bootDisk makes the root disk.
func (b *bench) bootDisk(ctx context.Context, busybox, disk string) error {
	goroot, _, err := output(ctx, "go", "env", "GOROOT")
	if err != nil {
		return err
	}
	root := filepath.Join(b.disk, "root")
	defer os.RemoveAll(root)
	for _, dir := range []string{"bin", "sbin", "etc", "dev", "proc", "sys", "tmp", "usr/bin", "usr/sbin", "trees"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	if err := installBusybox(ctx, busybox, root); err != nil {
		return err
	}
	for name, content := range map[string]string{"etc/inittab": bootInittab, "etc/rc": bootScript} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(content), 0o755); err != nil {
			return err
		}
	}
	trees := filepath.Join(root, "trees")
	for i := range bootTrees {
		tree := filepath.Join(trees, fmt.Sprint(i+1))
		if err := os.Mkdir(tree, 0o755); err != nil {
			return err
		}
		args := []string{"-rL"}
		for _, dir := range []string{"src", "pkg", "bin"} {
			args = append(args, filepath.Join(strings.TrimSpace(goroot), dir))
		}
		if _, _, err := output(ctx, "cp", append(args, tree)...); err != nil {
			return err
		}
	}
	sums, err := bootSums(trees)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(root, "sums"), []byte(sums), 0o644); err != nil {
		return err
	}
	_, _, err = output(ctx, "mkfs.ext4", "-q", "-E", "root_owner=0:0", "-d", root, disk, fmt.Sprintf("%dk", bootSize/kib))
	return err
}

// installBusybox puts busybox and a link for each of its commands into root.
func installBusybox(ctx context.Context, busybox, root string) error {
	if _, _, err := output(ctx, "cp", busybox, filepath.Join(root, "bin", "busybox")); err != nil {
		return err
	}
	list, _, err := output(ctx, busybox, "--list-full")
	if err != nil {
		return err
	}
	for command := range strings.FieldsSeq(list) {
		to := filepath.Join(root, command)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		if err := os.Symlink("/bin/busybox", to); err != nil && !os.IsExist(err) {
			return err
		}
	}
	return nil
}

// bootSums returns the sums, as sha256sum writes them, of what the workload reads of the trees, in its order.
func bootSums(trees string) (string, error) {
	small, err := filesOf(trees, 64*kib)
	if err != nil {
		return "", err
	}
	tree := filepath.Join(trees, fmt.Sprint(bootTrees))
	var together, large []string
	for _, dir := range bootDirs {
		files, err := filesOf(filepath.Join(tree, dir), gib)
		if err != nil {
			return "", err
		}
		together = append(together, files...)
	}
	for _, name := range bootLarge {
		large = append(large, filepath.Join(tree, name))
	}
	var sums strings.Builder
	for _, path := range readOrder(evenly(small, bootSmall), together, large) {
		sum, err := fileSum(path)
		if err != nil {
			return "", err
		}
		name, err := filepath.Rel(trees, path)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&sums, "%x  %s\n", sum, name)
	}
	return sums.String(), nil
}

// filesOf are the files of a tree that hold something, and less than so many bytes.
func filesOf(tree string, below int64) (files []string, err error) {
	err = filepath.WalkDir(tree, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		info, err := entry.Info()
		if err == nil && info.Size() > 0 && info.Size() < below {
			files = append(files, path)
		}
		return err
	})
	return files, err
}

// evenly chooses at most count of all.
func evenly(all []string, count int) []string {
	count = min(count, len(all))
	chosen := make([]string, count)
	for i := range chosen {
		chosen[i] = all[i*len(all)/count]
	}
	return chosen
}

// readOrder is the order of the workload's reads: a third of those from all over the disk, those that lie together,
// another third, the programs, the rest.
func readOrder(scattered, together, large []string) []string {
	third := len(scattered) / 3
	return slices.Concat(scattered[:third], together, scattered[third:2*third], large, scattered[2*third:])
}

func fileSum(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	return h.Sum(nil), err
}
