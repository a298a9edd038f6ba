package sources

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestImagesOfOtherFormatsAreKnown, as qemu-img makes them (fault H10).
func TestImagesOfOtherFormatsAreKnown(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		missing(t, "qemu-img is not installed")
	}
	dir := t.TempDir()
	for _, c := range []struct{ format, options, want string }{
		{"qcow2", "", "qcow2"},
		{"qcow2", "compat=0.10", "qcow2"},
		{"qcow", "", "qcow"},
		{"qed", "", "QED"},
		{"vmdk", "", "VMDK"},
		{"vmdk", "subformat=monolithicFlat", "VMDK"},
		{"vhdx", "", "VHDX"},
		{"vpc", "", "VHD"},
		{"vpc", "subformat=fixed", "VHD"},
		{"vdi", "", "VDI"},
		{"parallels", "", "Parallels"},
		{"raw", "", ""},
	} {
		path := filepath.Join(dir, c.format+c.options)
		args := []string{"create", "-q", "-f", c.format, path, "8M"}
		if c.options != "" {
			args = append(args, "-o", c.options)
		}
		out, err := exec.Command("qemu-img", args...).CombinedOutput()
		require.NoError(t, err, string(out))
		f, err := OpenFile(path, FileOptions{ReadOnly: true})
		require.NoError(t, err)
		format, err := f.Format()
		require.NoError(t, err)
		require.Equal(t, c.want, format, path)
		require.NoError(t, f.Close())
	}
}

func TestDiskOfAnySizeHasAFormat(t *testing.T) {
	for size := 1; size < 600; size += 7 {
		path := filepath.Join(t.TempDir(), "disk")
		require.NoError(t, os.WriteFile(path, bytes.Repeat([]byte("Q"), size), 0o600))
		f, err := OpenFile(path, FileOptions{ReadOnly: true})
		require.NoError(t, err)
		format, err := f.Format()
		require.NoError(t, err)
		require.Empty(t, format)
		require.NoError(t, f.Close())
	}
}
