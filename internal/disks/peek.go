package disks

import (
	"encoding/json"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// peek returns the mark of the disk at path, without opening or locking it; nil if
// there is none that can be read.
func peek(path string) *mark {
	b := make([]byte, 4096)
	n, err := unix.Getxattr(path, markName, b)
	if err != nil {
		return nil
	}
	m, err := parseMark(path, b[:n])
	if err != nil {
		return nil
	}
	return m
}

// Doubt says why the disk at path may not be the one of a map; empty if nothing speaks
// against it. It locks nothing, so that a dest may begin meanwhile.
func Doubt(path string, i *lazy.Inspection) string {
	switch m := peek(path); {
	case m != nil && m.Device != i.Identity.Device.String():
		return fmt.Sprintf("%s bears the mark of another map, %s", path, m.Map)
	case len(i.Binding.Stamp) > 0 && !i.InUse && !i.Binding.Bears(m.value()):
		return fmt.Sprintf("%s does not bear the mark that its map has: one of them is another one, or an older state", path)
	}
	var was sources.Stamp
	if len(i.Binding.Stamp) == 0 || json.Unmarshal(i.Binding.Stamp, &was) != nil {
		return ""
	}
	info, err := os.Stat(path)
	if err != nil {
		return err.Error()
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !ok, was.Block, !info.Mode().IsRegular():
		return ""
	case st.Ino != was.Inode && !was.Fickle:
		return fmt.Sprintf("%s has inode %d, and its map is of a file of inode %d", path, st.Ino, was.Inode)
	case i.Binding.Clean && !i.InUse && i.State != lazy.MapComplete && (st.Mtim.Nano() != was.ModTime || st.Ctim.Nano() != was.ChangeTime):
		return fmt.Sprintf("%s was changed at %s, after dest had ended", path, stampTime(st.Ctim.Nano()))
	}
	return ""
}
