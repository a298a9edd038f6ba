//go:build !race

// The race detector makes a pool forget some of what it is given.

package sources

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestFileUseAllocatesNothing(t *testing.T) {
	for name, dir := range map[string]string{"device": t.TempDir(), "memory": inMemory(t)} {
		t.Run(name, func(t *testing.T) {
			f := create(t, filepath.Join(dir, "disk"), 1<<20)
			p := make([]byte, 64<<10)
			require.Zero(t, testing.AllocsPerRun(20, func() {
				if _, err := f.WriteAt(p, 4096); err != nil {
					t.Error(err)
				}
				if _, err := f.ReadAt(p, 4096); err != nil {
					t.Error(err)
				}
			}))
		})
	}
}
